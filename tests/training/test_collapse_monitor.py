"""Short runs that collapse, that solve their negatives, and that do neither: who is warned, of what, how often."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from tiny_trainer import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast, Parts
from fmcib_ssl.training import collapse_monitor
from fmcib_ssl.training.collapse_monitor import CollapseMonitor
from fmcib_ssl.training.loggers import MetricsFile

NUM_LESIONS, NUM_STEPS, DIM = 32, 60, 8


class Lesions(Dataset[dict[str, Any]]):
    """`(1, 4, 4, 4)` noise, a pattern a lesion; mined patches share one pattern, which sets them apart from lesions."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.patterns = torch.randn(NUM_LESIONS, 1, 4, 4, 4, generator=generator)
        self.noise = 0.2 * torch.randn(NUM_LESIONS, 4, 1, 4, 4, 4, generator=generator)

    def __len__(self) -> int:
        return NUM_LESIONS

    def __getitem__(self, index: int) -> dict[str, Any]:
        pos0, pos1 = self.patterns[index] + 1 + self.noise[index, :2]
        neg0, neg1 = self.noise[index, 2:] - 1
        return {"positive": (pos0, pos1), "negative": (neg0, neg1)}


class Collapsing(nn.Module):
    """Forgets its input a little more in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, DIM)
        self.register_buffer("left", torch.ones(()))

    def forward(self, views: Tensor) -> Tensor:
        self.left = self.left * 0.9
        return self.linear(views.flatten(1)) * self.left + 1


class TwoDirections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, views: Tensor) -> Tensor:
        return nn.functional.pad(self.linear(views.flatten(1)), (0, DIM - 2))


def healthy_encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, DIM))


def adam(named_parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameter for _, parameter in named_parameters], lr=lr)


def run(
    *callbacks: L.Callback,
    encoder: Callable[[], nn.Module] = healthy_encoder,
    negatives: str = "mined_and_lesions",
    lr: float = 3e-3,
    **options: Any,
) -> L.Trainer:
    torch.manual_seed(0)
    loss = NTXentNegativeMinedLoss(0.2, negatives=negatives)  # type: ignore[arg-type]
    module = MinedContrast(Parts(encoder(), partial(adam, lr=lr), loss=loss))
    trainer = tiny_trainer(*callbacks, **{"max_steps": NUM_STEPS, "max_epochs": -1, **options})
    trainer.fit(module, DataLoader(Lesions(), batch_size=16, drop_last=True))
    return trainer


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="fmcib_ssl.training.collapse_monitor")
    return lambda: [record.getMessage() for record in caplog.records if record.name.endswith("collapse_monitor")]


def test_a_healthy_run_is_left_in_peace(warnings_of: Callable[[], list[str]]) -> None:
    """Nor does the monitor change what it learns."""
    trainer, unwatched = run(CollapseMonitor()), run()
    metrics = trainer.callback_metrics
    assert warnings_of() == []
    assert metrics["signals/collapsed"] == metrics["signals/negatives_solved"] == 0
    assert metrics["train/rank"] > 4
    assert float(metrics["train/negative_share"]) == pytest.approx(
        float(metrics["train/mined_share"] + metrics["train/lesion_share"]), abs=1e-6
    )
    assert 0.05 < float(metrics["train/negative_share"]) < 1
    for name, value in unwatched.lightning_module.state_dict().items():
        assert torch.equal(trainer.lightning_module.state_dict()[name], value), name


def test_the_rank_is_logged_once_a_window(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path / "metrics.csv")
    run(CollapseMonitor(), max_steps=100, logger=logger)
    table = pd.read_csv(logger.path)
    assert table[["train/loss", "train/lesion_cosine"]].notna().all(axis=None)
    assert table["step"][table["train/rank"].notna()].tolist() == list(range(9, 100, 10))


def test_a_collapse_is_said_once_with_what_to_try(warnings_of: Callable[[], list[str]]) -> None:
    metrics = run(CollapseMonitor(), encoder=Collapsing).callback_metrics
    (message,) = warnings_of()
    assert "the embeddings have collapsed: two lesions have a cosine of 0.9" in message
    assert "lower loss.temperature" in message and "docs/while_training.md" in message
    assert metrics["signals/collapsed"] == 1


def test_a_collapse_onto_few_directions(warnings_of: Callable[[], list[str]]) -> None:
    run(CollapseMonitor(), encoder=TwoDirections)
    (message,) = warnings_of()
    assert "embeddings lie along 2.0 directions" in message or "along 1." in message


def test_solved_negatives_are_said_once_with_what_to_try(
    warnings_of: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collapse_monitor, "_MAX_LESION_COSINE", 1.0)
    monkeypatch.setattr(collapse_monitor, "_MIN_RANK", 0.0)
    metrics = run(CollapseMonitor(), negatives="mined", lr=0.02).callback_metrics
    (message,) = warnings_of()
    assert "the negatives are solved" in message and "loss.negatives=mined_and_lesions" in message
    assert metrics["signals/negatives_solved"] == 1
    assert metrics["train/negative_share"] == metrics["train/mined_share"] < 0.05
    # near the floor the share of the softmax is the loss itself, to first order
    assert float(metrics["train/mined_share"]) == pytest.approx(float(metrics["train/loss"]), rel=0.1)


def test_random_weights_are_not_judged(warnings_of: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse_monitor, "_MIN_RANK", 7.9)  # nearly the dimensions: every window would be warned of
    run(CollapseMonitor(window=NUM_STEPS))
    (message,) = warnings_of()
    assert message.startswith("step 20:")  # the end of the second window; one is a tenth of the run, ten steps at least


def test_a_method_without_negatives(warnings_of: Callable[[], list[str]]) -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Collapsing()

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            z0, z1 = (self.encoder(view) for view in batch["positive"])
            return {"loss": (z0 - z1).square().mean(), "embeddings": (z0.detach(), z1.detach())}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    trainer = tiny_trainer(CollapseMonitor(), max_steps=40, max_epochs=-1)
    trainer.fit(Plain(), DataLoader(Lesions(), batch_size=16))
    assert "train/negative_share" not in trainer.callback_metrics
    assert "choose a method with negatives" in warnings_of()[0]


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        CollapseMonitor(window=0)
