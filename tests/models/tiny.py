"""Every method on a network so small that a step takes milliseconds, its data, losses and trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.losses import InfoNCELoss, NTXentNegativeMinedLoss
from fmcib_ssl.models import BYOL, NNCLR, DenoisingAutoencoder, MinedContrast, Parts, Pretraining, SimCLR, SwAV, VICReg

SIDE = 6
FEATURES = 32
WIDTHS: dict[str, Any] = {"hidden_dim": 16, "out_dim": 8}

#: How each method is built in the tests, besides its parts.
METHODS: dict[str, tuple[type[Pretraining], dict[str, Any]]] = {
    "mined_contrast": (MinedContrast, {}),
    "simclr": (SimCLR, {"temperature": 0.3}),
    "nnclr": (NNCLR, {**WIDTHS, "queue_size": 10, "temperature": 0.3}),
    "swav": (SwAV, {**WIDTHS, "num_prototypes": 5, "queue_size": 6, "queue_from_epoch": 1, "frozen_epochs": 0}),
    "byol": (BYOL, {**WIDTHS, "momentum": 0.5}),
    "vicreg": (VICReg, WIDTHS),
    "denoising": (DenoisingAutoencoder, {"patch_size_zyx": [SIDE] * 3, "decoder_width": 8}),
}
#: Both losses with each choice of negatives, and a sum in place of a mean.
LOSSES = {
    f"{name}-{negatives}": partial(loss, **options, negatives=negatives, gather_distributed=True)
    for name, loss, options in [
        ("ntxent", NTXentNegativeMinedLoss, {"temperature": 0.2}),
        ("infonce", InfoNCELoss, {"trainable_temperature": True}),
        ("infonce_sum", InfoNCELoss, {"reduction": "sum"}),
    ]
    for negatives in ("mined", "mined_and_lesions", "lesions", "mined_of_others")
    if name != "infonce_sum" or negatives == "mined_and_lesions"
}


def sgd(named_parameters: Any, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in named_parameters if parameter.requires_grad], lr=lr)


def make_method(
    name: str,
    *,
    loss: nn.Module | None = None,
    norm: bool = False,
    heads_with_norm: bool = True,
    optimizer: Any = sgd,
    schedule: Any = None,
    **options: Any,
) -> Any:
    """A method with seeded weights; its heads without batch norm, if rows of a batch are not to know of each other."""
    torch.manual_seed(0)
    norm_layer = nn.BatchNorm3d(4) if norm else nn.GroupNorm(2, 4)
    encoder = nn.Sequential(nn.Conv3d(1, 4, 3), norm_layer, nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten())
    method, defaults = METHODS[name]
    head = nn.Linear(FEATURES, 8) if "head" in method.sections else nn.Identity()
    parts = Parts(encoder, optimizer, FEATURES, schedule, head, loss or LOSSES["ntxent-mined_and_lesions"]())
    module = method(parts, **{**defaults, **options})  # type: ignore[call-arg]
    if not heads_with_norm:
        for parent in list(module.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm1d):
                    setattr(parent, child_name, nn.Identity())
    return module


def make_module(loss: nn.Module, **options: Any) -> Any:
    """Mined contrast, whose steps at rate 1 change each weight by its gradient."""
    return make_method("mined_contrast", loss=loss, **{"optimizer": partial(sgd, lr=1.0), **options})


class FixedViews(Dataset[dict[str, Any]]):
    """Lesions whose views, and those of a negative each, are random but always the same."""

    def __init__(self, num_lesions: int) -> None:
        self.views = torch.randn(num_lesions, 4, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pos0, pos1, neg0, neg1 = self.views[index]
        return {"positive": (pos0, pos1), "negative": (neg0, neg1)}


def a_batch(num_lesions: int = 4) -> Any:
    return next(iter(DataLoader(FixedViews(num_lesions), batch_size=num_lesions)))


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, **quiet}
    return L.Trainer(default_root_dir=folder, **{**defaults, **options})


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
    trainer = make_trainer(folder, **{**options, "callbacks": [*options.get("callbacks", []), recorder]})
    trainer.fit(module, DataLoader(FixedViews(num_lesions), batch_size=batch_size))
    return recorder


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Every one of them, and none of nothing."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name} had no gradient: nothing was compared"
        torch.testing.assert_close(
            found[name], gradient, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
