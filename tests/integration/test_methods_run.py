"""Each method on the way of `train.py`: it trains, exports, and goes on from where it was interrupted."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tiny_runs import assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

import fmcib_ssl
from fmcib_ssl.run import pretrain
from fmcib_ssl.training.build import refuse_unused
from fmcib_ssl.training.settings import ConfigError

BASELINES = ["simclr", "nnclr", "swav", "byol", "vicreg", "denoising"]
OPTIONS = ["+experiment=phantom_ntxent_mined", "data.negatives_per_lesion=0", "optimizer.base_lr=0.1"]


def run_method(name: str, table: Path, run: Path, *overrides: str) -> Path:
    small = [f"method.{key}={value}" for key, value in SMALL.get(name, {}).items()]
    pretrain(tiny_settings(table, run, *OPTIONS, f"method={name}", *small, *overrides))
    return run


SMALL: dict[str, dict[str, int]] = {
    "nnclr": {"queue_size": 4},
    "swav": {"queue_size": 2, "queue_from_epoch": 1, "num_prototypes": 4},
}


@pytest.mark.parametrize(
    "name", [*BASELINES[:2], *BASELINES[4:], *(pytest.param(name, marks=pytest.mark.slow) for name in BASELINES[2:4])]
)
def test_two_steps_and_an_encoder(name: str, phantom_table: Path, tmp_path: Path) -> None:
    run = run_method(name, phantom_table, tmp_path, "trainer.max_steps=2")
    assert metrics_of(run)["train/loss"].notna().sum() == 2
    weights = fmcib_ssl.load_encoder(run / "encoder.safetensors").state_dict()
    online = {key: value for key, value in checkpoint_of(run)["state_dict"].items() if key.startswith("encoder.")}
    assert_equal_weights({f"encoder.{key}": value for key, value in weights.items()}, online)


class PowerCut(L.Callback):
    """Put into a run by its configuration; stops it in the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise ConnectionError("power cut")


@pytest.mark.parametrize(
    "name", ["nnclr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("swav", "byol", "denoising"))]
)
def test_going_on_is_as_if_never_interrupted(name: str, phantom_table: Path, tmp_path: Path) -> None:
    epochs = "trainer.max_epochs=2"
    whole = run_method(name, phantom_table, tmp_path / "whole", epochs)
    with pytest.raises(ConnectionError):
        run_method(name, phantom_table, tmp_path / "cut", epochs, f"+callbacks.cut._target_={__name__}.PowerCut")
    cut = run_method(name, phantom_table, tmp_path / "cut", epochs)
    assert checkpoint_of(cut)["global_step"] == checkpoint_of(whole)["global_step"]
    assert_equal_weights(checkpoint_of(cut)["state_dict"], checkpoint_of(whole)["state_dict"])


def test_vicreg_and_what_it_does_without(phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run_method("vicreg", phantom_table, tmp_path, "trainer.max_steps=1", "data.negatives_per_lesion=1")
    assert "VICReg does not look at mined negatives: data.negatives_per_lesion=0" in caplog.text
    assert "VICReg does not use the sections head, loss" in caplog.text
    with pytest.raises(ConfigError, match=r"VICReg compares the lesions.*data\.batch_size to 2"):
        run_method("vicreg", phantom_table, tmp_path / "alone", "data.batch_size=1")


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("loss.temperature=0.2", True),
        ("loss=infonce", True),
        ("+loss.margin=1", True),
        ("~loss", True),
        ("head.out_dim=4", False),
        ("+experiment=phantom_infonce", False),
        ("optimizer.base_lr=1", False),
    ],
)
def test_what_would_have_no_effect_is_refused(override: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hydra: Any = OmegaConf.create({"overrides": {"task": ["method=simclr", override]}})
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    section = {"_target_": "fmcib_ssl.models.SimCLR", "temperature": 0.1}
    with pytest.raises(ConfigError, match=r"method\.temperature") if is_refused else nullcontext():
        refuse_unused(["loss"], "SimCLR", "method", section)
