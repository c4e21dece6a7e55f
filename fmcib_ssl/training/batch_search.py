"""The largest batch that fits in memory, found before training by taking real steps that leave no trace.

Lightning's `BatchSizeFinder` is not made for this: it refuses several devices, takes its bound untried (in 2.6), steps
through the run's own trainer and data, and knows no limit on a CPU, where the kernel ends a process that takes too
much.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng

from fmcib_ssl.data.loader import LesionDataModule
from fmcib_ssl.models.pretraining import Pretraining
from fmcib_ssl.training.build import build_optimizer, learning_rate
from fmcib_ssl.training.memory import SPARE, free_host_memory, gpu_capacity, peak_memory, reset_host_peak
from fmcib_ssl.training.run_folder import RunFolder
from fmcib_ssl.training.settings import ConfigError, Settings

logger = logging.getLogger(__name__)

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


def fit_to_memory(
    settings: Settings,
    data: LesionDataModule,
    module: Pretraining,
    trainer: L.Trainer,
    folder: RunFolder,
    *,
    batch_size: int,
    trained: bool,
) -> int:
    """Give a run its largest batch, with the learning rate of that; gives the batch, lesions on each device.

    Where a batch is embedded in chunks (`method.chunk_size`) it stays, and the largest chunk is looked for. What an
    earlier start has found stays, and so does the batch that was trained with before anyone has looked.

    Args:
        settings: of the run.
        data: of the run; its batch is set.
        module: on the CPU; its optimizer, or its chunks, are set.
        trainer: that will train it.
        folder: keeps what is found.
        batch_size: of each device; no larger one is tried.
        trained: whether the run has taken a step.

    Raises:
        ConfigError: not even the smallest batch fits, or the system does not say what memory there is.
    """
    what = "chunk_size" if settings.method.get("chunk_size") else "batch_size"
    known = folder.state.get("auto_batch", {}).get(what)
    if known is None and (trained or not settings.hardware.auto_batch):
        return batch_size

    def take(size: int) -> None:
        if what == "chunk_size":
            cast(Any, module).chunk_size = size
        else:
            data.batch_size = size
            module.make_optimizer = build_optimizer(settings, size)

    def take_of_all(size: int) -> None:
        if size != found:
            take(size)
            rate = f", learning rate {learning_rate(settings, size):.3g}" if what == "batch_size" else ""
            logger.info("a device has room for less: %s=%d on all%s", what, size, rate)
        folder.note(auto_batch={what: size})

    found = min(known, batch_size) if known else _search(settings, data, module, trainer, what=what, most=batch_size)
    take(found)
    trainer.callbacks.append(SmallestOfAll(found, take_of_all))  # type: ignore[attr-defined]  # it is a list
    return found if what == "batch_size" else batch_size


def _search(
    settings: Settings, data: LesionDataModule, module: Pretraining, trainer: L.Trainer, *, what: str, most: int
) -> int:
    device, world_size = trainer.strategy.root_device, settings.world_size
    trial = copy.deepcopy(module)
    if settings.hardware.compile:  # for each size of batch anew; uncompiled it takes no less memory
        trial.encoder.__dict__.pop("forward", None)
    # DDP sends gradients from a copy of them.
    gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    try:
        room = room_of(device, num_processes=settings.hardware.devices, reserve=gradients if world_size > 1 else 0)
    except OSError as error:
        raise ConfigError(f"hardware.auto_batch needs to know what memory is free: {error}; set it to false") from error

    def fits(size: int) -> bool:
        if what == "chunk_size":
            cast(Any, trial).chunk_size = size

        def steps() -> None:
            take_steps(
                trial,
                data,
                most if what == "chunk_size" else size,
                device=device,
                precision=str(trainer.precision),
                accumulate=trainer.accumulate_grad_batches,
            )

        try:
            with torch.compiler.set_stance("force_eager"):  # compiling for each size would take minutes
                return room.holds(size, steps)
        finally:
            gc.collect()  # a trainer and its module hold each other

    logger.info("auto_batch looks for the largest %s that fits in %.1f GB of memory", what, room.limit / 1e9)
    least = min(2, most)
    found = largest_that_fits(fits, least, most)
    if not found.size:
        raise ConfigError(
            f"hardware.auto_batch: not even {what}={least} fits in {room.limit / 1e9:.1f} GB: take a smaller encoder "
            "or data.patch_size, or a larger device"
        )
    limit = f"{found.refused} do not"
    if found.refused is None and what == "chunk_size":
        limit = "that is the whole batch"
    elif found.refused is None:
        limit = f"no more are tried: data.max_batch_size={settings.data.max_batch_size}, {len(data.dataset)} lesions"
    logger.info("auto_batch takes %s=%d: %s", what, found.size, limit)
    return found.size
