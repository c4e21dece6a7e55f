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


def test_a_run_from_a_store(store: Path, phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [f"data.store={store}", "data.spacing_mm=null", "data.negatives_per_lesion=3", "data.mining=near"]
    overrides = ["+experiment=phantom_ntxent_mined", *data, "trainer.max_steps=2", "contact_sheet_rows=2"]
    with caplog.at_level("INFO", logger="fmcib_ssl"):
        pretrain(tiny_settings(phantom_table, tmp_path, *overrides))
    assert len(metrics_of(tmp_path)) == 2
    assert (tmp_path / "contact_sheet.png").is_file()
    assert f"from store {store}" in caplog.text
    assert fmcib_ssl.load_encoder(tmp_path / "encoder.safetensors").preprocessing.spacing_mm == 1.5
    with pytest.raises(ConfigError, match=r"data\.spacing_mm=1, but .* was prepared with 1\.5"):
        pretrain(tiny_settings(phantom_table, tmp_path / "other", *overrides, "data.spacing_mm=1"))


def test_no_negatives_are_mined_for_plain_simclr(store: Path, phantom_table: Path, tmp_path: Path) -> None:
    data = [f"data.store={store}", "data.spacing_mm=null", "data.negatives_per_lesion=0"]
    overrides = ["+experiment=phantom_ntxent_mined", *data, "trainer.max_steps=1"]
    pretrain(tiny_settings(phantom_table, tmp_path, *overrides, "loss.negatives=lesions"))
    assert "train/negative_cosine" not in metrics_of(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.negatives_per_lesion=0 mines no negatives.*loss\.negatives=lesions"):
        tiny_settings(phantom_table, tmp_path, *overrides)
