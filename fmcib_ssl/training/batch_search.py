"""The largest batch that fits in memory, found before training by taking real steps that leave no trace.

Lightning's `BatchSizeFinder` is not made for this: it refuses several devices, takes its bound untried (in 2.6), steps
through the run's own trainer and data, and knows no limit on a CPU, where the kernel ends a process that takes too
much.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng

from fmcib_ssl.data.datamodule import LesionDataModule
from fmcib_ssl.training.memory import SPARE, free_host_memory, gpu_capacity, peak_memory, reset_host_peak

#: The first step makes the optimizer's state; a scaler of the loss may leave that one out.
_STEPS = 3
#: Sizes closer to each other than this share are not told apart.
_RESOLUTION = 1 / 16


class Room(Protocol):
    """Memory in which a step fits or not.

    Attributes:
        limit: bytes that a step may hold, with what is held in any case.
    """

    limit: int

    def holds(self, size: int, step: Callable[[], None]) -> bool:
        """Take a step of this size, unless it is known not to fit; whether it did."""
        ...


class Largest(NamedTuple):
    """What a search has found.

    Attributes:
        size: the largest that fits; 0 if the least does not.
        refused: the smallest that is known not to fit; None if all do.
    """

    size: int
    refused: int | None


def largest_that_fits(fits: Callable[[int], bool], least: int, most: int) -> Largest:
    """Double from `least` until something does not fit, then bisect, to a sixteenth.

    Args:
        fits: whether a size does; once one does not, no larger one is asked for.
        least: the first size.
        most: no larger one is tried.
    """
    low, high = 0, least
    while fits(high):
        if high == most:
            return Largest(most, None)
        low, high = high, min(2 * high, most)
    while low and high - low > max(1, low * _RESOLUTION):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Largest(low, high)


class GPURoom:
    """A GPU's memory, of which a tenth is kept free; torch is held to the rest while a step is tried.

    Args:
        device: the GPU.
        reserve: bytes that training holds and a trial does not.
    """

    def __init__(self, device: torch.device, *, reserve: int = 0) -> None:
        self.limit = gpu_capacity(device)
        self._device = device
        self._reserve = reserve

    def holds(self, size: int, step: Callable[[], None]) -> bool:
        """See `Room`."""
        before = torch.cuda.get_per_process_memory_fraction(self._device)
        total = torch.cuda.mem_get_info(self._device)[1]
        torch.cuda.set_per_process_memory_fraction((self.limit - self._reserve) / total, self._device)
        try:
            return _takes(step)
        finally:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(before, self._device)


class HostRoom:
    """The machine's memory, or what a job may have of it, of which a tenth is kept free.

    Taking too much of that is no error but the end of the process. So a size is tried only if those before it, by the
    line through the two largest, say that it fits.

    Args:
        num_processes: that share it.

    Raises:
        OSError: the system does not say what is free.
    """

    def __init__(self, num_processes: int = 1) -> None:
        held = _held_now()
        self.limit = held + int(free_host_memory() * (1 - SPARE)) // num_processes
        self._peaks = {0: held}

    def holds(self, size: int, step: Callable[[], None]) -> bool:
        """See `Room`."""
        if self._expected(size) > self.limit:
            return False
        reset_host_peak()
        if not _takes(step):
            return False
        self._peaks[size] = peak_memory(torch.device("cpu"))
        return self._peaks[size] <= self.limit

    def _expected(self, size: int) -> float:
        *_, (fewer, low), (more, high) = [(0, 0), *sorted(self._peaks.items())]
        return high + (size - more) * (high - low) / (more - fewer) if more else high


def take_steps(
    module: L.LightningModule,
    data: LesionDataModule,
    batch_size: int,
    *,
    device: torch.device,
    precision: str,
    accumulate: int = 1,
) -> None:
    """Train a module that is thrown away for three optimizer steps, as its run would, on this device alone.

    Args:
        module: on the CPU; its weights do not matter afterwards.
        data: of the run; it is asked for one lesion.
        batch_size: lesions a step.
        device: of this process.
        precision: as Lightning's trainer takes it.
        accumulate: batches a step.
    """
    accumulate = min(2, accumulate)  # the second has gradients beside its activations, and so have all later ones
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        plugins=[LightningEnvironment()],  # the job's own has more devices
        precision=precision,  # type: ignore[arg-type]  # that of another trainer
        max_steps=_STEPS,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # the run's stay
    module.zero_grad(set_to_none=True)
    own_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(own_gpu), isolate_rng(include_cuda=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is said of the run
        trainer.fit(module, datamodule=data.rehearsal(batch_size, _STEPS * accumulate))


def room_of(device: torch.device, *, num_processes: int, reserve: int) -> Room:
    """Memory of a device.

    Args:
        device: of this process.
        num_processes: on this machine.
        reserve: bytes that training holds and a trial does not, on a GPU.

    Raises:
        OSError: the system does not say what is free.
    """
    return GPURoom(device, reserve=reserve) if device.type == "cuda" else HostRoom(num_processes)


class SmallestOfAll(L.Callback):
    """Takes on every device what the smallest one has room for; needs an equal number of devices that have searched.

    Args:
        own: what was found for this device.
        take: called on every device with what all of them take, before there is an optimizer.
    """

    def __init__(self, own: int, take: Callable[[int], None]) -> None:
        self.own = own
        self._take = take

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agree."""
        own = torch.tensor(self.own, device=trainer.strategy.root_device)
        self._take(int(trainer.strategy.reduce(own, reduce_op="min")))


def _takes(step: Callable[[], None]) -> bool:
    """Whether a step is taken, and not ended by a lack of memory."""
    try:
        step()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not is_oom_error(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what the step has made
        return False
    return True


def _held_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
