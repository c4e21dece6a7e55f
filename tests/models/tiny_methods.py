"""Every baseline on a network so small that a step takes milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.models import BYOL, NNCLR, DenoisingAutoencoder, Parts, SimCLR, SwAV, VICReg
from fmcib_ssl.models.two_views import TwoViews

SIDE = 6
FEATURES = 32
WIDTHS: dict[str, Any] = {"hidden_dim": 16, "out_dim": 8}

#: How each method is built in the tests, besides encoder and optimizer.
METHODS: dict[str, tuple[type[TwoViews], dict[str, Any]]] = {
    "simclr": (SimCLR, {"temperature": 0.3}),
    "nnclr": (NNCLR, {**WIDTHS, "queue_size": 10, "temperature": 0.3}),
    "swav": (SwAV, {**WIDTHS, "num_prototypes": 5, "queue_size": 6, "queue_from_epoch": 1, "frozen_epochs": 0}),
    "byol": (BYOL, {**WIDTHS, "momentum": 0.5}),
    "vicreg": (VICReg, WIDTHS),
    "denoising": (DenoisingAutoencoder, {"patch_size_zyx": [SIDE] * 3, "decoder_width": 8}),
}


def sgd(named_parameters: Any, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named_parameters if parameter.requires_grad], lr=lr)


def make_method(name: str, *, heads_with_norm: bool = True, optimizer: Any = sgd, **options: Any) -> Any:
    """A method with seeded weights; its heads without batch norm, if rows of a batch are not to know of each other."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten())
    method, defaults = METHODS[name]
    head = nn.Linear(FEATURES, 8) if "head" in method.sections else nn.Identity()
    module = method(Parts(encoder, optimizer, FEATURES, head=head), **{**defaults, **options})
    if not heads_with_norm:
        for parent in list(module.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm1d):
                    setattr(parent, child_name, nn.Identity())
    return module


class FixedViews(Dataset[dict[str, Any]]):
    """Lesions whose two views are random but always the same."""

    def __init__(self, num_lesions: int) -> None:
        self.views = torch.randn(num_lesions, 2, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"positive": (self.views[index, 0], self.views[index, 1]), "negative": (torch.empty(0), torch.empty(0))}


def a_batch(num_lesions: int = 4) -> dict[str, Any]:
    batch: dict[str, Any] = next(iter(DataLoader(FixedViews(num_lesions), batch_size=num_lesions)))
    return batch


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(default_root_dir=folder, accelerator="cpu", **{"max_epochs": 1, **quiet, **options})


class Recorder(L.Callback):
    """Keeps what was logged, and the weights after every step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def fitted(
    module: L.LightningModule, folder: Path, num_lesions: int = 4, batch_size: int = 4, **options: Any
) -> Recorder:
    recorder = Recorder()
    trainer = make_trainer(folder, callbacks=[recorder], **options)
    trainer.fit(module, DataLoader(FixedViews(num_lesions), batch_size=batch_size))
    return recorder
