"""A run that hangs says where, and ends: a collective that one rank never joins would else wait for days.

Every rank watches itself. A rank that hangs writes its state, with the Python stack of every thread, beside those of
the others; then all end. What stands still with the whole process, as when a scheduler suspends a job, does not count:
`faulthandler.dump_traceback_later`, which goes by the clock, would end such a job when it is woken.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from datetime import datetime
from pathlib import Path
from platform import node

import lightning as L

logger = logging.getLogger(__name__)

#: As of `timeout`, the command. The job is not put back into the queue: a hang is to be looked at.
EXIT_CODE = 124
_TICK_S = 1.0
#: How long a rank waits for the states of the others before it ends.
_GRACE_S = 20.0


class Watchdog(L.Callback):
    """Ends a run that has not finished a step for too long, once every rank has written where it is.

    A step is from one batch to the next, and so includes reading, a checkpoint that is written, an online probe, and
    what is compiled at the first step.

    Args:
        folder: where the ranks write, `rank-R.txt`.
        timeout_s: seconds without a finished step; None watches nothing. Keep it below
            `hardware.collective_timeout_s`, or the process group gives up first, without these states.

    Raises:
        ValueError: `timeout_s` is not above 0.
    """

    def __init__(self, folder: str | Path, *, timeout_s: float | None = 900.0) -> None:
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s}: must be above 0, or null to watch nothing")
        self.folder = Path(folder)
        self.timeout_s = timeout_s
        self._ticks = 0  # since the last progress
        self._doing = ""
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        self._reports = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to watch."""
        if self.timeout_s is None:
            return
        own = self.folder / f"rank-{trainer.global_rank}.txt"
        own.unlink(missing_ok=True)  # of an earlier start
        self._progress(trainer, "waits for the first batch")
        self._finished.clear()
        self._thread = threading.Thread(target=self._watch, args=(trainer, self.timeout_s, own), daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """A batch is there."""
        self._progress(trainer, f"computes batch {batch_idx}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """A batch is done."""
        self._progress(trainer, f"waits for the batch after {batch_idx}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The run ends for a reason of its own, or because another rank has written its state and ended."""
        if self._reports and self._thread is not None:
            self._thread.join(_GRACE_S + 10)  # which ends the process, once it has said why

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching, whatever has happened."""
        self._finished.set()

    def _progress(self, trainer: L.Trainer, doing: str) -> None:
        self._ticks = 0
        self._doing = f"step {trainer.global_step}, epoch {trainer.current_epoch}: {doing}"

    def _watch(self, trainer: L.Trainer, timeout_s: float, own: Path) -> None:
        # Ticks that this thread lives through, not the clock's: a suspended process has no time to move.
        while not self._finished.wait(_TICK_S):
            self._ticks += 1
            if self._ticks * _TICK_S >= timeout_s:
                self._reports = True
                self._report(trainer, timeout_s, own)
                os._exit(EXIT_CODE)  # nothing that waits for the hung thread

    def _report(self, trainer: L.Trainer, timeout_s: float, own: Path) -> None:
        reason = f"no step was finished for {timeout_s:g} s"
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            with own.open("w") as file:
                file.write(
                    f"rank {trainer.global_rank} of {trainer.world_size} on {node()}, process {os.getpid()}, "
                    f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n{self._doing}\n{reason}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # a full disk
            faulthandler.dump_traceback(all_threads=True)
        silent = self._wait_for_others(trainer)
        if trainer.is_global_zero or 0 in silent:
            ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
            logger.critical(
                "%s (callbacks.watchdog.timeout_s); last seen at %s. The run ends; each rank's stack is in %s.%s The "
                "same command resumes from the last checkpoint. If a step is meant to take as long, raise "
                "callbacks.watchdog.timeout_s and hardware.collective_timeout_s",
                reason, self._doing, self.folder,
                f" Nothing from {ranks}: stopped, or its machine is gone." if silent else "",
            )  # fmt: skip
            logging.shutdown()

    def _wait_for_others(self, trainer: L.Trainer) -> list[int]:
        """Ranks that have not written where they are, after the time of grace."""
        deadline = time.monotonic() + _GRACE_S
        while True:
            silent = [r for r in range(trainer.world_size) if not (self.folder / f"rank-{r}.txt").is_file()]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)
