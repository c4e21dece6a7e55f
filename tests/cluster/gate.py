"""Holds a training at one step until something has happened to it: in the middle, whatever the machine's speed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import lightning as L

from fmcib_ssl.training import signals

#: Who was to act is gone; a job that waits must not outlive its cluster for long.
PATIENCE_S = 600


class Gate(L.Callback):
    """Waits before a step, or after the last one, once, until a signal has come or the file `go` is there.

    Args:
        folder: the file `held` appears in it, with the numbers of the process and the job; whoever wants no signal puts
            `go` there.
        step: how many are done by then.
        rank: of the process that waits; the others run into the next collective.
    """

    def __init__(self, folder: str, step: int, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.step = step
        self.rank = rank

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._wait(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wait(trainer)

    def _wait(self, trainer: L.Trainer) -> None:
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        try:
            with (self.folder / "held").open("x") as held:
                held.write(f"{os.getpid()} {os.environ.get('SLURM_JOB_ID', '-')}\n")
        except FileExistsError:
            return
        patience = time.monotonic() + PATIENCE_S
        while signals.received() is None and not (self.folder / "go").exists():
            if time.monotonic() > patience:
                raise TimeoutError(f"nothing has happened for {PATIENCE_S} s")
            time.sleep(0.02)
