"""A run that hangs, and two ranks of which one never joins a collective."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_trainer import on_two_ranks, tiny_trainer
from torch import nn
from torch.utils.data import DataLoader

from fmcib_ssl.training import watchdog
from fmcib_ssl.training.watchdog import EXIT_CODE, Watchdog


class Sleeper(L.LightningModule):
    """Its step 2 takes as long as it is told."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            a_layer_that_hangs(self.seconds)
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def a_layer_that_hangs(seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which the watchdog would have ended the process; a second of its is a twentieth of ours."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit  # of the thread that watches

    monkeypatch.setattr(watchdog, "_TICK_S", 0.05)
    monkeypatch.setattr(watchdog, "_GRACE_S", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    return codes


def fit(callback: Watchdog, module: L.LightningModule) -> None:
    tiny_trainer(callback, max_steps=4).fit(module, DataLoader(torch.ones(8, 1), batch_size=1))


def test_a_hang_says_where(ends: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL):
        fit(Watchdog(tmp_path / "stalls", timeout_s=0.5), Sleeper(2.0))
    assert ends == [EXIT_CODE]
    text = (tmp_path / "stalls" / "rank-0.txt").read_text()
    assert "step 2, epoch 0: computes batch 2" in text and "a_layer_that_hangs" in text
    assert "callbacks.watchdog.timeout_s" in caplog.text and str(tmp_path / "stalls") in caplog.text


def test_the_end_of_another_rank_does_not_cut_the_report_short(
    ends: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all states are there another rank may be the first to end, and the collective that waits for it fails."""

    class CutOff(Sleeper):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            time.sleep(1.0)
            raise RuntimeError("Connection closed by peer")

    callback = Watchdog(tmp_path / "stalls", timeout_s=0.5)
    monkeypatch.setattr(callback, "_wait_for_others", lambda _: time.sleep(1.0) or [])
    with pytest.raises(RuntimeError, match="closed by peer"):
        fit(callback, CutOff(0))
    assert ends == [EXIT_CODE]


def test_slow_steps_are_no_hang(ends: list[int], tmp_path: Path) -> None:
    fit(Watchdog(tmp_path / "stalls", timeout_s=1.5), Sleeper(0.7))
    fit(Watchdog(tmp_path / "stalls", timeout_s=None), Sleeper(0.1))
    assert ends == [] and not (tmp_path / "stalls").exists()


@pytest.mark.slow
def test_a_suspended_process_does_not_count() -> None:
    """SIGSTOP and SIGCONT, as a scheduler that suspends a job: only ticks that were lived through count."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_watchdog as t\n"
        "t.watchdog._TICK_S = 0.05; print('start', flush=True)\n"
        "t.fit(t.Watchdog('unused-stalls', timeout_s=3.0), t.Sleeper(1.5)); print('done')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "start"
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(process.pid, signal.SIGCONT)
    assert process.stdout.read().strip().endswith("done")
    assert process.wait(250) == 0


RANK = """
import logging, test_watchdog as t
logging.basicConfig(level=logging.INFO)

class Late(t.Sleeper):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2 and self.global_rank == 1:
            t.a_layer_that_hangs(600)  # the other waits for it in the reduction of the gradient
        return self.net(batch).mean()

t.watchdog._TICK_S = 0.1
trainer = t.tiny_trainer(t.Watchdog({folder!r}, timeout_s=3.0), devices=2, strategy="ddp", max_steps=4)
trainer.fit(Late(0), t.DataLoader(t.torch.ones(16, 1), batch_size=1))
"""


def test_two_ranks_of_which_one_never_comes(tmp_path: Path) -> None:
    ranks = on_two_ranks(RANK.format(folder=str(tmp_path)))
    assert [code for code, _ in ranks] == [EXIT_CODE, EXIT_CODE], ranks
    texts = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "a_layer_that_hangs" in texts[1] and "a_layer_that_hangs" not in texts[0]
    assert all("step 2, epoch 0: computes batch 2" in text for text in texts)
    assert "no step was finished for 3 s" in ranks[0][1]


def test_no_time_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timeout_s=0"):
        Watchdog(tmp_path, timeout_s=0)
