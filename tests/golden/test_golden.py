"""Seeded runs give the losses that they gave, and files that users have go on loading (golden.py makes them)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from golden import FILES, GOLDEN, RUNS, arithmetic, embed, losses, make_scans, prepare, train

from fmcib_ssl.data import LesionPatches

EXACT = arithmetic() == json.loads(GOLDEN.read_text())["arithmetic"]


def assert_golden(name: str, found: list[str]) -> None:
    """Equal to the bit where the same arithmetic made both; elsewhere rounding grows from step to step."""
    expected = json.loads(GOLDEN.read_text())["losses"][name]
    if EXACT:
        assert found == expected
    else:
        values, golden = ([float.fromhex(loss) for loss in one[:5]] for one in (found, expected))
        np.testing.assert_allclose(values, golden, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_of_seeded_runs(name: str, tmp_path: Path) -> None:
    assert_golden(name, train(name, FILES / "store", tmp_path / "run"))


def test_a_run_that_was_stopped_is_resumed(tmp_path: Path) -> None:
    run = shutil.copytree(FILES / "run", tmp_path / "run", symlinks=True)
    before = losses(run, whole=False)
    found = train("ct_infonce", FILES / "store", run)
    assert found[: len(before)] == before and len(before) < len(found)
    assert_golden("ct_infonce", found)


def test_scans_are_prepared_as_they_were(tmp_path: Path) -> None:
    prepare(make_scans(tmp_path / "scans"), tmp_path / "store")
    made, golden = (LesionPatches(store, patch_size=(10, 10, 10)) for store in (tmp_path / "store", FILES / "store"))
    assert len(made) == len(golden) == 21
    for index in range(len(golden)):
        for patch in ("positive", "negative"):
            assert torch.equal(made[index][patch], golden[index][patch]), (index, patch)


def test_features_are_what_they_were(tmp_path: Path) -> None:
    embed(FILES / "encoder.safetensors", FILES / "store", tmp_path / "features.parquet")
    made, golden = (pd.read_parquet(file) for file in (tmp_path / "features.parquet", FILES / "features.parquet"))
    made_features, golden_features = (np.stack(table["features"].to_numpy()) for table in (made, golden))
    np.testing.assert_allclose(made_features, golden_features, rtol=0 if EXACT else 1e-4)
    assert set(golden) <= set(made)
