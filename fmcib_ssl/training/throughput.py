"""How fast training goes and what it waits for, as figures in the metrics and as what a run shows while it trains."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
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
        window: steps that a figure is the mean of.

    Raises:
        ValueError: an empty window.
    """

    def __init__(self, *, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"window={window}: the pace is a mean over 1 step or more")
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=window)  # seconds, of them waiting, lesions
        self._num_steps = 0
        self._step_began = 0.0
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
        """Log the pace, and start the clock of the next step."""
        now = time.perf_counter()
        self._num_steps += 1
        if self._num_steps <= _WARM_UP:  # such a step is on its own
            self._steps.clear()
        waited = self._batch_arrived - self._step_began
        self._steps.append((now - self._step_began, waited, len(batch["positive"][0])))
        self._step_began = now
        if row_is_due(trainer, batch_idx):
            figures = self.figures(trainer, pl_module)
            if pl_module.device.type == "cuda":
                figures["perf/memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            pl_module.log_dict(figures)
        if self._num_steps == 4 * _WARM_UP:
            share = self.figures(trainer, pl_module)["perf/data_wait_share"]
            if share > _MUCH_WAITING and trainer.is_global_zero:
                logger.info(
                    "%.0f%% of the time is spent waiting for data: raise hardware.num_workers, now %d; this machine "
                    "has %d cores. docs/speed.md says what else shortens it",
                    100 * share, getattr(trainer.train_dataloader, "num_workers", 0), num_cores(),
                )  # fmt: skip

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
        self._num_steps = 0
        self._first_step = 0
        self._began: tuple[float, int] = (0.0, 0)  # when, and at which step, the time left is measured from
        self._interval_s = 0.0
        self._next_line = 0.0

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all processes but the main one."""
        self._refresh_rate = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to show."""
        self._num_steps = int(trainer.estimated_stepping_batches)
        self._first_step = trainer.global_step
        self._began = (time.monotonic(), trainer.global_step)
        self._interval_s, self._next_line = _FIRST_INTERVAL_S / 2, 0.0
        if self._refresh_rate and sys.stdout.isatty():
            self._bar = self._open.enter_context(
                tqdm(total=self._num_steps, initial=self._first_step, unit="step", file=sys.stdout, dynamic_ncols=True)
            )
            self._open.enter_context(logging_redirect_tqdm())
            logging.captureWarnings(True)
            self._open.callback(logging.captureWarnings, False)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Show what is due after a step."""
        step, now = trainer.global_step, time.monotonic()
        if self._began[1] < step <= self._first_step + _WARM_UP:  # the time left is not judged by these steps
            self._began = (now, step)
        if not self._refresh_rate:
            return
        if self._bar is not None:
            if (moved := step - self._bar.n) >= self._refresh_rate or step >= self._num_steps:
                self._bar.set_postfix_str(", ".join(_shown(trainer)), refresh=False)
                self._bar.update(moved)
        elif now >= self._next_line and step > self._first_step:
            self._interval_s = min(2 * self._interval_s, _LONGEST_INTERVAL_S)
            self._next_line = now + self._interval_s
            line = [f"step {step}/{self._num_steps}", *_shown(trainer)]
            began, at_step = self._began
            if step > at_step:
                seconds_left = (now - began) / (step - at_step) * (self._num_steps - step)
                line.append(f"{timedelta(seconds=round(seconds_left))} left")
            logger.info("%s", ", ".join(line))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it is."""
        self._open.close()
        self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is, so that what is said next stands below it."""
        self.on_train_end(trainer, pl_module)


def _shown(trainer: L.Trainer) -> list[str]:
    values = trainer.callback_metrics
    formats = {
        "train/loss": "loss {:.4g}",
        "perf/samples_per_s": "{:.3g} lesions/s",
        "perf/data_wait_share": "{:.0%} waiting",
    }
    return [text.format(float(values[name])) for name, text in formats.items() if name in values]


def flops_of_lesion(network: nn.Module, patch_size_zyx: Sequence[int], *, num_views: int, num_watched: int = 0) -> int:
    """Floating-point operations that a step takes for each lesion; a multiplication and an addition are two.

    Counted are convolutions and products of matrices, and what a step is for, not what a chunk's second forward or
    gradient checkpointing repeats. Nothing is computed: the tensors have shapes and no numbers.

    Args:
        network: what a view goes through, `(batch, 1, z, y, x)` in.
        patch_size_zyx: voxels of a view along z, y, x.
        num_views: of a lesion and its negatives that go through it, forward and back.
        num_watched: that go through a copy of it, forward only.
    """
    state = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    two_views = torch.empty((2, 1, *patch_size_zyx), device="meta")  # batch norm wants more than one
    back = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=back) as counter:
        out = functional_call(network, state, (two_views,))
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    both: int = num_views * counter.get_total_flops() + num_watched * forward
    return both // 2


def _convolution_backward_flops(
    gradient: list[int], inputs: list[int], weight: list[int], *rest: Any, out_shape: object, **_: Any
) -> int:
    """As many as forward for each of the gradients of input and weight; torch forgets groups in the second."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, needed = rest
    return int(conv_flop_count(inputs, weight, gradient, transposed=transposed) * sum(needed[:2]))
