"""A training run from its settings: the one place where data, model, method and trainer meet.

Read `train` from top to bottom; everything it calls takes plain values.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from fmcib_ssl import signals
from fmcib_ssl.auto_batch import fit_to_memory
from fmcib_ssl.components import accelerate, blame, build, build_module, build_trainer, build_views
from fmcib_ssl.data.datamodule import LesionDataModule
from fmcib_ssl.data.workers import no_worker_left
from fmcib_ssl.evaluation.figures import ContactRow, contact_sheet, training_curves
from fmcib_ssl.io import checksum_of
from fmcib_ssl.lesion_source import open_lesions
from fmcib_ssl.methods.pretraining import Pretraining
from fmcib_ssl.models.export import export_encoder
from fmcib_ssl.preflight import check_disk
from fmcib_ssl.safety import redacted, without_names
from fmcib_ssl.settings import ConfigError, Settings
from fmcib_ssl.summary import num_steps, summary
from fmcib_ssl.training.checkpoints import RunCheckpoints, WholeFileIO, find_checkpoint, restored_state, step_of
from fmcib_ssl.training.online_probe import OnlineProbe
from fmcib_ssl.training.provenance import environment
from fmcib_ssl.training.ranks import RanksAgree, facts_of_rank
from fmcib_ssl.training.run_folder import ANEW, RunFolder, RunFolderError, saved_settings
from fmcib_ssl.training.same_run import check_same_run, unlike_the_last
from fmcib_ssl.training.throughput import duration
from fmcib_ssl.training.tracking import (
    MetricsFile,
    Resumable,
    ShowsPictures,
    Start,
    WeightsAndBiases,
    read_metrics,
)
from fmcib_ssl.types import Preprocessing, SampleKey, UserError

logger = logging.getLogger(__name__)

#: Errors whose message is for the user; a traceback would add nothing.
USER_ERRORS = (UserError, torch.OutOfMemoryError)


def train(settings: Settings) -> float:
    """Pretrain an encoder and leave everything worth keeping in the run folder; gives the last loss.

    Writes `run.json`, `config.yaml`, `environment.json`, `rejected.csv` (if rows were set aside), `contact_sheet.png`
    (before the first step), `metrics.csv`, `checkpoints/`, `encoder.safetensors` and `curves.png`. A run that was
    stopped is gone on with, one that is finished is left as it is.

    Raises:
        ConfigError: settings that contradict each other, the data or the machine.
        AnnotationsError, ScanError, StoreError: data that cannot be used.
        RunFolderError: a folder that holds another run, or no checkpoint that can be used.
        WorkerDiedError: a data worker was killed.
        fmcib_ssl.signals.Stopped: by a signal; what was learned is saved.
    """
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    _check_devices(settings)
    folder = RunFolder(settings.paths.run, main_process=main_process)
    try:
        return _train(settings, folder, main_process)
    finally:
        folder.release()


def _train(settings: Settings, folder: RunFolder, main_process: bool) -> float:
    _prepare_process(settings, main_process)
    checkpoint = _checkpoint_to_resume(settings, folder, main_process)
    if _is_finished(settings, folder):
        return _last_loss(folder)
    step = step_of(checkpoint) if checkpoint else 0

    source = open_lesions(settings, main_process=main_process)
    if checkpoint is not None:
        folder.check_lesions(
            [source.checksum, checksum_of(_files_that_list_lesions(settings))]
        )  # the second is of earlier versions
    view_transform = build_views(settings)
    with blame("hardware"):
        data = LesionDataModule(
            source.patches,
            view_transform,
            preprocessing=source.preprocessing,
            batch_size=settings.data.batch_size,
            max_batch_size=settings.data.max_batch_size,
            num_workers=settings.hardware.num_workers,
            seed=settings.seed,
            pin_memory=settings.hardware.pin_memory,
            views_on=settings.hardware.views_on,
        )
    num_lesions = len(source.patches)
    batch_size = _batch_size(settings, data, num_lesions)
    _, all_steps = num_steps(settings, num_lesions // (batch_size * settings.world_size))
    module = build_module(settings, source.preprocessing, batch_size, all_steps)
    module.metadata.setdefault("extra", {})["run_id"] = folder.run_id
    accelerate(module, module.encoder, settings.hardware)
    trainer = _trainer(settings, source.patches)
    batch_size = fit_to_memory(
        settings, data, module, trainer, folder, batch_size=batch_size, trained=checkpoint is not None
    )
    trackers = [its for its in trainer.loggers if isinstance(its, WeightsAndBiases)]
    began = time.monotonic()

    if main_process:
        check_disk(folder.path, 3 * sum(p.numel() * p.element_size() for p in module.parameters()))
        folder.note(data_checksum=source.checksum)
        logger.info("%s", summary(settings, source, batch_size, module, step))
        sheet = folder.path / "contact_sheet.png"
        draw = partial(draw_contact_sheet, data, source.preprocessing, num_rows=settings.contact_sheet_rows)
        if settings.contact_sheet_rows and not (checkpoint and sheet.is_file()):
            draw(sheet)
            logger.info("views to look at before anything is learned: %s", sheet)
        _begin_tracking(trainer, settings, folder, step, draw)

    @cache
    def begin() -> None:
        if main_process:
            _note_start(settings, folder, step)

    # The last of all callbacks: the others may refuse, and what an earlier start has left must not be touched then.
    trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: begin()))  # type: ignore[attr-defined]
    asks = any(isinstance(callback, RunCheckpoints) for callback in trainer.checkpoint_callbacks)
    with signals.deferred() if asks else nullcontext(), no_worker_left():
        exit_code = 1
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
            exit_code = 0
            begin()  # also where there was no step left to take
            loss = float(trainer.callback_metrics.get("train/loss", _last_loss(folder)))
            if trainer.is_global_zero:
                _write_results(module, settings, source.preprocessing, folder.path)
                _check_all_is_saved(trainer, folder, checkpoints=asks)
                folder.finish(step=trainer.global_step, loss=loss, **_length(settings))
                logger.info("%s", _outcome(settings, trainer, loss, time.monotonic() - began))
        finally:
            for tracker in trackers:
                tracker.finish(exit_code)
    return loss


def _prepare_process(settings: Settings, main_process: bool) -> None:
    if settings.hardware.num_threads is not None:
        torch.set_num_threads(settings.hardware.num_threads)
    L.seed_everything(settings.seed, verbose=False)
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # our own summary says more
    warnings.filterwarnings("ignore", message=".* directory .* exists and is not empty")  # it is the run's
    for of_no_use in (  # Lightning's to mend, or meant so; nothing a user can do
        ".*isinstance.treespec, LeafSpec.* is deprecated",
        ".*all_gather is deprecated",
        ".*Grad strides do not match bucket view strides",  # of 1 x 1 x 1 kernels laid out channels last
        ".*It is recommended to use .self.log.'online/.* sync_dist=True",  # the probe's figures are the same on all
        ".*overridden `transfer_batch_to_device` in `LightningModule`",
        ".*`srun` command is available on your system but is not used",  # preflight has looked
    ):
        warnings.filterwarnings("ignore", message=of_no_use)
    if not main_process:
        logging.getLogger("fmcib_ssl").setLevel(logging.ERROR)  # what every process would say is said once
        warnings.simplefilter("ignore")


def _checkpoint_to_resume(settings: Settings, folder: RunFolder, main_process: bool) -> Path | None:
    run_id = None if folder.is_lost else folder.run_id
    checkpoint = find_checkpoint(folder.checkpoints, run_id, main_process=main_process)
    if checkpoint is not None and folder.is_lost:
        folder.restore(restored_state(checkpoint))
        logger.warning("%s has lost its run.json: it is restored from %s", folder.path, checkpoint.name)
    now = redacted(settings.model_dump(mode="json"))
    if checkpoint is None:
        if main_process and (difference := unlike_the_last(folder.path, now)):
            logger.warning("%s", difference)
        return None
    if main_process and (before := saved_settings(folder.path)) is not None:  # rank 0 is about to write it anew
        changes = check_same_run(before, now, folder.path)
        if not _is_finished(settings, folder, quietly=True):
            logger.info("resuming %s at step %d; run=new starts afresh", folder.path, step_of(checkpoint))
            for change in changes:
                logger.info("  with another %s", change)
    return checkpoint


def _length(settings: Settings) -> dict[str, int | None]:
    return {"max_epochs": settings.trainer.max_epochs, "max_steps": settings.trainer.max_steps}


def _is_finished(settings: Settings, folder: RunFolder, *, quietly: bool = False) -> bool:
    """Whether the folder's run was trained as long as it is to be, and has left its results."""
    done = folder.finished
    finished = (
        done is not None
        and {key: done.get(key) for key in _length(settings)} == _length(settings)
        and (folder.path / "encoder.safetensors").is_file()
    )
    if done and finished and not quietly:
        logger.info(
            "the run in %s is finished, after %d steps: nothing to do. To train it for longer raise "
            "trainer.max_epochs; %s", folder.path, done.get("step", 0), ANEW,
        )  # fmt: skip
    return finished


def _last_loss(folder: RunFolder) -> float:
    losses = [row["train/loss"] for row in read_metrics(folder.path / "metrics.csv")[1] if row.get("train/loss")]
    return float(losses[-1]) if losses else float("nan")


def _files_that_list_lesions(settings: Settings) -> list[Path]:
    data = settings.data
    if data.store is not None:
        return sorted(path for path in data.store.iterdir() if path.suffix in (".json", ".parquet"))
    assert data.annotations is not None
    return [data.annotations]


def _begin_tracking(
    trainer: L.Trainer, settings: Settings, folder: RunFolder, step: int, draw: Callable[..., Path]
) -> None:
    """Let loggers resume, and give them the contact sheet; one that leaves the machine names no scans."""
    start = Start(folder.run_id, step, folder.path / "metrics.csv", _record(settings, folder))
    for its in trainer.loggers:
        if isinstance(its, Resumable):
            its.go_on(start)
        if isinstance(its, WeightsAndBiases) and settings.contact_sheet_rows:
            with TemporaryDirectory() as scratch:
                its.show("contact_sheet", draw(Path(scratch) / "contact_sheet.png", names=False))
        elif isinstance(its, ShowsPictures):
            its.show("contact_sheet", folder.path / "contact_sheet.png")


def _record(settings: Settings, folder: RunFolder) -> dict[str, Any]:
    """What a tracking server is told of a run: settings and versions, without secrets, places and names of lesions."""
    values: dict[str, Any] = redacted(settings.model_dump(mode="json", exclude={"paths"}))
    about = {key: value for key, value in environment().items() if key != "command"}
    return {**without_names(values), "environment": about, "data_checksum": folder.state["data_checksum"]}


def draw_contact_sheet(
    data: LesionDataModule, preprocessing: Preprocessing, path: Path, num_rows: int, *, names: bool = True
) -> Path:
    """Draw what the encoder will see: lesions, spread over the table, with the views of epoch 0.

    Args:
        data: of the run.
        preprocessing: of its patches.
        path: of the picture.
        num_rows: lesions on it.
        names: whether lesions are called by their scans, whose names may be patients', or by their numbers.
    """
    dataset = data.dataset
    num_rows = min(num_rows, len(dataset))
    rows = []
    for i in range(num_rows):
        key = SampleKey(0, i * len(dataset) // num_rows)
        pair, views = dataset.patches[key], dataset[key]
        title = dataset.patches.title(pair["lesion"]) if names else f"lesion {pair['lesion']}"
        rows.append(ContactRow(title, pair["positive"], views["positive"], _first_negative(views["negative"])))
    return contact_sheet(rows, path, preprocessing)


def _first_negative(views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Of one negative `(1, z, y, x)` itself, of `(K, 1, z, y, x)` the first, if there is one."""
    if views[0].ndim == 4:
        return views
    return (views[0][0], views[1][0]) if len(views[0]) else None


def _check_devices(settings: Settings) -> None:
    wanted, accelerator = settings.hardware.devices, settings.hardware.accelerator
    if accelerator == "gpu" and (there := torch.cuda.device_count()) < wanted:
        raise ConfigError(
            f"hardware.devices={wanted}, but torch {torch.__version__} sees {there} GPU{'s' * (there != 1)} on this "
            "machine: ask for fewer, or train with hardware=cpu"
        )


def _batch_size(settings: Settings, data: LesionDataModule, num_lesions: int) -> int:
    """Lesions a step on each device, after a look at what the data and the method allow."""
    world_size = settings.world_size
    try:
        batch_size = data.batch_size_per_device(world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if batch_size * world_size > num_lesions:
        raise ConfigError(
            f"data.batch_size={batch_size} on {world_size} device{'s' * (world_size > 1)} takes "
            f"{batch_size * world_size} lesions a step, and there are {num_lesions} that can be used: "
            "lower it, or set data.batch_size=auto"
        )
    if settings.loss.get("negatives") == "lesions" and batch_size * world_size < 2:
        raise ConfigError(
            "loss.negatives=lesions contrasts the lesions of a batch with each other, and there is one lesion a step: "
            "add lesions, or choose loss.negatives=mined"
        )
    num_chunks = -(-batch_size // (settings.method.get("chunk_size") or batch_size))
    one_by_one = settings.method.get("forwards") == "separate" and batch_size // num_chunks == 1
    if one_by_one and settings.head.get("batch_norm"):
        raise ConfigError(
            "method.forwards=separate sends one view at a time, and batch norm in the head needs more than one: "
            "set method.forwards=joint or head.batch_norm=false"
            + (", or a larger method.chunk_size" if batch_size > 1 else "")
        )
    return batch_size


def _trainer(settings: Settings, patches: Any) -> L.Trainer:
    hardware = settings.hardware
    strategy: str | DDPStrategy = hardware.strategy
    if strategy == "ddp" or (strategy == "auto" and settings.world_size > 1):
        strategy = DDPStrategy(timeout=timedelta(seconds=hardware.collective_timeout_s))
    loggers = [build("logger", component) for component in (settings.logger or {}).values()]
    callbacks = [build("callbacks", component) for component in (settings.callbacks or {}).values()]
    if settings.world_size > 1:
        callbacks.append(RanksAgree(facts_of_rank(redacted(settings.model_dump(mode="json")), patches)))
    trainer = build_trainer(
        settings,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategy,
        sync_batchnorm=hardware.sync_batchnorm,
        default_root_dir=settings.paths.run,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeFileIO()],
    )
    # Its own handlers save in the midst of a step, or call a collective from within a signal handler.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _note_start(settings: Settings, folder: RunFolder, step: int) -> None:
    facts, job = environment(), os.environ.get("SLURM_JOB_ID")
    config = redacted(settings.model_dump(mode="json"))
    folder.begin(config, facts, step=step, commit=facts["git"]["commit"], job=job)


def _check_all_is_saved(trainer: L.Trainer, folder: RunFolder, *, checkpoints: bool) -> None:
    """Refuse to call a run finished of which a full disk has taken less than all."""
    again = "which could not be written: make room, then give the same command again"
    if checkpoints and folder.num_saved() != trainer.global_step:
        raise RunFolderError(f"{folder.checkpoints} lacks the last checkpoint, {again}")
    for its in trainer.loggers:
        if isinstance(its, MetricsFile) and its.unwritten:
            raise RunFolderError(f"{its.path} lacks the last {len(its.unwritten)} rows, {again}")


def _write_results(module: Pretraining, settings: Settings, preprocessing: Preprocessing, run: Path) -> None:
    trainer = module.trainer
    extra = {"run": settings.name, "step": trainer.global_step, "epoch": trainer.current_epoch, "seed": settings.seed}
    weights = run / "encoder.safetensors"
    export_encoder(module.encoder, settings.encoder, preprocessing, weights, extra=extra)
    lines = [f"encoder    {weights}   (fmcib_ssl.load_encoder reads it)"]
    if (run / "metrics.csv").is_file():
        curves = training_curves(run / "metrics.csv", run / "curves.png")
        lines.append(f"curves     {curves}")
        for its in trainer.loggers:
            if isinstance(its, ShowsPictures):
                its.show("curves", curves)
    logger.info("%s", "\n".join(lines))


def _outcome(settings: Settings, trainer: L.Trainer, loss: float, seconds: float) -> str:
    """What came of the run, and the command that a user is likely to want next."""
    data, run = settings.data, settings.paths.run
    lines = [f"done       {trainer.global_step} steps, loss {loss:.4g}; this start took {duration(seconds)}"]
    probes = (callback for callback in trainer.callbacks if isinstance(callback, OnlineProbe))  # type: ignore[attr-defined]
    lines += [f"probe      {probe.last_result}" for probe in probes if probe.last_result]
    source: dict[str, Path | str | None] = {"store": data.store}
    if data.store is None:
        source = {"annotations": data.annotations, "image_root": data.image_root, "path_prefix": data.path_prefix}
        if data.coordinates != "lps":
            source["coordinates"] = data.coordinates
    arguments = {"checkpoint": run, **source, "output": run / "features.parquet"}
    given = [f"{key}={value}" for key, value in arguments.items() if value is not None]
    lines.append(f"next       {shlex.join(['python', 'scripts/embed.py', *given])}")
    return "\n".join(lines)
