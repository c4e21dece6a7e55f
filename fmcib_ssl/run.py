"""Pretraining and fine-tuning from their settings: the one place where data, model, method and trainer meet.

Read `pretrain` and `finetune` from top to bottom; everything they call takes plain values.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_only

from fmcib_ssl import training
from fmcib_ssl.data import LesionPatches, no_worker_left
from fmcib_ssl.io import checksum_of, redacted, without_names
from fmcib_ssl.training import ANEW, ConfigError, RunFolder, RunFolderError, Settings, signals
from fmcib_ssl.types import Preprocessing

logger = logging.getLogger(__name__)

#: Sections that only pretraining uses.
_ONLY_PRETRAINING = ("method", "loss", "head", "logger", "callbacks", "contact_sheet_rows", "identifiers")


def pretrain(settings: Settings) -> float:
    """Pretrain an encoder and leave everything worth keeping in the run folder; gives the last loss.

    Writes `run.json`, `config.yaml`, `environment.json`, `rejected.csv` (if rows were rejected), `contact_sheet.png`
    (before the first step), `metrics.csv`, `checkpoints/`, `encoder.safetensors` and `curves.png`. A run that was
    stopped is resumed, one that is finished is left as it is.

    Raises:
        UserError: settings that contradict each other, the data or the machine; data that cannot be used; a folder
            that holds another run, or no checkpoint that can be used; a data worker that was killed.
        fmcib_ssl.training.signals.Stopped: by a signal; what was learned is saved.
    """
    with _run_folder(settings) as folder:
        checkpoint = training.find_checkpoint(folder.checkpoints, folder.run_id, main_process=folder.main_process)
        changes = folder.check_settings(settings.shown()) if checkpoint is not None and folder.main_process else []
        if _is_finished(settings, folder):
            logger.info(
                "the run in %s is finished, after %d steps: nothing to do. To train it for longer raise "
                "trainer.max_epochs; %s", folder.path, folder.state["finished"].get("step", 0), ANEW,
            )  # fmt: skip
            return _last_loss(folder)
        step = training.step_of(checkpoint) if checkpoint else 0
        if checkpoint is not None:
            logger.info("resuming %s at step %d; run=new starts afresh", folder.path, step)
            for change in changes:
                logger.info("  with another %s", change)
        return _train(settings, folder, checkpoint, step)


def _train(settings: Settings, folder: RunFolder, checkpoint: Path | None, step: int) -> float:
    start = training.warm_start(settings, checkpoint)
    patches, checksum, preprocessing = _lesions(settings, start, folder, resumed=checkpoint is not None)
    data = training.build_data(settings, patches, training.build_views(settings), preprocessing)
    batch_size = training.batch_size_of(settings, data)
    _, all_steps = training.num_steps(settings, len(patches) // (batch_size * settings.world_size))
    module = training.build_module(settings, preprocessing, batch_size, all_steps, folder.run_id, start=start)
    training.accelerate(module, module.encoder, settings.hardware)

    @cache
    def begin() -> None:
        if folder.main_process:
            folder.begin(settings.shown(), training.environment(), step=step)

    callbacks = training.build_parts("callbacks", settings.callbacks)
    if settings.world_size > 1:
        facts = training.facts_of_rank(settings.shown(), patches)
        facts["newest step in the run folder, which all nodes must see"] = f"{step} in {folder.path.name}"
        callbacks.append(LambdaCallback(setup=lambda *_, **__: training.check_ranks_agree(facts)))
    # Once all others were set up: they may refuse, and what an earlier start has left must not be touched then.
    callbacks.append(LambdaCallback(on_train_batch_start=lambda *_: begin()))
    trainer = training.build_trainer(
        settings,
        default_root_dir=folder.path,
        logger=training.build_parts("logger", settings.logger) if folder.main_process else [],
        callbacks=callbacks,
        plugins=[training.WholeFileIO()],
    )
    began = time.monotonic()
    if folder.main_process:
        folder.note(data_checksum=checksum, **({"started_from": start.record} if start and start.record else {}))
        logger.info("%s", training.run_summary(settings, patches, batch_size, module, step))
        draw = partial(training.draw_contact_sheet, data, preprocessing, num_rows=settings.contact_sheet_rows)
        _begin_tracking(trainer, settings, folder, step, draw)

    saves = any(isinstance(callback, training.RunCheckpoints) for callback in trainer.checkpoint_callbacks)
    with signals.deferred() if saves else nullcontext(), no_worker_left():
        exit_code = 1
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
            exit_code = 0
            begin()  # also where there was no step left to take
            loss = float(trainer.callback_metrics.get("train/loss", _last_loss(folder)))
            if trainer.is_global_zero:
                training.write_results(module, settings, preprocessing, folder.path)
                _check_all_is_saved(trainer, folder, checkpoints=saves)
                folder.finish(step=trainer.global_step, loss=loss, **_length(settings))
                seconds = time.monotonic() - began
                logger.info("%s", training.outcome(folder.path, patches.store.path, trainer, loss, seconds))
        finally:
            for tracker in trainer.loggers:
                if isinstance(tracker, training.RunLogger):
                    tracker.finish(exit_code)
    return loss


def _lesions(
    settings: Settings, start: training.Start | None, folder: RunFolder, *, resumed: bool
) -> tuple[LesionPatches, str, Preprocessing]:
    """The lesions with their checksum, and how their patches are cut and scaled: as the weights know them, if any."""
    if start is not None:
        settings = training.with_patches_of(settings, start.preprocessing, settings.encoder["weights"])
    patches, checksum = training.open_lesions(settings, main_process=folder.main_process)
    if resumed:  # a run of an earlier version has the checksum of these files
        store, table = settings.data.store, settings.data.annotations
        files = sorted(f for f in store.glob("*") if f.suffix in (".json", ".parquet")) if store else [table]
        folder.check_lesions(checksum, checksum_of(file for file in files if file is not None))
    if start is None:
        return patches, checksum, patches.preprocessing
    return patches, checksum, replace(start.preprocessing, padding_hu=patches.preprocessing.padding_hu)


def finetune(settings: Settings) -> float:
    """Train on labels, test on other patients; gives the first metric, for sweepers.

    One training for each fold of patients, or one for a given split. Writes `config.yaml`, `environment.json`,
    `results.json` (every metric with an interval over patients) and `predictions.parquet` (validation and test
    lesions), and for every fold a folder with `metrics.csv`, `checkpoints/best.ckpt`, `encoder.safetensors` and its own
    `predictions.parquet`. A run that was stopped resumes with the first fold that is not finished.

    Raises:
        UserError: settings that contradict each other, the data, the weights or the machine; a folder that holds
            another run, or that another process uses.
    """
    options = settings.finetune
    assert options is not None
    if options.label is None:
        raise ConfigError("finetune.label has no value: name the column to be learned, finetune.label=COLUMN")
    if settings.world_size > 1:
        raise ConfigError("fine-tuning runs on one device: set hardware.devices=1 and hardware.num_nodes=1")
    if weights := settings.encoder.get("weights"):
        if options.weights is not None:
            raise ConfigError("encoder.weights and finetune.weights are the same: give one of them")
        options = options.model_copy(update={"weights": Path(weights)})
    unused = [*_ONLY_PRETRAINING, *["encoder"] * (options.weights is not None and not weights)]
    training.refuse_unused(unused, "fine-tuning", "finetune", options.model_dump())
    with _run_folder(settings) as folder:
        return training.fine_tune(settings, options, folder)


@contextmanager
def _run_folder(settings: Settings) -> Iterator[RunFolder]:
    """The run's folder, held by its main process, in a process that is ready to train."""
    num_devices, available = settings.hardware.devices, torch.cuda.device_count()
    if settings.hardware.accelerator == "gpu" and available < num_devices:
        raise ConfigError(
            f"hardware.devices={num_devices}, but torch {torch.__version__} sees {available} "
            f"GPU{'s' * (available != 1)} on this machine: ask for fewer, ask Slurm for GPUs "
            "(#SBATCH --gpus-per-node), start the container with --gpus all, or train with hardware=cpu"
        )
    folder = RunFolder(settings.paths.run, main_process=getattr(rank_zero_only, "rank", 0) == 0)
    try:
        _prepare_process(settings, folder.main_process)
        yield folder
    finally:
        folder.release()


def _prepare_process(settings: Settings, main_process: bool) -> None:
    if settings.hardware.num_threads is not None:
        torch.set_num_threads(settings.hardware.num_threads)
    L.seed_everything(settings.seed, verbose=False)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # our own summary says more
    for useless in (  # Lightning's to mend, or meant so; nothing a user can do
        ".* directory .* exists and is not empty",  # it is the run's
        ".*isinstance.treespec, LeafSpec.* is deprecated",
        ".*all_gather is deprecated",
        ".*Grad strides do not match bucket view strides",  # of 1 x 1 x 1 kernels laid out channels last
        ".*overridden `transfer_batch_to_device` in `LightningModule`",
        "Found .* module.* in eval mode",  # what is frozen
        ".*`srun` command is available on your system but is not used",  # check_machine has looked
    ):
        warnings.filterwarnings("ignore", message=useless)
    if not main_process:
        logging.getLogger("fmcib_ssl").setLevel(logging.ERROR)  # what every process would say is said once
        warnings.simplefilter("ignore")


def _length(settings: Settings) -> dict[str, int | None]:
    return {"max_epochs": settings.trainer.max_epochs, "max_steps": settings.trainer.max_steps}


def _is_finished(settings: Settings, folder: RunFolder) -> bool:
    """Whether the folder's run was trained as long as it is to be, and has left its results."""
    done = folder.state["finished"] or {}
    return _length(settings).items() <= done.items() and (folder.path / "encoder.safetensors").is_file()


def _last_loss(folder: RunFolder) -> float:
    loss = training.last_value(training.read_metrics(folder.path / "metrics.csv"), "train/loss")
    return float("nan") if loss is None else loss


def _begin_tracking(
    trainer: L.Trainer, settings: Settings, folder: RunFolder, step: int, draw: Callable[..., Path]
) -> None:
    """Draw the contact sheet, let loggers resume, and show it there; one that leaves the machine names no scans."""
    sheet = folder.path / "contact_sheet.png"
    if settings.contact_sheet_rows and not (step and sheet.is_file() and settings.identifiers == "show"):
        draw(sheet, identifiers=settings.identifiers)
        logger.info("views to look at before anything is learned: %s", sheet)
    record = _record(settings, folder)
    for tracker in trainer.loggers:
        if not isinstance(tracker, training.RunLogger):
            continue
        tracker.resume_from(folder, step, record)
        if isinstance(tracker, training.WeightsAndBiases) and settings.contact_sheet_rows:
            with TemporaryDirectory() as scratch:
                tracker.show("contact_sheet", draw(Path(scratch) / "contact_sheet.png", identifiers="hash"))
        elif sheet.is_file():
            tracker.show("contact_sheet", sheet)


def _record(settings: Settings, folder: RunFolder) -> dict[str, Any]:
    """What a tracking server is told of a run: settings and versions, without secrets, places and names of lesions."""
    values: dict[str, Any] = redacted(settings.model_dump(mode="json", exclude={"paths"}))
    about = {key: value for key, value in training.environment().items() if key != "command"}
    return {**without_names(values), "environment": about, "data_checksum": folder.state["data_checksum"]}


def _check_all_is_saved(trainer: L.Trainer, folder: RunFolder, *, checkpoints: bool) -> None:
    """Refuse to call a run finished of which a full disk has taken less than all."""
    again = "which could not be written: make room, then give the same command again"
    if checkpoints and training.num_saved(folder.path) != trainer.global_step:
        raise RunFolderError(f"{folder.checkpoints} lacks the last checkpoint, {again}")
    for tracker in trainer.loggers:
        if isinstance(tracker, training.MetricsFile) and tracker.unwritten:
            raise RunFolderError(f"{tracker.path} lacks the last {len(tracker.unwritten)} rows, {again}")
