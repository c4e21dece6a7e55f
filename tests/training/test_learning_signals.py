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
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast
from fmcib_ssl.training.learning_signals import LearningSignals

NUM_LESIONS, NUM_STEPS, DIM = 32, 60, 8
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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
        self.left *= 0.9
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
    folder: Path,
    encoder: Callable[[], nn.Module] = healthy_encoder,
    negatives: str = "mined_and_lesions",
    lr: float = 3e-3,
    **arguments: Any,
) -> L.Trainer:
    torch.manual_seed(0)
    loss = NTXentNegativeMinedLoss(0.2, negatives=negatives)  # type: ignore[arg-type]
    module = MinedContrast(encoder(), nn.Identity(), loss, partial(adam, lr=lr))
    watch = [LearningSignals(**arguments)]
    trainer = L.Trainer(default_root_dir=folder, max_steps=NUM_STEPS, callbacks=watch, **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(Lesions(), batch_size=16, drop_last=True))
    return trainer


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="fmcib_ssl.training.learning_signals")
    return lambda: [record.getMessage() for record in caplog.records if record.name.endswith("learning_signals")]


def test_a_healthy_run_is_left_in_peace(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    metrics = run(tmp_path).callback_metrics
    assert warnings_of() == []
    assert metrics["signals/collapsed"] == metrics["signals/negatives_solved"] == 0
    assert metrics["train/rank"] > 4
    assert float(metrics["train/negative_share"]) == pytest.approx(
        float(metrics["train/mined_share"] + metrics["train/lesion_share"]), abs=1e-6
    )
    assert 0.05 < float(metrics["train/negative_share"]) < 1


def test_a_long_run_has_them_twenty_times_a_window(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loss = NTXentNegativeMinedLoss(0.2, negatives="mined_and_lesions")
    module = MinedContrast(healthy_encoder(), nn.Identity(), loss, partial(adam, lr=3e-3))
    logger = CSVLogger(tmp_path)
    options = {**QUIET, "logger": logger, "log_every_n_steps": 1}
    trainer = L.Trainer(default_root_dir=tmp_path, max_steps=400, callbacks=[LearningSignals()], **options)
    trainer.fit(module, DataLoader(Lesions(), batch_size=16, drop_last=True))
    table = pd.read_csv(Path(logger.log_dir) / "metrics.csv")
    assert table["train/loss"].notna().all()
    assert table["step"][table["train/lesion_cosine"].notna()].tolist() == list(range(1, 400, 2))  # windows of 40
    assert table["step"][table["train/rank"].notna()].tolist() == list(range(39, 400, 40))


def test_a_collapse_is_said_once_with_what_to_try(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    metrics = run(tmp_path, Collapsing).callback_metrics
    (message,) = warnings_of()
    assert "the embeddings have collapsed: two random lesions have a cosine of 0.9" in message
    assert "lower loss.temperature" in message
    assert "docs/while_training.md" in message
    assert metrics["signals/collapsed"] == 1


def test_a_collapse_onto_few_directions(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    run(tmp_path, TwoDirections)
    assert len(warnings_of()) == 1
    assert "embeddings lie along 2.0 directions" in warnings_of()[0] or "along 1." in warnings_of()[0]


def test_solved_negatives_are_said_once_with_what_to_try(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    metrics = run(tmp_path, negatives="mined", lr=0.02, max_lesion_cosine=1.0, min_rank=0).callback_metrics
    (message,) = warnings_of()
    assert "the negatives are solved" in message
    assert "loss.negatives=mined_and_lesions" in message
    assert metrics["signals/negatives_solved"] == 1
    assert metrics["train/negative_share"] == metrics["train/mined_share"] < 0.05


def test_the_share_is_what_the_loss_says(tmp_path: Path) -> None:
    """Near the floor the share of the softmax is the loss itself, to first order."""
    metrics = run(tmp_path, negatives="mined", lr=0.02).callback_metrics
    assert float(metrics["train/mined_share"]) == pytest.approx(float(metrics["train/loss"]), rel=0.1)


def test_random_weights_are_not_judged(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    run(tmp_path, window=NUM_STEPS, min_rank=20.0)  # more than there are dimensions: every window would be warned of
    (message,) = warnings_of()
    assert message.startswith("step 20:")  # the end of the second window; one is a tenth of the run, ten steps at least


def test_a_method_without_negatives(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    class Aligned(MinedContrast):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output: Any = super().training_step(batch, batch_idx)
            z0, z1 = output["embeddings"]
            return {"loss": output["loss"], "embeddings": (z0, z1)}

    module = Aligned(Collapsing(), nn.Identity(), NTXentNegativeMinedLoss(), partial(adam, lr=1e-3))
    module.loss.negatives = "lesions"  # type: ignore[assignment]
    del module.loss.temperature
    module.contrast = lambda out: (out["positive"][0] - out["positive"][1]).square().mean()  # type: ignore[method-assign]
    trainer = L.Trainer(default_root_dir=tmp_path, max_steps=40, callbacks=[LearningSignals()], **QUIET)
    trainer.fit(module, DataLoader(Lesions(), batch_size=16))
    assert "train/negative_share" not in trainer.callback_metrics
    assert "choose a method with negatives" in warnings_of()[0]


def test_watching_does_not_change_what_is_learned(tmp_path: Path) -> None:
    watched = run(tmp_path).lightning_module.state_dict()
    torch.manual_seed(0)
    loss = NTXentNegativeMinedLoss(0.2, negatives="mined_and_lesions")
    module = MinedContrast(healthy_encoder(), nn.Identity(), loss, partial(adam, lr=3e-3))
    trainer = L.Trainer(default_root_dir=tmp_path, max_steps=NUM_STEPS, **QUIET)
    trainer.fit(module, DataLoader(Lesions(), batch_size=16, drop_last=True))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(watched[name], value, rtol=0, atol=0)


NONSENSE = [
    ({"window": 0}, "window=0"),
    ({"max_lesion_cosine": 2.0}, "max_lesion_cosine=2.0"),
    ({"min_negative_share": 1.0}, "min_negative_share=1.0"),
]


@pytest.mark.parametrize(("arguments", "message"), NONSENSE)
def test_numbers_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningSignals(**arguments)
