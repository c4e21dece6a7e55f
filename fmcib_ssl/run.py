"""Pretraining and fine-tuning from their settings: the one place where data, model, method and trainer meet.

Read `pretrain` and `finetune` from top to bottom; everything it calls takes plain values.
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
import pandas as pd
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import fmcib_ssl
from fmcib_ssl.data.loader import LesionDataModule
from fmcib_ssl.data.workers import no_worker_left
from fmcib_ssl.evaluation.charts import training_curves
from fmcib_ssl.evaluation.feature_table import FeatureTableError
from fmcib_ssl.evaluation.figures import ContactRow, contact_sheet
from fmcib_ssl.evaluation.labels import EvaluationError
from fmcib_ssl.io import checksum_of, redacted, without_names, write_json
from fmcib_ssl.models.acceleration import resolve_precision
from fmcib_ssl.models.export import export_encoder
from fmcib_ssl.models.pretraining import Pretraining
from fmcib_ssl.training import signals
from fmcib_ssl.training.batch_search import fit_to_memory
from fmcib_ssl.training.build import (
    accelerate,
    blame,
    build,
    build_module,
    build_trainer,
    build_views,
    learning_rate,
    refuse_unused,
)
from fmcib_ssl.training.checkpoints import RunCheckpoints, WholeFileIO, find_checkpoint, restored_state, step_of
from fmcib_ssl.training.cluster import check_disk
from fmcib_ssl.training.finetuning import (
    labelled_task,
    results_of,
    starting_encoder,
    task_checksum,
    task_summary,
    train_part,
)
from fmcib_ssl.training.lesions import LesionSource, open_lesions
from fmcib_ssl.training.loggers import MetricsFile, RunLogger, Start, WeightsAndBiases, read_metrics
from fmcib_ssl.training.online_probe import OnlineProbe
from fmcib_ssl.training.provenance import RanksAgree, environment, facts_of_rank
from fmcib_ssl.training.run_folder import ANEW, RunFolder, RunFolderError, saved_settings
from fmcib_ssl.training.same_run import check_same_run, unlike_the_last
from fmcib_ssl.training.settings import Component, ConfigError, FineTune, Settings
from fmcib_ssl.training.throughput import duration
from fmcib_ssl.types import Preprocessing, SampleKey, UserError

logger = logging.getLogger(__name__)

#: Errors whose message is for the user; a traceback would add nothing.
USER_ERRORS = (UserError, torch.OutOfMemoryError)
#: Sections that only pretraining uses.
_UNUSED = ("method", "loss", "head", "logger", "callbacks", "contact_sheet_rows")


def pretrain(settings: Settings) -> float:
    """Pretrain an encoder and leave everything worth keeping in the run folder; gives the last loss.

    Writes `run.json`, `config.yaml`, `environment.json`, `rejected.csv` (if rows were set aside), `contact_sheet.png`
    (before the first step), `metrics.csv`, `checkpoints/`, `encoder.safetensors` and `curves.png`. A run that was
    stopped is gone on with, one that is finished is left as it is.

    Raises:
        ConfigError: settings that contradict each other, the data or the machine.
        AnnotationsError, ScanError, StoreError: data that cannot be used.
        RunFolderError: a folder that holds another run, or no checkpoint that can be used.
        WorkerDiedError: a data worker was killed.
        fmcib_ssl.training.signals.Stopped: by a signal; what was learned is saved.
    """
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    _check_devices(settings)
    folder = RunFolder(settings.paths.run, main_process=main_process)
    try:
        return _pretrain(settings, folder, main_process)
    finally:
        folder.release()


def _pretrain(settings: Settings, folder: RunFolder, main_process: bool) -> float:
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
    module = build_module(settings, source.preprocessing, batch_size, all_steps, folder.run_id)
    accelerate(module, module.encoder, settings.hardware)
    trainer = _trainer(settings, source.patches)
    batch_size = fit_to_memory(
        settings, data, module, trainer, folder, batch_size=batch_size, trained=checkpoint is not None
    )
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
                logger.info(
                    "%s", _outcome(settings, source.patches.store.path, trainer, loss, time.monotonic() - began)
                )
        finally:
            for its in trainer.loggers:
                if isinstance(its, RunLogger):
                    its.finish(exit_code)
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
        if not isinstance(its, RunLogger):
            continue
        its.resume_from(start)
        if isinstance(its, WeightsAndBiases) and settings.contact_sheet_rows:
            with TemporaryDirectory() as scratch:
                its.show("contact_sheet", draw(Path(scratch) / "contact_sheet.png", names=False))
        else:
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
        pair = dataset[key]
        views = dataset.collate([pair])
        title = dataset.patches.title(pair["lesion"]) if names else f"lesion {pair['lesion']}"
        positive, negative = ((first[0], second[0]) for first, second in (views["positive"], views["negative"]))
        rows.append(ContactRow(title, pair["positive"], positive, _first_negative(negative)))
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
    return build_trainer(
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
            if isinstance(its, RunLogger):
                its.show("curves", curves)
    logger.info("%s", "\n".join(lines))


def _outcome(settings: Settings, store: Path, trainer: L.Trainer, loss: float, seconds: float) -> str:
    """What came of the run, and the command that a user is likely to want next."""
    run = settings.paths.run
    lines = [f"done       {trainer.global_step} steps, loss {loss:.4g}; this start took {duration(seconds)}"]
    probes = (callback for callback in trainer.callbacks if isinstance(callback, OnlineProbe))  # type: ignore[attr-defined]
    lines += [f"probe      {probe.last_result}" for probe in probes if probe.last_result]
    arguments = [f"checkpoint={run}", f"store={store}", f"output={run / 'features.parquet'}"]
    lines.append(f"next       {shlex.join(['python', 'scripts/embed.py', *arguments])}")
    return "\n".join(lines)


def num_steps(settings: Settings, batches_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps in an epoch and in all; an epoch's last step may accumulate fewer batches than the others."""
    trainer = settings.trainer
    steps_per_epoch = -(-batches_per_epoch // trainer.accumulate_grad_batches)
    limits = []
    if trainer.max_epochs not in (None, -1):
        limits.append(trainer.max_epochs * steps_per_epoch)
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps)
    return steps_per_epoch, min(limits)


def summary(settings: Settings, source: LesionSource, batch_size: int, module: Pretraining, step: int) -> str:
    """One line a part of the run.

    Args:
        settings: of the run.
        source: its lesions.
        batch_size: of one device.
        module: what is trained.
        step: optimizer steps that were done before.
    """
    hardware, trainer, data = settings.hardware, settings.trainer, settings.data
    global_batch = batch_size * settings.world_size
    steps_per_epoch, all_steps = num_steps(settings, len(source.patches) // global_batch)
    parameters = sum(p.numel() for p in module.encoder.parameters()) / 1e6
    accumulated = f", {trainer.accumulate_grad_batches} accumulated" if trainer.accumulate_grad_batches > 1 else ""
    chunk_size = getattr(module, "chunk_size", None)
    chunks = f", in chunks of {chunk_size}" if chunk_size and chunk_size < batch_size else ""
    loss = ""
    if (of_module := getattr(module, "loss", None)) is not None:
        loss_arguments = ", ".join(f"{key} {value}" for key, value in settings.loss.items() if key != "_target_")
        loss = f", {type(of_module).__name__}: {loss_arguments}"
    schedule = _last_name(settings.schedule) if settings.schedule else "constant"
    rate = learning_rate(settings, batch_size)
    base_lr, reference_batch = settings.optimizer["base_lr"], settings.optimizer["reference_batch"]
    times = f" x {trainer.accumulate_grad_batches}" if accumulated else ""
    flops = module.flops_per_lesion
    work = "not counted" if flops is None else f"{flops / 1e9:.3g} GFLOP a lesion, forward and back"
    switches = ("channels_last", "trim", "compile", "gradient_checkpointing")
    switched_on = [name for name in switches if getattr(hardware, name)]
    rows = {
        "run": f"{settings.name}, fmcib_ssl {fmcib_ssl.__version__}, in {settings.paths.run}",
        "lesions": f"{len(source.patches)} in {source.num_scans} scans, from {source.origin}",
        "negatives": f"{data.per_lesion} a lesion, {data.mining}" if data.per_lesion else "none mined",
        "patch": f"{' x '.join(map(str, data.patch_size))} voxels (z, y, x) of {source.preprocessing.spacing_mm:g} mm",
        "batch": f"{batch_size} lesions on each of {settings.world_size} {hardware.accelerator} devices"
        f"{chunks}{accumulated}",
        "steps": f"{all_steps} in all, {steps_per_epoch} an epoch" + (f"; {step} are done" if step else ""),
        "encoder": f"{_last_name(settings.encoder)}, {parameters:.2f} M weights, "
        f"{module.metadata['feature_dim']} features",
        "work": work,
        "step": ", ".join([resolve_precision(hardware.precision, hardware.accelerator), *switched_on]),
        "method": f"{type(module).__name__}{loss}",
        "rate": f"{rate:.3g} at its highest = {base_lr:g} x {global_batch}{times} / {reference_batch}, "
        f"{_last_name(settings.optimizer)}, {schedule}",
    }
    return "\n".join(f"{name:<9}  {text}" for name, text in rows.items())


def _last_name(component: Component) -> str:
    name: str = component["_target_"].rsplit(".", 1)[-1]
    return name


def finetune(settings: Settings) -> float:
    """Train on labels, test on other patients; gives the first metric, for sweepers.

    Writes `config.yaml`, `environment.json`, `results.json` (every metric with an interval over patients) and
    `predictions.parquet` (validation and test lesions), and for every fold a folder with `metrics.csv`,
    `checkpoints/best.ckpt`, `encoder.safetensors` and its own `predictions.parquet`.

    Raises:
        ConfigError: settings that contradict each other, the data, the weights or the machine.
        RunFolderError: a folder that holds another run, or that another process uses.
    """
    assert settings.finetune is not None
    if settings.finetune.label is None:
        raise ConfigError("finetune.label has no value: name the column to be learned, finetune.label=COLUMN")
    if settings.world_size > 1:
        raise ConfigError("fine-tuning runs on one device: set hardware.devices=1 and hardware.num_nodes=1")
    unused = [*_UNUSED, "encoder"] if settings.finetune.weights is not None else _UNUSED
    refuse_unused(unused, "fine-tuning", "finetune", settings.finetune.model_dump())
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated")  # Lightning's to mend
    warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")  # what is frozen
    warnings.filterwarnings(
        "ignore", message="Experiment logs directory .* exists and is not empty"
    )  # a stopped fold's
    if settings.hardware.num_threads is not None:
        torch.set_num_threads(settings.hardware.num_threads)
    folder = RunFolder(settings.paths.run)
    try:
        return _finetune(settings, settings.finetune, folder)
    except (EvaluationError, FeatureTableError) as error:
        raise ConfigError(str(error)) from error
    finally:
        folder.release()


def _finetune(settings: Settings, asked: FineTune, folder: RunFolder) -> float:
    run, shown, num_done = folder.path, redacted(settings.model_dump(mode="json")), folder.num_saved()
    if (before := saved_settings(run)) is not None:
        for change in check_same_run(before, shown, run):
            logger.info("with another %s", change)
    elif difference := unlike_the_last(run, shown):
        logger.warning("%s", difference)
    encoder, spec = starting_encoder(settings, asked)
    task = labelled_task(settings, asked, getattr(encoder, "preprocessing", None))
    checksum = task_checksum(asked, task)
    if num_done:
        folder.check_lesions([checksum])
        what = (
            "resuming %s: %d of %d parts are done" if num_done < len(task.parts) else "%s is finished: %d of %d parts"
        )
        logger.info(f"{what}; run=new starts afresh", run, num_done, len(task.parts))
    logger.info("%s", task_summary(settings, asked, task, spec))
    if num_done < len(task.parts):
        facts, job = environment(), os.environ.get("SLURM_JOB_ID")
        folder.note(data_checksum=checksum)
        folder.begin(shown, facts, step=num_done, commit=facts["git"]["commit"], job=job)
    tables = []
    for part in task.parts:
        place = run / (f"fold_{part.name}" if asked.split is None else part.name)
        done = place / "predictions.parquet"
        if done.is_file():
            logger.info("%s is finished", place)
        else:
            with no_worker_left():
                train_part(settings, asked, task, part, place)
        tables.append(pd.read_parquet(done))
    predictions = pd.concat(tables, ignore_index=True)
    predictions.to_parquet(run / "predictions.parquet", index=False)
    rows = results_of(task, predictions, settings.seed, asked.num_bootstrap)
    about = {"label": task.labels.name, "kind": task.labels.kind, "classes": list(task.labels.classes)}
    write_json({"rows": rows, **about, "train": asked.train, "weights": asked.weights}, run / "results.json")
    lines = [f"{row['metric']:<20} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in rows]
    logger.info("%s on held-out patients\n%s\nin %s", task.labels.name, "\n".join(lines), run / "results.json")
    if folder.finished is None:
        folder.finish(step=len(task.parts))
    return float(rows[0]["value"])
