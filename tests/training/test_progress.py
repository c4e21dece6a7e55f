"""What a run shows: one bar over all steps in a terminal, with the log above it; elsewhere a line now and then."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from fmcib_ssl.training import progress
from fmcib_ssl.training.progress import Progress
from fmcib_ssl.training.throughput import Throughput

STEP_SECONDS = 4.0
BATCHES = 5


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Talkative(L.LightningModule):
    """Each step takes seconds of a clock; the seventh says something and warns."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.clock.now += STEP_SECONDS
        if self.global_step == 6:
            logging.getLogger("fmcib_ssl").info("a line of the log")
            warnings.warn("a warning of a library", stacklevel=1)
        loss = (self.weight - 2).square().sum()
        self.log("train/loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def collate(items: list[torch.Tensor]) -> dict[str, Any]:
    return {"positive": (torch.stack(items), torch.stack(items))}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)

    def run(*, callback: Progress | None = None, **options: Any) -> None:
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_model_summary=False, callbacks=[Throughput(), callback or Progress()],
            **{"max_steps": 12, "max_epochs": -1, **options},
        )  # fmt: skip
        trainer.fit(Talkative(clock), DataLoader(torch.zeros(2 * BATCHES, 1), batch_size=2, collate_fn=collate))

    return run


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fmcib_ssl.training.progress"]


def test_a_log_gets_a_line_now_and_then(train: Any, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        train(max_steps=200)
    shown = lines(caplog)
    # 4 s a step: a line with the first, then after at least 10, 20, 40, 80, 160 and 300 s.
    assert [int(line.split("/")[0].split()[1]) for line in shown] == [1, 4, 9, 19, 39, 79, 154]
    assert shown[0].startswith("step 1/200, loss 4, ") and "left" not in shown[0]
    assert re.fullmatch(r"step 79/200, loss 4, \S+ lesions/s, \d+% waiting, 8 min left", shown[5])  # 121 steps: 484 s
    assert "\r" not in capfd.readouterr().out


def test_the_time_left_is_of_the_steps_that_are_left(train: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        train(max_epochs=100, max_steps=12)  # an epoch has 5: the steps are fewer
    assert [line.rpartition(", ")[2] for line in lines(caplog)][1:] == ["32 s left", "12 s left"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_bar_and_the_log_above_it(
    train: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("fmcib_ssl"), "level", logging.INFO)
    train()
    text = terminal.getvalue()
    assert "12/12" in text and "loss 4, " in text
    assert not lines(caplog)
    for message in ("a line of the log", "a warning of a library"):
        before = text[: text.index(message)].rpartition("\n")[2]
        assert "\r" in before and "%|" not in before.rpartition("\r")[2]  # the bar was wiped
    assert logging.root.handlers == [handler]


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_if_nothing_is_asked_for(
    terminal: bool, train: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with caplog.at_level(logging.INFO, "fmcib_ssl.training.progress"):
        train(callback=Progress(refresh_rate=0))
    assert not lines(caplog) and not out.getvalue()


def test_a_bar_is_closed_when_training_fails(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    handlers = list(logging.root.handlers)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Talkative, "on_train_batch_end", fail, raising=False)
    with pytest.raises(RuntimeError, match="no"):
        train()
    assert terminal.getvalue().endswith("\n") and logging.root.handlers == handlers
