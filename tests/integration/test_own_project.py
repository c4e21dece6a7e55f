"""The example of a project of one's own, as its page says: trained, then embedded by those who trust it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

OWN = Path(__file__).resolve().parents[2] / "examples" / "own_project"


def call(verb: str, *words: object) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OWN), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "fmcib_ssl", verb, *map(str, words)]
    return subprocess.run(command, cwd=OWN.parents[1], env=environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_encoder_and_an_experiment_of_another_package(phantom_table: Path, tmp_path: Path) -> None:
    run, features = tmp_path / "run", tmp_path / "features.parquet"
    trained = call(
        "train", "--config-dir", OWN / "configs", "+experiment=anisotropic", f"data.annotations={phantom_table}",
        f"paths.data={tmp_path}", f"hydra.run.dir={run}", "data.patch_size=[8,16,16]", "data.batch_size=2",
        "trainer.max_steps=2", "hardware=cpu", "hardware.num_workers=0",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    (store,) = (tmp_path / "stores").iterdir()
    words = (f"checkpoint={run}", f"store={store}", "num_workers=0", f"output={features}")
    refused = call("embed", *words)
    assert refused.returncode == 1 and "own_project.anisotropic_net" in refused.stderr
    trusted = call("embed", *words, "trusted_targets=own_project.anisotropic_net")
    assert trusted.returncode == 0, trusted.stderr
    assert len(pd.read_parquet(features)) > 0
