"""What a run shows while it trains: a bar in a terminal, a line every so often anywhere else."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fmcib_ssl.training.throughput import Throughput, duration

logger = logging.getLogger(__name__)

#: The first line comes with the first step, the next so many seconds later, then after twice as long each time, ...
_FIRST_INTERVAL_S = 10.0
#: ... but never later than this.
_LONGEST_INTERVAL_S = 300.0
#: Steps that start the workers and choose kernels: the time left is not judged by them.
_WARM_UP = 3


class Progress(ProgressBar):
    """Shows step, loss, lesions a second, the share of waiting and the time left, on the main process only.

    In a terminal it is a bar over all steps of the run, and the log goes above it. Otherwise (a pipe, Slurm's file) it
    is a line of the log: at the first step, then after 10 s, 20 s, 40 s, up to every 5 minutes.

    Args:
        refresh_rate: steps between updates of the bar; 0: show nothing, neither bar nor lines.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._bar: tqdm[Any] | None = None
        self._open = ExitStack()
        self._active = False
        self._total = math.inf
        self._began: tuple[float, int] = (0.0, 0)  # when, and at which step, the time left is measured from
        self._first_step = 0
        self._interval_s = 0.0
        self._next_line = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to show."""
        self._active = self._refresh_rate > 0
        self._total = trainer.estimated_stepping_batches
        self._first_step = trainer.global_step
        self._began = (time.monotonic(), trainer.global_step)
        self._interval_s, self._next_line = _FIRST_INTERVAL_S / 2, 0.0
        if self._active and sys.stdout.isatty():
            total = int(self._total) if math.isfinite(self._total) else None
            self._bar = self._open.enter_context(
                tqdm(total=total, initial=trainer.global_step, unit="step", file=sys.stdout, dynamic_ncols=True)
            )
            self._open.enter_context(logging_redirect_tqdm())
            self._open.enter_context(_warnings_in_the_log())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what is due after a step."""
        step, now = trainer.global_step, time.monotonic()
        if step <= self._first_step + _WARM_UP and step > self._began[1]:
            self._began = (now, step)
        if not self._active:
            return
        if self._bar is not None:
            if (moved := step - self._bar.n) >= self._refresh_rate or step >= self._total:
                self._bar.set_postfix_str(", ".join(self._figures(trainer)), refresh=False)
                self._bar.update(moved)
        elif now >= self._next_line and step > self._first_step:
            self._interval_s = min(2 * self._interval_s, _LONGEST_INTERVAL_S)
            self._next_line = now + self._interval_s
            total = f"/{self._total:.0f}" if math.isfinite(self._total) else ""
            logger.info("%s", ", ".join([f"step {step}{total}", *self._figures(trainer), *self._left(step, now)]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        self._open.close()
        self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is, so that what is said next stands below it."""
        self.on_train_end(trainer, pl_module)

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all processes but the main one."""
        self._refresh_rate = 0

    def _figures(self, trainer: L.Trainer) -> list[str]:
        loss = trainer.callback_metrics.get("train/loss")
        figures = [] if loss is None else [f"loss {float(loss):.4g}"]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and (pace := callback.figures(trainer.world_size)):
                figures.append(f"{pace['perf/samples_per_s']:.3g} lesions/s")
                figures.append(f"{pace['perf/data_wait_share']:.0%} waiting")
        return figures

    def _left(self, step: int, now: float) -> list[str]:
        began, at_step = self._began
        if step <= at_step or not math.isfinite(self._total):
            return []
        return [f"{duration((now - began) / (step - at_step) * (self._total - step))} left"]


@contextmanager
def _warnings_in_the_log() -> Iterator[None]:
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
