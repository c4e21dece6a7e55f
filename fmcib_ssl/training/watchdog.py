"""A run that hangs says where, and ends: a collective that one rank never joins would else wait for days.

Every rank watches itself. A rank that hangs writes its state, with the Python stack of every thread, beside those of
the others; then all end. What stands still with the whole process, as when a scheduler suspends a job, does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from platform import node
from typing import Any

import lightning as L

logger = logging.getLogger(__name__)

#: As of `timeout`, the command. The job is not put back into the queue: a hang is to be looked at.
EXIT_CODE = 124
#: Less than this share of a core, and fewer bytes a second: a process that waits, with what its threads do meanwhile.
_IDLE_CPU_SHARE, _IDLE_BYTES_PER_S = 1 / 60, 2**14


class Watchdog(L.Callback):
    """Ends a run that has not finished a step for too long, once every rank has written where it is.

    A step is from one batch to the next, and so includes reading, a checkpoint that is written, an online probe, and
    what is compiled at the first step.

    Args:
        folder: where the ranks write, `rank-R.txt`.
        timeout_s: seconds without a finished step, whatever is done meanwhile; None watches nothing. Keep it below
            `hardware.collective_timeout_s`, or the process group gives up first, without these states.
        idle_s: seconds without a finished step in which this process and those it has started neither compute nor read
            nor write, nor wait for a disk: for what else they wait never comes. Of several ranks only while it waits
            for its own data, since elsewhere it may wait for another. Needs Linux.
        grace_s: how long a rank waits for the states of the others before it ends.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, folder: str | Path, *, timeout_s: float | None = 900.0, idle_s: float = 60.0, grace_s: float = 20.0
    ) -> None:
        if (timeout_s is not None and timeout_s <= 0) or idle_s <= 0 or grace_s < 0:
            raise ValueError(
                f"timeout_s={timeout_s} must be above 0, or null; idle_s={idle_s} above 0; grace_s={grace_s} at least 0"
            )
        self.folder = Path(folder)
        self.timeout_s = timeout_s
        self.idle_s = idle_s
        self.grace_s = grace_s
        self._end: Callable[[int], Any] = os._exit  # nothing that waits for the hung thread
        self._tick_s = 1.0
        self._ticks = 0  # since the last progress
        self._doing = "waits for the first batch"
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
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch is there."""
        self._progress(trainer, f"computes batch {batch_idx}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is done."""
        self._progress(trainer, f"waits for the batch after {batch_idx}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The run ends for a reason of its own, or because another rank has written its state and ended."""
        if self._reports and self._thread is not None:
            self._thread.join(self.grace_s + 10)  # which ends the process, once it has said why

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching, whatever has happened."""
        self._finished.set()

    def _progress(self, trainer: L.Trainer, doing: str) -> None:
        self._ticks = 0
        self._doing = f"step {trainer.global_step}, epoch {trainer.current_epoch}: {doing}"

    def _watch(self, trainer: L.Trainer, timeout_s: float, own: Path) -> None:
        # Ticks that this thread lives through, not the clock's: a suspended process has no time to move.
        idle_since, before = 0, _activity()
        while not self._finished.wait(self._tick_s):
            self._ticks += 1
            if self._ticks * self._tick_s >= timeout_s:
                self._report(trainer, own, f"no step was finished for {timeout_s:g} s", "timeout_s")
                return
            if self._ticks % 5 == 0:
                now, waited = _activity(), (self._ticks - idle_since) * self._tick_s
                alone = trainer.world_size == 1 or getattr(trainer.train_dataloader, "is_reading", False)
                if idle_since > self._ticks or not alone or _is_active(before, now, max(waited, self.idle_s)):
                    idle_since, before = self._ticks, now
                elif waited >= self.idle_s:
                    self._report(trainer, own, f"nothing was computed, read or written for {self.idle_s:g} s", "idle_s")
                    return

    def _report(self, trainer: L.Trainer, own: Path, reason: str, option: str) -> None:
        self._reports = True
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            with own.open("w") as file:
                file.write(
                    f"rank {trainer.global_rank} of {trainer.world_size} on {node()}, process {os.getpid()}, "
                    f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n{self._doing}\n{reason}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            stacks = f"each rank's stack is in {own.parent}"
        except OSError as error:
            stacks = f"{own} cannot be written ({error.strerror})"
            faulthandler.dump_traceback(all_threads=True)
        silent = self._wait_for_others(trainer, own.parent)
        if trainer.is_global_zero or 0 in silent:
            ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
            logger.critical(
                "%s (callbacks.watchdog.%s); last seen at %s. The run ends; %s.%s The same command resumes from the "
                "last checkpoint. If a step is meant to take as long, raise callbacks.watchdog.%s%s",
                reason, option, self._doing, stacks,
                f" Nothing from {ranks}: stopped, or its machine is gone." if silent else "", option,
                " and hardware.collective_timeout_s" if option == "timeout_s" else "",
            )  # fmt: skip
            logging.shutdown()
        self._end(EXIT_CODE)

    def _wait_for_others(self, trainer: L.Trainer, folder: Path) -> list[int]:
        """Ranks that have not written where they are, after the time of grace."""
        deadline = time.monotonic() + self.grace_s
        while True:
            silent = [r for r in range(trainer.world_size) if not (folder / f"rank-{r}.txt").is_file()]
            if not silent or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)


def _activity() -> tuple[float, int, bool]:
    """Seconds computed and bytes read and written by this process and its descendants, and whether any is at a disk."""
    seconds, num_bytes, at_disk, waiting = 0.0, 0, False, [str(os.getpid())]
    while waiting:
        folder = Path("/proc", waiting.pop())
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has ended, or there is no such folder here
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            seconds += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            at_disk |= stat[0] == "D"
            waiting += [pid for file in folder.glob("task/*/children") for pid in file.read_text().split()]
            num_bytes += sum(int(line.split()[1]) for line in (folder / "io").read_text().splitlines()[:2])
    return seconds, num_bytes, at_disk


def _is_active(before: tuple[float, int, bool], now: tuple[float, int, bool], seconds: float) -> bool:
    """Whether more was done in between than is done by what waits; a child that ended takes its part away."""
    computed, moved = abs(now[0] - before[0]), abs(now[1] - before[1])
    return now[2] or computed > _IDLE_CPU_SHARE * seconds or moved > _IDLE_BYTES_PER_S * seconds or now[0] == 0
