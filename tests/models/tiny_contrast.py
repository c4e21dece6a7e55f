"""A module small enough to compare every gradient of, its data and its losses: shared by the tests of the methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.losses import InfoNCELoss, NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast, Parts
from fmcib_ssl.types import ViewPairs

#: Both losses with each choice of negatives, and a sum in place of a mean.
LOSSES = {
    f"{name}-{negatives}": partial(loss, **options, negatives=negatives)
    for name, loss, options in [
        ("ntxent", NTXentNegativeMinedLoss, {"temperature": 0.2}),
        ("infonce", InfoNCELoss, {"trainable_temperature": True}),
        ("infonce_sum", InfoNCELoss, {"reduction": "sum"}),
    ]
    for negatives in ("mined", "mined_and_lesions", "lesions")
    if name != "infonce_sum" or negatives == "mined_and_lesions"
}

SIDE = 6


def sgd(named_parameters: Any, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=lr)


def make_module(
    loss: nn.Module, norm: bool = False, *, optimizer: Any = sgd, schedule: Any = None, **options: Any
) -> MinedContrast:
    torch.manual_seed(0)
    norm_layer = nn.BatchNorm3d(4) if norm else nn.GroupNorm(2, 4)
    encoder = nn.Sequential(nn.Conv3d(1, 4, 3), norm_layer, nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten())
    parts = Parts(encoder, optimizer, schedule=schedule, head=nn.Linear(32, 8), loss=loss)
    return MinedContrast(parts, **options)


class FixedViews(Dataset[dict[str, Any]]):
    """Lesions whose views are random but always the same."""

    def __init__(self, num_lesions: int) -> None:
        self.views = torch.randn(num_lesions, 4, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pos0, pos1, neg0, neg1 = self.views[index]
        return {"positive": (pos0, pos1), "negative": (neg0, neg1)}


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=folder, **{**defaults, **options})


def a_batch(num_lesions: int = 3) -> ViewPairs:
    batch: ViewPairs = next(iter(DataLoader(FixedViews(num_lesions), batch_size=num_lesions)))
    return batch


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Every one of them, and none of nothing."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name} had no gradient: nothing was compared"
        torch.testing.assert_close(
            found[name], gradient, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
