"""Throughput against a clock that only the test moves."""

from __future__ import annotations

import logging
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.training import throughput
from fmcib_ssl.training.tracking import MetricsFile

BATCH, STEP_SECONDS, BETWEEN_EPOCHS = 2, 3.0, 1000.0
#: Reading takes longer from lesion to lesion.
READ_SECONDS = (0.5, 0.5, 2.0, 4.0, 1.0, 8.0)
NUM_BATCHES = len(READ_SECONDS) // BATCH
FLOPS = 7_000_000_000_000


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
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.clock.now += STEP_SECONDS
        return self.weight.sum()

    def on_train_epoch_end(self) -> None:
        self.clock.now += BETWEEN_EPOCHS  # what happens between epochs belongs to no step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name == "perf/samples_per_s":
            self.logged.append({})
        self.logged[-1][name] = float(value)


class Logging(SlowModule):
    """Logs as Lightning does."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        L.LightningModule.log(self, *args, **kwargs)


class Measured:
    """A run with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(throughput, "time", self.clock)
        self.module = SlowModule(self.clock)

    def train(self, folder: Path, *, window: int = 4, **options: Any) -> list[dict[str, float]]:
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            callbacks=[throughput.Throughput(window=window)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"log_every_n_steps": 1, **options},
        )
        trainer.fit(self.module, DataLoader(SlowViews(self.clock), batch_size=BATCH))
        return self.module.logged


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fmcib_ssl")]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


def waits(num_epochs: int) -> list[float]:
    return [sum(READ_SECONDS[i : i + BATCH]) for i in range(0, len(READ_SECONDS), BATCH)] * num_epochs


def test_the_mean_of_a_window(tmp_path: Path, measured: Measured) -> None:
    logged = measured.train(tmp_path, max_epochs=4)
    waited = waits(4)
    # Of every step of the first window, then of every second.
    steps = [i for i in range(len(waited)) if i < 4 or i % 2 == 1]
    for i, figures in zip(steps, logged, strict=True):
        # The first five steps are on their own: they warm up, and the window begins with the last of them.
        seen = waited[max(4, i - 3) : i + 1] if i >= 5 else [waited[i]]
        seconds = sum(seen) + STEP_SECONDS * len(seen)
        assert figures["perf/samples_per_s"] == pytest.approx(BATCH * len(seen) / seconds)
        assert figures["perf/data_wait_share"] == pytest.approx(sum(seen) / seconds)
        assert figures.keys() == {"perf/samples_per_s", "perf/data_wait_share", "perf/memory_gb"}  # nothing to count


@pytest.mark.parametrize("options", [{"log_every_n_steps": 5}, {"accumulate_grad_batches": 3}])
def test_rows_that_are_written_have_them(options: dict[str, int], tmp_path: Path, measured: Measured) -> None:
    rows = MetricsFile(tmp_path / "metrics.csv")
    callback = throughput.Throughput(window=4)
    module = Logging(measured.clock)
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[callback], logger=[rows], max_epochs=8, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **{"log_every_n_steps": 1, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(SlowViews(measured.clock), batch_size=BATCH))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert len(table) == (24 // 5 if "log_every_n_steps" in options else 8)
    assert table["perf/samples_per_s"].notna().all() and table["perf/data_wait_share"].notna().all()


def test_operations_on_each_device(tmp_path: Path, measured: Measured) -> None:
    measured.module.flops_per_lesion = FLOPS
    for figures in measured.train(tmp_path, max_epochs=2, accumulate_grad_batches=2):
        assert figures["perf/tflops"] == pytest.approx(7 * figures["perf/samples_per_s"])
        assert "perf/peak_share" not in figures  # no peak of a CPU is known


def test_two_devices_share_the_work() -> None:
    callback = throughput.Throughput()
    callback._steps.append((2.0, 0.5, 8))
    callback._flops_per_lesion, callback._peak = FLOPS, 112e12
    figures = callback.figures(world_size=2)  # 8 lesions on each in 2 s
    assert figures["perf/samples_per_s"] == 8
    assert figures["perf/tflops"] == pytest.approx(4 * 7)
    assert figures["perf/peak_share"] == pytest.approx(4 * 7 / 112)


def test_memory_is_what_the_kernel_says(tmp_path: Path, measured: Measured) -> None:
    logged = measured.train(tmp_path, max_epochs=1)
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc")
    most = int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    assert logged[-1]["perf/memory_gb"] == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_time_to_go(accumulate: int, tmp_path: Path, measured: Measured, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        measured.module.flops_per_lesion = FLOPS
        measured.train(tmp_path, max_epochs=200, accumulate_grad_batches=accumulate)
    lines = said(caplog)
    assert len(lines) == 2
    # The fifth batch is the second of the second epoch. Steps are slow, so it is told as soon as a minute has passed:
    # after the first batch of the third.
    waited = waits(1)
    passed = waited[2] + STEP_SECONDS + BETWEEN_EPOCHS + waited[0] + STEP_SECONDS
    told_after, steps_done = 7, {1: 7, 2: 4}[accumulate]  # an epoch is a step of two batches and one of one
    steps = 200 * -(-NUM_BATCHES // accumulate)
    seconds = passed / (told_after - 5) * (steps - steps_done) * NUM_BATCHES / -(-NUM_BATCHES // accumulate)
    hours = round(seconds / 3600)
    assert f"about {hours // 24} d {hours % 24} h for the {steps - steps_done} steps that are left, until" in lines[0]
    assert "TFLOP/s on each device, " in lines[0] and "of the time waiting for data" in lines[0]
    assert "to wait less" in lines[1]


@pytest.mark.parametrize(
    ("num_workers", "wait", "cores", "devices", "wanted"),
    [
        (0, 0.2, 8, 1, 1),  # loading takes a quarter of the rest
        (0, 0.75, 8, 1, 3),  # three times the rest
        (2, 0.5, 8, 1, 4),  # two workers are half as fast as the device
        (2, 0.99, 8, 1, 7),  # a core is left for training
        (4, 0.9, 8, 2, None),  # three for each device, and there are four
    ],
)
def test_the_number_of_workers_that_helps(
    num_workers: int, wait: float, cores: int, devices: int, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "num_cores", lambda: cores)
    trainer: Any = SimpleNamespace(train_dataloader=SimpleNamespace(num_workers=num_workers), num_devices=devices)
    expected = f"hardware.num_workers={wanted}" if wanted else f"more cores: all {cores} are in use"
    assert throughput._remedies(trainer, wait) == [expected]


def test_a_later_start_tells_again(tmp_path: Path, measured: Measured, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        for _ in range(2):
            measured.train(tmp_path, max_epochs=5)
    assert sum(line.startswith("pace") for line in said(caplog)) == 2


def test_a_short_run_is_not_told(tmp_path: Path, measured: Measured, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        measured.train(tmp_path, max_epochs=1)
    assert not said(caplog)


def test_durations() -> None:
    texts = ["1 s", "99 s", "2 min", "99 min", "1 h 40 min", "5 h 20 min", "47 h 59 min", "2 d 0 h", "4 d 4 h"]
    seconds = [0.2, 99, 100, 5969, 5975, 19200, 172740, 172800, 360000]
    assert [throughput.duration(value) for value in seconds] == texts
    # From one text to the next, time goes on.
    assert all(a < b for a, b in pairwise(seconds))


def test_the_day_is_named_if_it_is_another() -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=500, global_step=80)
    assert throughput._time_to_go(trainer, float("inf")) == "no end is set"
    later = throughput._time_to_go(trainer, 3 * 86400)
    assert later.startswith("about 3 d 0 h for the 420 steps that are left, until ")
    day = datetime.fromtimestamp(datetime.now().timestamp() + 3 * 86400)
    assert f"{day:%a %d %b}" in later


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        throughput.Throughput(window=0)
