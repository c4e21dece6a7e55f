"""Runs small enough for a test, put together as `train.py` does it, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.phantom import make_archive
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.data.store import StoreSettings
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.settings import Settings

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"
NUM_SCANS = 4

#: A step takes a fraction of a second, whatever the encoder.
TINY = [
    "hardware=cpu",
    "hardware.num_workers=0",
    "data.patch_size=[16,16,16]",
    "data.batch_size=2",
    "contact_sheet_rows=0",
    "callbacks.progress.refresh_rate=0",
]


class Watch(L.Callback):
    """Put into a run by its configuration; keeps the module, and its weights before the first step."""

    latest: Watch
    module: L.LightningModule
    first_weights: dict[str, Tensor]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Watch.latest = self
        self.module = pl_module
        self.first_weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


WATCH = f"+callbacks.watch._target_={__name__}.Watch"


def tiny_store(folder: Path, table: Path | None = None) -> Path:
    """A store of 1.5 mm of a phantom archive, by default one of six lesions in four scans that is made beside it."""
    table = table or make_archive(folder.with_name("archive"), NUM_SCANS, progress=False)
    prepare_store(read_annotations(table), folder, StoreSettings(spacing_mm=1.5), num_workers=0)
    return folder


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", list(overrides))


def tiny_settings(phantom_table: Path, run: Path, *overrides: str) -> Settings:
    """Settings of a tiny run in folder `run` on the phantom archive that `phantom_table` is the table of."""
    choices = [override for override in overrides if override.startswith("+experiment=")]
    if composed(*choices).data.phantom is None:
        data = [f"data.annotations={phantom_table}"]
    else:
        data = [f"data.phantom.folder={phantom_table.parent}", f"data.phantom.num_scans={NUM_SCANS}"]
    return read_settings(composed(*TINY, *data, f"paths.data={phantom_table.parent}", f"paths.run={run}", *overrides))


def metrics_of(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "metrics.csv")


def checkpoint_of(run: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


def assert_equal_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
