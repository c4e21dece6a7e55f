"""A GPU's memory: the largest batch that fits, found before training by taking real steps, and what to do without.

Lightning's `BatchSizeFinder` is not made for this: it refuses several devices, takes its bound untried (in 2.6), and
steps through the run's own trainer and data.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng

from fmcib_ssl.data import LesionDataModule
from fmcib_ssl.models import resolve_precision
from fmcib_ssl.training.run_folder import RunFolder, read_state
from fmcib_ssl.training.settings import ConfigError, Settings

logger = logging.getLogger(__name__)

#: Builds the module and the data of a run.
_Build = Callable[[Settings], tuple[L.LightningModule, LesionDataModule]]
#: Share of the free memory that is left for fragments and workspaces.
_SPARE = 0.1
#: The first step makes the optimizer's state; a scaler of the loss may leave that one out.
_NUM_STEPS = 3


def settings_that_fit(settings: Settings, folder: RunFolder, parts: _Build, *, max_: int, trained: bool) -> Settings:
    """With `hardware.auto_batch`, the settings with the largest batch that a GPU has room for.

    Where a batch is embedded in chunks (`method.chunk_size`) it stays, and the largest chunk is looked for. What an
    earlier start has found stays, and so does the batch that was trained with before anyone has looked. The first
    process looks, on its GPU; the others read in the run folder what it has found.

    Args:
        settings: `hardware.auto_batch` asks for the search; the size replaces `data.batch_size` or `method.chunk_size`.
        folder: remembers the size for later starts.
        parts: builds what the trials train.
        max_: lesions on each device; no larger batch is tried.
        trained: whether the run has taken a step.

    Raises:
        ConfigError: there is no GPU, or not even the smallest batch fits.
    """
    what = "chunk_size" if settings.method.get("chunk_size") else "batch_size"
    size = folder.state.get("auto_batch", {}).get(what)
    if size is None:
        if trained or not settings.hardware.auto_batch:
            return settings
        device = _gpu_of_this_process()
        if folder.main_process:
            logger.info("auto_batch looks for the largest %s, up to %d", what, max_)

            def step(size: int) -> None:
                batch_size = size if what == "batch_size" else max_
                _take_steps(_with_size(settings, what, size), parts, batch_size, device)

            size = largest_that_fits(step, max_)
            if not size:
                raise ConfigError(
                    f"hardware.auto_batch: not even {what}={min(2, max_)} fits in the GPU's memory: take a smaller "
                    "encoder or data.patch_size"
                )
            logger.info("auto_batch takes %s=%d%s", what, size, ", the largest allowed" if size == max_ else "")
            folder.note(auto_batch={what: size})
        else:
            size = _size_of_first_process(folder, what, settings.hardware.collective_timeout_s)
    return _with_size(settings, what, min(size, max_))


def _with_size(settings: Settings, what: str, size: int) -> Settings:
    """The settings with another `data.batch_size`, or `method.chunk_size`."""
    if what == "chunk_size":
        return settings.model_copy(update={"method": {**settings.method, what: size}})
    return settings.model_copy(update={"data": settings.data.model_copy(update={what: size})})


def largest_that_fits(step: Callable[[int], None], max_: int) -> int:
    """Double from 2 until a step runs out of memory, then bisect, to a sixteenth; 0 if not even the first fits.

    Args:
        step: takes one of a size.
        max_: no larger one is tried.
    """
    low, high = 0, min(2, max_)
    while _fits(step, high):
        if high == max_:
            return max_
        low, high = high, min(2 * high, max_)
    while low and high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(step, middle) else (low, middle)
    return low


def _fits(step: Callable[[int], None], size: int) -> bool:
    try:
        step(size)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not is_oom_error(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what the step has made
        return False
    finally:
        gc.collect()  # a trainer and its module hold each other
        torch.cuda.empty_cache()
    return True


def _gpu_of_this_process() -> torch.device:
    if not torch.cuda.is_available():
        raise ConfigError(
            "hardware.auto_batch needs a GPU, and there is none: set hardware.auto_batch=false and data.batch_size"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))


def _size_of_first_process(folder: RunFolder, what: str, patience_s: float) -> int:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if size := ((read_state(folder.path) or {}).get("auto_batch") or {}).get(what):
            return int(size)
        time.sleep(1)
    raise ConfigError(f"hardware.auto_batch: the first process has found no {what} within {patience_s:g} s")


def _take_steps(settings: Settings, parts: _Build, batch_size: int, device: torch.device) -> None:
    """Train a module that is thrown away for three optimizer steps, as the run would, on this device alone."""
    # The second batch of a step has gradients beside its activations, and so have all later ones.
    accumulate = min(2, settings.trainer.accumulate_grad_batches)
    on_gpu = device.type == "cuda"
    with isolate_rng(include_cuda=on_gpu), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # what there is to say is said of the run
        module, data = parts(settings)
        trainer = L.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=[device.index or 0] if on_gpu else 1,
            plugins=[LightningEnvironment()],  # the job's own has more devices
            precision=resolve_precision(settings.hardware.precision, settings.hardware.accelerator),  # type: ignore[arg-type]
            max_steps=_NUM_STEPS,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # DDP sends gradients from a copy of them.
        gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        with _room_left(device, gradients if settings.world_size > 1 else 0):
            trainer.fit(module, datamodule=data.rehearsal(batch_size, _NUM_STEPS * accumulate))


@contextmanager
def _room_left(device: torch.device, reserve: int) -> Iterator[None]:
    """Limit torch to the free memory of a GPU, less a tenth and `reserve` bytes."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    free, total = torch.cuda.mem_get_info(device)
    room = min(free + torch.cuda.memory_reserved(device), before * total) * (1 - _SPARE) - reserve
    torch.cuda.set_per_process_memory_fraction(max(0.0, room) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


class MemoryAdvice(L.Callback):
    """Puts into an out-of-memory error what can be done about it."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say it, with the first line of what torch says."""
        if isinstance(exception, torch.OutOfMemoryError):
            reason = str(exception).partition("\n")[0] or "out of memory"
            exception.args = (
                "the GPU's memory is not enough for this run. What helps:\n"
                "  a smaller data.batch_size; hardware.auto_batch=true looks for the largest that fits\n"
                "  method.chunk_size=N, which embeds N lesions at a time and keeps the batch (docs/large_batches.md)\n"
                "  hardware.precision=bf16-mixed or hardware.gradient_checkpointing=true\n"
                "  a smaller data.patch_size or encoder; more devices with fewer lesions each\n"
                f"torch says: {reason}",
            )
