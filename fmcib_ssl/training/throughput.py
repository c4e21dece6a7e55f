"""How fast training goes and what it waits for."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Logs lesions per second over all devices, and the share of each step spent waiting for data.

    A step lasts from the end of the one before to its own end; the wait is the part of it before the batch arrives.
    A share near 0 means that the device is the bottleneck, near 1 that the workers are.
    """

    def __init__(self) -> None:
        self._step_began: float | None = None
        self._batch_arrived = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the epoch's first step."""
        self._step_began = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """The batch is there: what has passed was waiting."""
        self._batch_arrived = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step and start the clock of the next."""
        now = time.perf_counter()
        if self._step_began is not None:
            elapsed = now - self._step_began
            num_lesions = len(batch["positive"][0])
            pl_module.log("perf/samples_per_s", num_lesions * trainer.world_size / elapsed, prog_bar=True)
            pl_module.log("perf/data_wait_share", (self._batch_arrived - self._step_began) / elapsed)
        self._step_began = now
