"""How fast training goes, how much of the device that uses, what it waits for, and when it will be done."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from datetime import datetime, timedelta
from typing import Any

import lightning as L
import torch

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.io import num_cores
from fmcib_ssl.training.flops import peak_flops
from fmcib_ssl.training.memory import peak_memory
from fmcib_ssl.training.rows import row_is_due

logger = logging.getLogger(__name__)

#: The first steps of a start choose kernels, compile, and fill the workers' queues.
_WARM_UP = 5
#: Where steps are slow, the time that the whole run takes is told after as long.
_PATIENCE_S = 60.0
#: Share of the time above which something can be done about waiting.
_MUCH_WAITING = 0.1


class Throughput(L.Callback):
    """Logs the pace of the last steps, and tells, once it is steady, how long the whole run takes.

    A step lasts from the end of the one before to its own end; the wait is the part of it before its batch, with its
    views, is on the device. Nothing here waits for the device: over a window the clock of the host agrees with its.

    Logs `perf/samples_per_s`, lesions a second over all devices; `perf/data_wait_share`, near 0 where the device is
    the bottleneck, near 1 where the workers are; `perf/memory_gb`, the most that was held since the start, on a GPU
    by torch, else by the process (1e9 bytes); and if the module has `flops_per_lesion`, `perf/tflops` on each device,
    and `perf/peak_share` where the card is known: its share of what it could do at this precision, without sparsity.

    Args:
        window: steps that a figure is the mean of; after the first of them, rows get it twice a window.

    Raises:
        ValueError: an empty window.
    """

    def __init__(self, *, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"window={window}: the pace is a mean over 1 step or more")
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=window)  # seconds, of them waiting, lesions
        self._num_steps = 0
        self._unlogged = 0
        self._step_began: float | None = None
        self._batch_arrived = 0.0
        self._steady_since: float | None = None
        self._told = False
        self._flops_per_lesion: int | None = None
        self._peak: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew, and look up what the device could do."""
        self._steps.clear()
        self._num_steps, self._told = 0, False
        self._flops_per_lesion = getattr(pl_module, "flops_per_lesion", None)
        self._peak = None
        if pl_module.device.type == "cuda":
            card = torch.cuda.get_device_name(pl_module.device)
            self._peak = peak_flops(card, str(trainer.precision), tf32=_convolves_in_tf32())
            if self._peak is None and self._flops_per_lesion:
                logger.info(
                    "the peak of %s at %s is not known: metrics have no perf/peak_share", card, trainer.precision
                )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the epoch's first step."""
        self._step_began = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """The batch is there: what has passed was waiting."""
        self._batch_arrived = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the pace, tell the time to go once, and start the clock of the next step."""
        now = time.perf_counter()
        if self._step_began is not None:
            self._num_steps += 1
            if self._num_steps <= _WARM_UP:  # such a step is on its own
                self._steps.clear()
            waited = self._batch_arrived - self._step_began
            self._steps.append((now - self._step_began, waited, len(batch["positive"][0])))
            self._unlogged += 1
            if self._is_due(trainer):
                self._unlogged = 0
                figures = self.figures(trainer.world_size)
                pl_module.log("perf/samples_per_s", figures.pop("perf/samples_per_s"), prog_bar=True)
                pl_module.log_dict({**figures, "perf/memory_gb": peak_memory(pl_module.device) / 1e9})
            self._tell_once(trainer, now)
        self._step_began = now

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether to log now: a step that gets a row, but not every one, since Lightning takes a millisecond for it."""
        window = self._steps.maxlen or 1
        if self._num_steps > window and self._unlogged < window // 2:
            return False
        return row_is_due(trainer)

    def figures(self, world_size: int) -> dict[str, float]:
        """The pace of the last steps, by the names it is logged under; nothing before the first step."""
        if not self._steps:
            return {}
        seconds, waited, lesions = (sum(column) for column in zip(*self._steps, strict=True))
        figures = {
            "perf/samples_per_s": lesions * world_size / seconds,
            "perf/data_wait_share": waited / seconds,
        }
        if self._flops_per_lesion:
            flops = self._flops_per_lesion * lesions / seconds
            figures["perf/tflops"] = flops / 1e12
            if self._peak:
                figures["perf/peak_share"] = flops / self._peak
        return figures

    def _tell_once(self, trainer: L.Trainer, now: float) -> None:
        """Once the pace is steady, say how long the rest of the run takes, and what could be done about waiting."""
        if self._num_steps == _WARM_UP:
            self._steady_since = now
        if self._told or self._num_steps <= _WARM_UP or self._steady_since is None:
            return
        passed = now - self._steady_since  # with what happens between epochs
        if self._num_steps < 4 * _WARM_UP and passed < _PATIENCE_S:
            return
        self._told = True
        to_go = passed / (self._num_steps - _WARM_UP) * _batches_to_go(trainer)
        figures = self.figures(trainer.world_size)
        wait = figures["perf/data_wait_share"]
        parts = [f"{figures['perf/samples_per_s']:.3g} lesions/s"]
        if "perf/tflops" in figures:
            share = f" ({figures['perf/peak_share']:.0%} of its peak)" if "perf/peak_share" in figures else ""
            parts.append(f"{figures['perf/tflops']:.2g} TFLOP/s on each device{share}")
        parts.append(f"{wait:.0%} of the time waiting for data")
        logger.info("pace       %s: %s", ", ".join(parts), _time_to_go(trainer, to_go))
        if wait > _MUCH_WAITING:
            logger.info("           to wait less: %s", "; ".join(_remedies(trainer, wait)))


def _convolves_in_tf32() -> bool:
    conv = getattr(torch.backends.cudnn, "conv", None)  # from torch 2.9 on each kind of operation has its own
    return bool(torch.backends.cudnn.allow_tf32) if conv is None else conv.fp32_precision == "tf32"


def _batches_to_go(trainer: L.Trainer) -> float:
    """Batches of each device until the run ends."""
    per_epoch = trainer.num_training_batches
    steps_per_epoch = math.ceil(per_epoch / trainer.accumulate_grad_batches)
    return (trainer.estimated_stepping_batches - trainer.global_step) * per_epoch / steps_per_epoch


def _time_to_go(trainer: L.Trainer, seconds: float) -> str:
    if not math.isfinite(seconds):
        return "no end is set"
    now = datetime.now().astimezone()
    end = now + timedelta(seconds=seconds)
    when = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b, %H:%M}"
    steps = int(trainer.estimated_stepping_batches) - trainer.global_step
    return f"about {duration(seconds)} for the {steps} steps that are left, until {when}"


def duration(seconds: float) -> str:
    """In the two units that matter, such as `5 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _remedies(trainer: L.Trainer, wait: float) -> list[str]:
    num_workers = getattr(trainer.train_dataloader, "num_workers", 0)
    # While the device waits, workers are what takes time: with so many of them they would take as long as the steps.
    wanted = math.ceil(max(num_workers, wait) / (1 - min(wait, 0.99)))
    # A core for the training process of each device on this machine.
    wanted = min(wanted, max(num_cores() // trainer.num_devices - 1, 1))
    remedies = [f"hardware.num_workers={wanted}"] if wanted > num_workers else []
    dataset = getattr(getattr(trainer, "datamodule", None), "dataset", None)
    if dataset is not None and not isinstance(dataset.patches, LesionPatches):
        remedies.append("prepare a store and train from that (docs/prepare.md)")
    if dataset is not None and getattr(dataset.view_transform, "patch_by_patch", False):
        remedies.append("make the views of a whole batch at once, on a GPU there (augment=batched_published)")
    return remedies or [f"more cores: all {num_cores()} are in use"]
