"""How fast training goes and what it waits for, as figures in the metrics and as what a run shows while it trains."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fmcib_ssl.io import num_cores
from fmcib_ssl.models import row_is_due

logger = logging.getLogger(__name__)

#: The first steps of a start choose kernels, compile, and fill the workers' queues.
_WARM_UP = 5
#: Share of the time above which something can be done about waiting.
_MUCH_WAITING = 0.1
#: The first line of the log comes with the first step, the next so many seconds later, then after twice as long each
#: time, but never later than the second of these.
_FIRST_INTERVAL_S, _LONGEST_INTERVAL_S = 10.0, 300.0


class Throughput(L.Callback):
    """Logs the pace of the last steps, and says once what would shorten the waiting for data.

    A step lasts from the end of the one before to its own end; the wait is the part of it before its batch, with its
    views, is on the device. Nothing here waits for the device: over a window the clock of the host agrees with its.

    Logs `perf/samples_per_s`, lesions a second over all devices; `perf/data_wait_share`, near 0 where the device is
    the bottleneck, near 1 where the workers are; on a GPU `perf/memory_gb`, the most that torch's tensors held since
    the start (1e9 bytes); and if the module has `flops_per_lesion`, `perf/tflops` on each device.

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
        self._step_began = 0.0
        self._batch_arrived = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._steps.clear()
        self._num_steps = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the epoch's first step."""
        self._step_began = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """The batch is there: what has passed was waiting."""
        self._batch_arrived = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the pace, and start the clock of the next step."""
        now = time.perf_counter()
        self._num_steps += 1
        if self._num_steps <= _WARM_UP:  # such a step is on its own
            self._steps.clear()
        waited = self._batch_arrived - self._step_began
        self._steps.append((now - self._step_began, waited, len(batch["positive"][0])))
        self._step_began = now
        self._unlogged += 1
        window = self._steps.maxlen or 1
        if (self._num_steps <= window or self._unlogged >= window // 2) and row_is_due(trainer, batch_idx):
            self._unlogged = 0
            figures = self.figures(trainer, pl_module)
            if pl_module.device.type == "cuda":
                figures["perf/memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            pl_module.log_dict(figures)
        if self._num_steps == 4 * _WARM_UP:
            share = self.figures(trainer, pl_module)["perf/data_wait_share"]
            if share > _MUCH_WAITING and trainer.is_global_zero:
                logger.info("%.0f%% of the time is spent waiting for data: %s", 100 * share, _remedy(trainer, share))

    def figures(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """The pace of the last steps, by the names it is logged under; nothing before the first step."""
        if not self._steps:
            return {}
        seconds, waited, lesions = (sum(column) for column in zip(*self._steps, strict=True))
        figures = {
            "perf/samples_per_s": lesions * trainer.world_size / seconds,
            "perf/data_wait_share": waited / seconds,
        }
        if flops := getattr(pl_module, "flops_per_lesion", None):
            figures["perf/tflops"] = flops * lesions / seconds / 1e12
        return figures


def _remedy(trainer: L.Trainer, wait: float) -> str:
    num_workers = getattr(trainer.train_dataloader, "num_workers", 0)
    # While the device waits, workers are what takes time: with so many of them they would take as long as the steps.
    wanted = math.ceil(max(num_workers, wait) / (1 - min(wait, 0.99)))
    # A core for the training process of each device on this machine.
    wanted = min(wanted, max(num_cores() // trainer.num_devices - 1, 1))
    if wanted > num_workers:
        return f"to wait less: hardware.num_workers={wanted}"
    return f"all {num_cores()} cores are in use; docs/speed.md says what else shortens it"


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
        self._total = math.inf
        self._first_step = 0
        self._began: tuple[float, int] = (0.0, 0)  # when, and at which step, the time left is measured from
        self._interval_s = 0.0
        self._next_line = 0.0

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all processes but the main one."""
        self._refresh_rate = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to show."""
        self._total = trainer.estimated_stepping_batches
        self._first_step = trainer.global_step
        self._began = (time.monotonic(), trainer.global_step)
        self._interval_s, self._next_line = _FIRST_INTERVAL_S / 2, 0.0
        if self._refresh_rate and sys.stdout.isatty():
            total = int(self._total) if math.isfinite(self._total) else None
            self._bar = self._open.enter_context(
                tqdm(total=total, initial=trainer.global_step, unit="step", file=sys.stdout, dynamic_ncols=True)
            )
            self._open.enter_context(logging_redirect_tqdm())
            logging.captureWarnings(True)
            self._open.callback(logging.captureWarnings, False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what is due after a step."""
        step, now = trainer.global_step, time.monotonic()
        if self._began[1] < step <= self._first_step + _WARM_UP:  # the time left is not judged by these steps
            self._began = (now, step)
        if not self._refresh_rate:
            return
        if self._bar is not None:
            if (moved := step - self._bar.n) >= self._refresh_rate or step >= self._total:
                self._bar.set_postfix_str(", ".join(_shown(trainer, pl_module)), refresh=False)
                self._bar.update(moved)
        elif now >= self._next_line and step > self._first_step:
            self._interval_s = min(2 * self._interval_s, _LONGEST_INTERVAL_S)
            self._next_line = now + self._interval_s
            total = f"/{self._total:.0f}" if math.isfinite(self._total) else ""
            began, at_step = self._began
            left = []
            if step > at_step and math.isfinite(self._total):
                left = [f"{duration((now - began) / (step - at_step) * (self._total - step))} left"]
            logger.info("%s", ", ".join([f"step {step}{total}", *_shown(trainer, pl_module), *left]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        self._open.close()
        self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is, so that what is said next stands below it."""
        self.on_train_end(trainer, pl_module)


def _shown(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    loss = trainer.callback_metrics.get("train/loss")
    shown = [] if loss is None else [f"loss {float(loss):.4g}"]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput) and (pace := callback.figures(trainer, pl_module)):
            shown.append(f"{pace['perf/samples_per_s']:.3g} lesions/s")
            shown.append(f"{pace['perf/data_wait_share']:.0%} waiting")
    return shown


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


def flops_of_lesion(network: nn.Module, patch_size_zyx: Sequence[int], *, num_views: int, num_watched: int = 0) -> int:
    """Floating-point operations that a step takes for each lesion; a multiplication and an addition are two.

    Counted is what a step is for, not what a chunk's second forward or gradient checkpointing repeats.

    Args:
        network: what a view goes through, `(batch, 1, z, y, x)` in.
        patch_size_zyx: voxels of a view along z, y, x.
        num_views: of a lesion and its negatives that go through it, forward and back.
        num_watched: that go through a copy of it, forward only.
    """
    forward, training = count_flops(network, (2, 1, *patch_size_zyx))  # two: batch norm wants more than one
    return (num_views * training + num_watched * forward) // 2


def count_flops(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """Operations of convolutions and products of matrices in `module(x)`: forward, and forward with backward.

    Nothing is computed: the tensors have shapes and no numbers.
    """
    state = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    back = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=back) as counter:
        out = functional_call(module, state, (torch.empty(tuple(input_shape), device="meta"),))
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops()


def _convolution_backward_flops(
    gradient: list[int], inputs: list[int], weight: list[int], *rest: Any, out_shape: object, **_: Any
) -> int:
    """As many as forward for each of the gradients of input and weight; torch forgets groups in the second."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest
    return int(conv_flop_count(inputs, weight, gradient, transposed=transposed) * sum(wanted[:2]))
