"""`hardware.auto_batch`: a run takes the largest batch that fits in memory, and keeps it through all its starts."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any, cast

import lightning as L
import torch

from fmcib_ssl.components import build_optimizer, learning_rate
from fmcib_ssl.data.datamodule import LesionDataModule
from fmcib_ssl.methods.pretraining import Pretraining
from fmcib_ssl.settings import ConfigError, Settings
from fmcib_ssl.training.batch_search import SmallestOfAll, largest_that_fits, room_of, take_steps
from fmcib_ssl.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


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
