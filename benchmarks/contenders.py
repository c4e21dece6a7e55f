"""What lidc.py and sarcoma.py share: a command line of train.py, composed and trained on patches in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import lightning as L
import numpy as np
from hydra import compose, initialize_config_dir
from lidc_data import PREPROCESSING
from measure import REPO
from torch import Tensor, nn

from fmcib_ssl.data import LesionDataModule
from fmcib_ssl.data.loader import PatchPairs
from fmcib_ssl.evaluation import encode
from fmcib_ssl.training import Settings, build_module, build_views, read_settings
from fmcib_ssl.types import Array


@cache
def composed(*overrides: str) -> Settings:
    """The settings of a command line of train.py that needs no store and writes no run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(REPO / "configs")):
        return read_settings(compose("train", ["data.store=none", "paths.run=none", *overrides]))


def what_decides(settings: Settings, kind: Literal["trained", "random"]) -> dict[str, Any]:
    """The sections that decide what an encoder becomes; as it is initialised, its own alone."""
    values = settings.model_dump(mode="json")
    parts = ("augment", "data", "encoder", "head", "loss", "method", "optimizer", "schedule", "trainer")
    return {name: values[name] for name in (parts if kind == "trained" else ("encoder",))}


def pretrained(settings: Settings, patches: PatchPairs, num_steps: int, accelerator: str = "cpu") -> nn.Module:
    """Train an encoder as `train.py` does with these settings, on patches that lie in memory."""
    for library in ("lightning.pytorch", "lightning.fabric", "fmcib_ssl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch")
    batch_size = settings.data.batch_size
    assert isinstance(batch_size, int)
    data = LesionDataModule(patches, build_views(settings), batch_size=batch_size, seed=settings.seed)
    module = build_module(settings, PREPROCESSING, batch_size, num_steps)
    trainer = L.Trainer(
        accelerator=accelerator, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, max_steps=num_steps, max_epochs=-1,
        gradient_clip_val=settings.trainer.gradient_clip_val,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module.encoder


def embedded(encoder: nn.Module, *patches: Tensor) -> list[Array]:
    """Features of int16 HU patches, the mean over a patch and its mirror images, float32 `(n, dim)` each."""
    encoder.cpu().eval()

    def of(some: Sequence[Tensor]) -> Array:
        return np.concatenate([encode(encoder, one, PREPROCESSING, views=8).numpy() for one in some])

    return [of(some.split(128)) for some in patches]
