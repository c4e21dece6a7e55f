"""A run that hangs, and two ranks of which one never joins a collective."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tiny_trainer import on_two_ranks, tiny_trainer
from torch import nn
from torch.utils.data import DataLoader

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


def fit(watchdog: Watchdog, seconds: float) -> list[int]:
    ends: list[int] = []
    fit_module(watchdog, Sleeper(seconds), ends)
    return ends


def fit_module(watchdog: Watchdog, module: Sleeper, ends: list[int]) -> None:
    """The codes with which the watchdog would have ended the process are put into `ends`."""
    watchdog._end, watchdog._tick_s = ends.append, 0.05
    tiny_trainer(watchdog, max_steps=4).fit(module, DataLoader(torch.ones(8, 1), batch_size=1))


def test_a_hang_says_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL):
        assert fit(Watchdog(tmp_path / "stalls", timeout_s=0.5, grace_s=0), 2.0) == [EXIT_CODE]
    text = (tmp_path / "stalls" / "rank-0.txt").read_text()
    assert "step 2, epoch 0: computes batch 2" in text and "a_layer_that_hangs" in text
    assert "callbacks.watchdog.timeout_s" in caplog.text and str(tmp_path / "stalls") in caplog.text


def test_the_end_of_another_rank_does_not_cut_the_report_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all states are there another rank may be the first to end, and the collective that waits for it fails."""

    class CutOff(Sleeper):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            time.sleep(1.0)
            raise RuntimeError("Connection closed by peer")

    def wait_for_others(*_: object) -> list[int]:
        time.sleep(1.0)
        return []

    ends: list[int] = []
    watchdog = Watchdog(tmp_path / "stalls", timeout_s=0.5)
    monkeypatch.setattr(watchdog, "_wait_for_others", wait_for_others)
    with pytest.raises(RuntimeError, match="closed by peer"):
        fit_module(watchdog, CutOff(0), ends)
    assert ends == [EXIT_CODE]


def test_slow_steps_are_no_hang(tmp_path: Path) -> None:
    assert fit(Watchdog(tmp_path / "stalls", timeout_s=1.5), 0.7) == []
    assert fit(Watchdog(tmp_path / "stalls", timeout_s=None), 0.1) == []
    assert not (tmp_path / "stalls").exists()


def computes(seconds: float, folder: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def writes(seconds: float, folder: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        (folder / "file").write_bytes(bytes(2**18))
        time.sleep(0.1)


def lets_a_child_compute(seconds: float, folder: Path) -> None:
    code = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("work", [computes, writes, lets_a_child_compute])
def test_what_computes_or_writes_is_not_idle(
    work: Callable[[float, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "a_layer_that_hangs", lambda seconds: work(seconds, tmp_path))
    assert fit(Watchdog(tmp_path / "stalls", idle_s=1.0), 3.0) == []


def test_what_waits_is_idle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fit(Watchdog(tmp_path / "stalls", idle_s=1.0, grace_s=0), 3.0) == [EXIT_CODE]
    assert "nothing was computed, read or written for 1 s" in (tmp_path / "stalls" / "rank-0.txt").read_text()
    assert "callbacks.watchdog.idle_s" in caplog.text


@pytest.mark.parametrize(("is_reading", "ends"), [(True, [EXIT_CODE]), (False, [])])
def test_of_several_ranks_one_is_idle_only_over_its_own_data(is_reading: bool, ends: list[int], tmp_path: Path) -> None:
    """Elsewhere it may wait for another, as long as a collective may."""
    watchdog, found = Watchdog(tmp_path, idle_s=0.5, grace_s=0), list[int]()
    watchdog._end, watchdog._tick_s = found.append, 0.05
    loader = SimpleNamespace(is_reading=is_reading)
    trainer: Any = SimpleNamespace(
        world_size=2, global_rank=1, global_step=0, current_epoch=0, is_global_zero=False, train_dataloader=loader
    )
    watchdog.on_train_start(trainer, None)  # type: ignore[arg-type]
    time.sleep(2)
    watchdog.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    assert found == ends


def test_a_suspended_process_does_not_count() -> None:
    """SIGSTOP and SIGCONT, as a scheduler that suspends a job: only ticks that were lived through count."""
    code = (
        "import lightning as L, sys; sys.path.insert(0, {here!r}); import test_watchdog as t; "
        "print('start', flush=True); print(t.fit(t.Watchdog({folder!r}, timeout_s=3.0), 1.5))"
    ).format(here=str(Path(__file__).parent), folder="unused-stalls")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "start"
    time.sleep(1.0)
    os.kill(process.pid, 19)
    time.sleep(4.0)
    os.kill(process.pid, 18)
    assert process.stdout.read().strip().endswith("[]")
    assert process.wait(250) == 0


RANK = """
import logging, test_watchdog as t
logging.basicConfig(level=logging.INFO)

class Late(t.Sleeper):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2 and self.global_rank == 1:
            t.a_layer_that_hangs(600)  # the other waits for it in the reduction of the gradient
        return self.net(batch).mean()

watchdog = t.Watchdog({folder!r}, timeout_s=3.0, grace_s=10)
watchdog._tick_s = 0.1
trainer = t.tiny_trainer(watchdog, devices=2, strategy="ddp", max_steps=4)
trainer.fit(Late(0), t.DataLoader(t.torch.ones(16, 1), batch_size=1))
"""


def test_two_ranks_of_which_one_never_comes(tmp_path: Path) -> None:
    ranks = on_two_ranks(RANK.format(folder=str(tmp_path)))
    assert [code for code, _ in ranks] == [EXIT_CODE, EXIT_CODE], ranks
    texts = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert "a_layer_that_hangs" in texts[1] and "a_layer_that_hangs" not in texts[0]
    assert all("step 2, epoch 0: computes batch 2" in text for text in texts)
    assert "no step was finished for 3 s" in ranks[0][1]


@pytest.mark.parametrize("arguments", [{"timeout_s": 0}, {"idle_s": 0}, {"grace_s": -1}])
def test_settings_that_make_no_sense(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Watchdog(tmp_path, **arguments)
