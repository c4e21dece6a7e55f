"""Throughput against a clock that only the test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.training import throughput

BATCH, STEP_SECONDS = 2, 3.0
#: Reading takes longer from lesion to lesion.
READ_SECONDS = (0.5, 0.5, 2.0, 4.0, 1.0, 8.0)


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class SlowViews(Dataset[dict[str, Any]]):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return len(READ_SECONDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.clock.now += READ_SECONDS[index]
        return {"positive": (torch.zeros(1), torch.zeros(1))}


class SlowModule(L.LightningModule):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.ones(1))
        self.logged: list[tuple[float, float]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.clock.now += STEP_SECONDS
        return self.weight.sum()

    def on_train_epoch_end(self) -> None:
        self.clock.now += 1000.0  # what happens between epochs belongs to no step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name == "perf/samples_per_s":
            self.logged.append((float(value), float("nan")))
        elif name == "perf/data_wait_share":
            self.logged[-1] = (self.logged[-1][0], float(value))


def test_lesions_per_second_and_share_of_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    module = SlowModule(clock)
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        callbacks=[throughput.Throughput()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(SlowViews(clock), batch_size=BATCH))
    waits = [sum(READ_SECONDS[i : i + BATCH]) for i in range(0, len(READ_SECONDS), BATCH)] * 2
    expected = [(BATCH / (wait + STEP_SECONDS), wait / (wait + STEP_SECONDS)) for wait in waits]
    assert module.logged == [pytest.approx(pair) for pair in expected]
