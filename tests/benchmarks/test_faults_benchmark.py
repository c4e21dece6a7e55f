"""The fault harness: it kills where it says, sees what is wrong, and goes on where it was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import faults  # noqa: E402
import faults_cases  # noqa: E402
import faults_compare  # noqa: E402
import faults_runs  # noqa: E402

from fmcib_ssl.data.phantom import make_archive  # noqa: E402


def test_a_store_that_differs_in_a_voxel_is_seen(tmp_path: Path) -> None:
    make_archive(tmp_path / "phantom", 1, progress=False)
    arguments = faults.prepare_arguments(tmp_path, tmp_path / "whole", num_workers=0)
    assert faults_runs.start("scripts/prepare.py", arguments, tmp_path / "log").wait() == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "store")
    assert faults_compare.differences_of_stores(tmp_path / "store", tmp_path / "whole") == []
    (tmp_path / "store" / ".store.json.1.tmp").touch()
    scan = next((tmp_path / "store" / "scans").glob("*.b2nd"))
    content = np.frombuffer(scan.read_bytes(), np.uint8).copy()
    content[-1] ^= 1
    scan.write_bytes(content.tobytes())
    found = faults_compare.differences_of_stores(tmp_path / "store", tmp_path / "whole")
    assert f"scans/{scan.name}: bytes" in found and ".store.json.1.tmp is new" in found


@pytest.mark.slow
def test_a_kill_of_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["num_kills=6", f"workspace={tmp_path}"]
    faults.main(arguments)
    found = json.loads((tmp_path / "faults.json").read_text())
    assert [row["fault"] for row in found["rows"]] == list(faults.KINDS) and found["problems"] == []
    assert not list((tmp_path / "cases").iterdir())
    capsys.readouterr()
    monkeypatch.delattr(faults_cases.Case, "strike")
    faults.main(arguments)  # all cases are done
    assert f"{len(faults.KINDS)} kills" in capsys.readouterr().out
