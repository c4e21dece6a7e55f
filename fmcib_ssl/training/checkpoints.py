"""Checkpoints that are whole or not there, taken between two steps, and found again by the same command.

Lightning's own `ModelCheckpoint` saves while a step is being finished: its metrics are not logged yet and would be
missing after a restart. `RunCheckpoints` saves when the next batch is there and nothing has been done with it, so what
is on disk is what was logged. Gradients that are being accumulated are not saved; it waits for the optimizer's step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from fmcib_ssl.data import held
from fmcib_ssl.io import atomic_write
from fmcib_ssl.models import FORMAT_VERSION, read_archive
from fmcib_ssl.training import signals
from fmcib_ssl.training.cluster import requeue
from fmcib_ssl.training.loggers import MetricsFile
from fmcib_ssl.training.run_folder import ANEW, CHECKPOINT_NAME, RunFolderError, read_state

logger = logging.getLogger(__name__)

#: Key in a checkpoint: random states, one a rank.
_RNG_KEY = "fmcib_ssl_rng"
#: What the newest checkpoint is also called.
_LAST = "last.ckpt"


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, flushes it to the disk, then renames it; reads nothing but plain data.

    A disk that is full does not end the training: that checkpoint is missing, and the log says so.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; afterwards there is a whole file of that name, or what was there before.

        Raises:
            RuntimeError: something else than the disk has failed, such as a data worker that was killed meanwhile.
        """
        path = Path(path)
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)  # a zip archive, with a CRC-32 of each member
        except (OSError, RuntimeError) as error:  # torch's writer turns what the disk says into a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            logger.error(
                "%s could not be saved (%s). Training goes on, and the checkpoints before it are kept: make room, or "
                "what is learned from here on may be lost", path, cause,
            )  # fmt: skip

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is ever run."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


class RunCheckpoints(Checkpoint):
    """Saves a run every so often and at its end, and when a signal asks the run to stop.

    The triggers may be combined; each is off where it is null. What it writes: `step-N.ckpt` for the newest few,
    `step-N-epoch-E.ckpt` for epochs that are kept for good, and `last.ckpt`, a link to the newest.

    All ranks stop after the same step: they compare what they have received before each one.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimizer steps.
        train_time_interval: arguments of `datetime.timedelta`, such as `{minutes: 15}`; rank 0's clock decides.
        save_top_k: how many of the newest are kept, at least 2: one may turn out to be damaged.
        keep_every_n_epochs: these epochs are saved and never removed.
        requeue: ask Slurm to start the job again where that is what the signal means (`training/cluster.py`); if not,
            whoever does goes by the exit code.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_train_steps: int | None = None,
        train_time_interval: Mapping[str, float] | None = None,
        save_top_k: int = 2,
        keep_every_n_epochs: int | None = None,
        requeue: bool = True,
    ) -> None:
        if any(n is not None and n < 1 for n in (every_n_train_steps, keep_every_n_epochs)):
            raise ValueError(
                f"every_n_train_steps={every_n_train_steps}, keep_every_n_epochs={keep_every_n_epochs}: each must be "
                "at least 1, or null for never"
            )
        if save_top_k < 2:
            raise ValueError(f"save_top_k={save_top_k}: keep at least 2, since the newest may turn out to be damaged")
        self.dirpath = Path(dirpath)
        self.every_n_train_steps = every_n_train_steps
        self.save_top_k = save_top_k
        self.keep_every_n_epochs = keep_every_n_epochs
        self.requeue = requeue
        self.interval_s = timedelta(**train_time_interval).total_seconds() if train_time_interval else math.inf
        self._saved_step = 0
        self._saved_at = 0.0
        self._position: tuple[int, int] | None = None  # whole epochs, and batches of the next, while it is saved
        self._sigterm_held = contextlib.ExitStack()
        self._random_states: list[dict[str, Any]] = []
        self._loader_states: list[dict[str, Any]] = []

    # What a checkpoint holds besides Lightning's.

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know, and set its counters to between two steps."""
        states = [random_state()]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(states, random_state())
        checkpoint[_RNG_KEY] = states
        if self._position is not None:
            _set_position(checkpoint["loops"]["fit_loop"], *self._position)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take what is set when training begins: the random states, and the position in the epoch."""
        self._random_states = checkpoint.get(_RNG_KEY, [])
        self._loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    # When.

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let SIGTERM wait: Lightning is about to handle it, in the midst of a step, and with a collective."""
        self._sigterm_held.enter_context(held([Signals.SIGTERM]))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let SIGTERM in again, if training has not begun."""
        self._sigterm_held.close()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set what the checkpoint was taken with."""
        signals.take_back()
        self._sigterm_held.close()
        if len(self._random_states) == trainer.world_size:
            set_random_state(self._random_states[trainer.global_rank])
        # Lightning does this only if nobody has asked for `estimated_stepping_batches` before, as schedules do.
        for state in self._loader_states:
            cast(Any, trainer.train_dataloader).load_state_dict(state)
        self._random_states, self._loader_states = [], []
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: save if it is time, and stop if a signal asks for it."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        epoch = trainer.current_epoch
        stop, due = self._agree(trainer, self._is_due(trainer, epoch, batch_idx))
        if (due or stop) and trainer.global_step != self._saved_step:
            self._save(trainer, epoch, batch_idx)
        if stop:
            self._stop(trainer, stop)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was learned in the end."""
        if trainer.global_step == self._saved_step:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        epoch = trainer.current_epoch
        # An epoch that the number of steps cut short is resumed, should there be more steps.
        whole = batches >= trainer.num_training_batches
        self._save(trainer, *((epoch, 0) if whole else (epoch - 1, batches)))

    def _is_due(self, trainer: L.Trainer, epoch: int, batch: int) -> bool:
        return (
            (self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0)
            or self._is_kept(epoch, batch)
            or (trainer.is_global_zero and time.monotonic() - self._saved_at >= self.interval_s)
        )

    def _is_kept(self, epoch: int, batch: int) -> bool:
        return batch == 0 and self.keep_every_n_epochs is not None and epoch % self.keep_every_n_epochs == 0

    def _agree(self, trainer: L.Trainer, due: bool) -> tuple[int, bool]:
        """The signal that any rank has received, and whether any wants to save; the same answer on all ranks."""
        received = int(signals.received() or 0)
        if trainer.world_size == 1:
            return received, due
        flags = torch.tensor([received, int(due)], device=trainer.strategy.root_device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        received, due = flags.tolist()
        return received, bool(due)

    # How.

    def _save(self, trainer: L.Trainer, epoch: int, batch: int) -> None:
        for tracker in trainer.loggers:
            tracker.save()
        unwritten = any(tracker.unwritten for tracker in trainer.loggers if isinstance(tracker, MetricsFile))
        if trainer.strategy.broadcast(unwritten):
            return  # a run resumed from it would lack these rows; that the disk is full was said
        for_good = f"-epoch-{epoch:04d}" if self._is_kept(epoch, batch) else ""
        path = self.dirpath / f"step-{trainer.global_step:08d}{for_good}.ckpt"
        self._position = (epoch, batch)
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._position = None
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        if trainer.is_global_zero and path.is_file():
            _link(path, self.dirpath / _LAST)
            others = [other for other in _newest_first(self.dirpath) if "-epoch-" not in other.name]
            for old in others[self.save_top_k :]:
                trainer.strategy.remove_checkpoint(old)

    def _stop(self, trainer: L.Trainer, received: int) -> None:
        signum = Signals(received)
        exit_code = signals.EXIT_CODES[signum]
        if trainer.is_global_zero:
            newest = next(iter(_newest_first(self.dirpath)), None)
            logger.warning(
                "stopped by %s after step %d; %s. The same command%s resumes from there",
                signum.name,
                trainer.global_step,
                f"saved in {newest}" if newest else "nothing was learned yet",
                ", without run=new," if "run=new" in sys.argv else "",
            )
            exit_code = requeue(signum, self.dirpath.parent, ask=self.requeue)
        exit_code = trainer.strategy.broadcast(exit_code)
        trainer.strategy.barrier("stop")
        # Lightning kills everything as soon as a process that it has started itself ends with another code than 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        launched = environment is not None and not environment.creates_processes_externally and trainer.local_rank > 0
        raise signals.Stopped(signum, exit_code=0 if launched else exit_code, acted_on=True)


def find_checkpoint(folder: Path, run_id: str, *, main_process: bool = True) -> Path | None:
    """The newest checkpoint of a run that is whole and its own; None if there are none at all.

    Those that are passed over are named in the log, and renamed to `*.unusable` by the main process.

    Args:
        folder: of checkpoints.
        run_id: of the run.
        main_process: whether this one may rename and report.

    Raises:
        RunFolderError: there are checkpoints, and none can be used.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in _newest_first(folder):
        problem = checkpoint_problem(path, run_id)
        if problem is None:
            if main_process and passed_over:
                for bad, reason in passed_over:
                    bad.replace(bad.with_name(f"{bad.name}.unusable"))
                    logger.warning("%s cannot be used (%s): resuming from the one before, %s", bad, reason, path.name)
                _link(path, folder / _LAST)
            return path
        passed_over.append((path, problem))
    if passed_over:
        raise RunFolderError(
            f"no checkpoint in {folder} can be used:\n"
            + "\n".join(f"  {path.name}: {reason}" for path, reason in passed_over)
            + f"\n{ANEW}"
        )
    return None


def weights_of_run(folder: Path) -> Path:
    """The encoder that a run has exported; of one that is not finished the newest checkpoint that is whole.

    Raises:
        RunFolderError: no run, or one that has neither.
    """
    if (exported := folder / "encoder.safetensors").is_file():
        return exported
    state = read_state(folder)
    checkpoint = find_checkpoint(folder / "checkpoints", state["run_id"], main_process=False) if state else None
    if checkpoint is None:
        raise RunFolderError(
            f"{folder} is no folder of a run with weights: it has neither encoder.safetensors nor a checkpoint of the "
            "run in run.json. Give the folder that the run's first line of the log names (of a fine-tuning that of one "
            "fold), once it has saved, or a file of weights"
        )
    step = step_of(checkpoint)
    logger.warning("the run in %s is not finished: taking its weights after %d steps, %s", folder, step, checkpoint)
    return checkpoint


def checkpoint_problem(path: Path, run_id: str) -> str | None:
    """What keeps a file from being resumed from, in words; None if nothing does."""
    try:
        checkpoint = read_archive(path)
    except ValueError as error:
        return str(error)
    if not isinstance(checkpoint, dict) or not {"fmcib_ssl", "loops", "optimizer_states"} <= checkpoint.keys():
        return "not a checkpoint of a training run of fmcib_ssl"
    about = checkpoint["fmcib_ssl"]
    about = about if isinstance(about, dict) else {}
    if (version := about.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        return f"format version {version}, and this version of fmcib_ssl reads {FORMAT_VERSION}"
    extra = about.get("extra")
    owner = extra.get("run_id") if isinstance(extra, dict) else None
    return None if owner == run_id else f"it belongs to another run ({owner}, this is {run_id})"


def step_of(path: Path) -> int:
    """The number of optimizer steps that a checkpoint was taken after."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: not the name of a checkpoint")
    return int(match[1])


def _newest_first(folder: Path) -> list[Path]:
    paths = (path for path in folder.glob("step-*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name))
    return sorted(paths, key=step_of, reverse=True)


def _link(path: Path, link: Path) -> None:
    """Call the newest checkpoint by its other name too."""
    unfinished = link.with_name(f".{link.name}.tmp")
    try:
        unfinished.unlink(missing_ok=True)
        try:
            unfinished.symlink_to(path.name)
        except OSError:  # a file system without, such as exFAT and the mounts of cloud drives
            shutil.copyfile(path, unfinished)
        unfinished.replace(link)
    except OSError as error:  # it is only a name: runs resume from the newest by its number
        logger.warning("%s does not name the newest checkpoint, %s: %s", link, path.name, error.strerror or error)


def _set_position(fit_loop: dict[str, Any], epoch: int, batch: int) -> None:
    """Let a trainer's saved counters say: so many whole epochs are done, and so many batches of the next.

    They are taken in the midst of a hook, where some count what is about to be done.
    """
    begun = epoch + (batch > 0)
    for count in fit_loop["epoch_progress"].values():
        count.update(ready=begun, started=begun, processed=epoch, completed=epoch)
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    batches["current"].update(ready=batch, started=batch, processed=batch, completed=batch)
    done = batches["total"]["completed"]
    batches["total"].update(ready=done, started=done, processed=done)
    if batch == 0:
        fit_loop["state_dict"].pop("combined_loader", None)  # it would leave out batches of the epoch before


# The random state of a process. Order, patches and views need none (they are functions of seed, epoch and lesion);
# layers such as dropout do.


def random_state() -> dict[str, Any]:
    """State of Python, NumPy, torch and, where there is one, the current CUDA device."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  (the one that is global)
    return {
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Take back a state of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
