"""Runs from a prepared store."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import metrics_of, tiny_settings

import fmcib_ssl
from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.data.store import StoreSettings
from fmcib_ssl.run import pretrain
from fmcib_ssl.training.settings import ConfigError


@pytest.fixture(scope="module")
def store(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare_store(read_annotations(phantom_table), folder, StoreSettings(spacing_mm=1.5), num_workers=0)
    return folder


@pytest.mark.parametrize(("negatives_per_lesion", "mining"), [(1, "background"), (3, "near"), (2, "hard")])
def test_a_run_from_a_store(
    store: Path,
    phantom_table: Path,
    tmp_path: Path,
    negatives_per_lesion: int,
    mining: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    choices = [
        f"data.store={store}",
        "data.spacing_mm=null",
        f"data.negatives_per_lesion={negatives_per_lesion}",
        f"data.mining={mining}",
    ]
    overrides = ["+experiment=phantom_ntxent_mined", *choices, "trainer.max_steps=2", "contact_sheet_rows=2"]
    with caplog.at_level("INFO", logger="fmcib_ssl"):
        pretrain(tiny_settings(phantom_table, tmp_path, *overrides))
    assert len(metrics_of(tmp_path)) == 2
    assert (tmp_path / "contact_sheet.png").is_file()
    assert f"from store {store}" in caplog.text
    assert fmcib_ssl.load_encoder(tmp_path / "encoder.safetensors").preprocessing.spacing_mm == 1.5


def test_no_negatives_are_mined_for_plain_simclr(store: Path, phantom_table: Path, tmp_path: Path) -> None:
    choices = [f"data.store={store}", "data.spacing_mm=null", "data.negatives_per_lesion=0"]
    overrides = ["+experiment=phantom_ntxent_mined", *choices, "trainer.max_steps=1"]
    pretrain(tiny_settings(phantom_table, tmp_path, *overrides, "loss.negatives=lesions", "contact_sheet_rows=1"))
    assert "train/negative_cosine" not in metrics_of(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.negatives_per_lesion=0 mines no negatives.*loss\.negatives=lesions"):
        tiny_settings(phantom_table, tmp_path, *overrides)


def test_another_spacing_than_the_stores_is_refused(store: Path, phantom_table: Path, tmp_path: Path) -> None:
    overrides = ["+experiment=phantom_ntxent_mined", f"data.store={store}", "data.spacing_mm=1", "trainer.max_steps=1"]
    with pytest.raises(ConfigError, match=r"data\.spacing_mm=1, but .* was prepared with 1\.5"):
        pretrain(tiny_settings(phantom_table, tmp_path, *overrides))
