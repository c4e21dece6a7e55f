"""The fault harness: it kills where it says, sees what is wrong, and goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
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
from faults_runs import DeathTrap, HangError, Started  # noqa: E402

from fmcib_ssl.data.phantom import make_archive  # noqa: E402
from fmcib_ssl.io import write_atomically  # noqa: E402

SPAWN = multiprocessing.get_context("spawn")


def write_with_trap(folder: Path, trap: DeathTrap) -> None:
    trap.arm()
    write_atomically(folder / "a", b"new")


@pytest.mark.parametrize(
    ("trap", "files"),
    [
        (DeathTrap("open", r"\.a\..*\.tmp", 1), ["a"]),
        (DeathTrap("os.rename", r"\.a\..*\.tmp", 1), [".a.x.tmp", "a"]),
        (DeathTrap("os.rename", r"\.a\..*\.tmp", 2), ["a"]),
    ],
)
def test_a_trap_strikes_before_the_event(trap: DeathTrap, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    process = SPAWN.Process(target=write_with_trap, args=(tmp_path, trap))
    process.start()
    process.join(250)
    survives = trap.number == 2
    assert process.exitcode == (0 if survives else -signal.SIGKILL)
    assert [file if file == "a" else ".a.x.tmp" for file in sorted(p.name for p in tmp_path.iterdir())] == files
    assert (tmp_path / "a").read_bytes() == (b"new" if survives else b"old")


def test_what_hangs_is_noticed_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_runs, "PATIENCE_S", 0.5)
    monkeypatch.setattr(faults_runs, "REPO", tmp_path)
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(60)\n")
    for wait in (lambda one: one.wait(0.5), lambda one: one.wait_until(lambda: False)):
        started: Started = faults_runs.start("sleep.py", [], tmp_path / "log", genuine=True)
        with pytest.raises(HangError):
            wait(started)
        assert started.ends_within(10) and started.session() == []
    assert "sleep.py" in (tmp_path / "log").read_text()  # the stack


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
