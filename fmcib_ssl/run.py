"""A training run from its settings: the one place where data, model, method and trainer meet.

Read `train` from top to bottom; everything it calls takes plain values.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import fmcib_ssl
from fmcib_ssl.components import blame, build, build_module, learning_rate
from fmcib_ssl.data.datamodule import LesionDataModule
from fmcib_ssl.data.store import StoreError
from fmcib_ssl.data.tables import AnnotationsError, ScanError
from fmcib_ssl.evaluation.figures import ContactRow, contact_sheet, training_curves
from fmcib_ssl.lesion_source import LesionSource, open_lesions
from fmcib_ssl.methods.pretraining import Pretraining
from fmcib_ssl.models.export import export_encoder
from fmcib_ssl.settings import Component, ConfigError, Settings
from fmcib_ssl.training.provenance import environment, write_json
from fmcib_ssl.types import Preprocessing, SampleKey

logger = logging.getLogger(__name__)

#: Errors whose message is for the user; a traceback would add nothing.
UserError = (ConfigError, AnnotationsError, ScanError, StoreError)


def train(settings: Settings) -> float:
    """Pretrain an encoder and leave everything worth keeping in the run folder; gives the last loss.

    Writes `config.yaml`, `environment.json`, `rejected.csv` (if rows were set aside), `contact_sheet.png` (before the
    first step), `metrics.csv`, `checkpoints/last.ckpt`, `encoder.safetensors` and `curves.png`. A folder that
    already holds `checkpoints/last.ckpt` is gone on with.

    Raises:
        ConfigError: settings that contradict each other, the data or the machine.
        AnnotationsError, ScanError, StoreError: data that cannot be used.
    """
    run = settings.paths.run
    run.mkdir(parents=True, exist_ok=True)
    _check_devices(settings)
    if settings.hardware.num_threads is not None:
        torch.set_num_threads(settings.hardware.num_threads)
    L.seed_everything(settings.seed, verbose=False)
    main_process = getattr(rank_zero_only, "rank", 0) == 0
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)  # our own summary says more
    warnings.filterwarnings("ignore", message=".* directory .* exists and is not empty")  # it is the run's
    for lightnings_own in (".*isinstance.treespec, LeafSpec.* is deprecated", ".*all_gather is deprecated"):
        warnings.filterwarnings("ignore", message=lightnings_own)  # Lightning's to mend, nothing a user can do
    if main_process:
        _write_provenance(settings)
    else:
        logging.getLogger("fmcib_ssl").setLevel(logging.ERROR)  # what every process would say is said once

    source = open_lesions(settings, main_process=main_process)
    data = LesionDataModule(
        source.patches,
        build("augment", settings.augment),
        batch_size=settings.data.batch_size,
        max_batch_size=settings.data.max_batch_size,
        num_workers=settings.hardware.num_workers,
        seed=settings.seed,
        pin_memory=settings.hardware.pin_memory,
    )
    num_lesions = len(source.patches)
    batch_size = _batch_size(settings, data, num_lesions)
    _, num_steps = _num_steps(settings, num_lesions // (batch_size * settings.world_size))
    module = build_module(settings, source.preprocessing, batch_size, num_steps)
    trainer = _trainer(settings)

    if main_process:
        logger.info("%s", _summary(settings, source, batch_size, module))
        if settings.contact_sheet_rows:
            sheet = draw_contact_sheet(
                data, source.preprocessing, run / "contact_sheet.png", settings.contact_sheet_rows
            )
            logger.info("views to look at before anything is learned: %s", sheet)
    trainer.fit(module, datamodule=data, ckpt_path=_checkpoint_to_go_on_with(run))

    loss = trainer.callback_metrics.get("train/loss", torch.tensor(float("nan")))
    if trainer.is_global_zero:
        _write_results(module, settings, source.preprocessing, run)
    return float(loss)


def draw_contact_sheet(data: LesionDataModule, preprocessing: Preprocessing, path: Path, num_rows: int) -> Path:
    """Draw what the encoder will see: lesions, spread over the table, with the views of epoch 0."""
    dataset = data.dataset
    num_rows = min(num_rows, len(dataset))
    rows = []
    for i in range(num_rows):
        key = SampleKey(0, i * len(dataset) // num_rows)
        pair, views = dataset.patches[key], dataset[key]
        title = dataset.patches.title(pair["lesion"])
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
    if settings.method.get("forwards") == "separate" and settings.head.get("batch_norm") and batch_size == 1:
        raise ConfigError(
            "method.forwards=separate sends one view at a time, and batch norm in the head needs more than one: "
            "set method.forwards=joint or head.batch_norm=false"
        )
    return batch_size


def _num_steps(settings: Settings, batches_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps in an epoch and in all; an epoch's last step may accumulate fewer batches than the others."""
    trainer = settings.trainer
    steps_per_epoch = -(-batches_per_epoch // trainer.accumulate_grad_batches)
    limits = []
    if trainer.max_epochs not in (None, -1):
        limits.append(trainer.max_epochs * steps_per_epoch)
    if trainer.max_steps != -1:
        limits.append(trainer.max_steps)
    return steps_per_epoch, min(limits)


def _trainer(settings: Settings) -> L.Trainer:
    hardware = settings.hardware
    strategy = hardware.strategy
    if strategy == "auto" and settings.world_size > 1:
        strategy = "ddp"
    loggers = [build("logger", component) for component in (settings.logger or {}).values()]
    callbacks = [build("callbacks", component) for component in (settings.callbacks or {}).values()]
    with blame("hardware or trainer"):
        return L.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy,
            precision=hardware.precision,  # type: ignore[arg-type]  # checked by Lightning, with a good message
            sync_batchnorm=hardware.sync_batchnorm,
            use_distributed_sampler=False,  # EpochSampler knows ranks, and pads none
            enable_model_summary=False,
            default_root_dir=settings.paths.run,
            logger=loggers,
            callbacks=callbacks,
            **settings.trainer.model_dump(),
        )


def _checkpoint_to_go_on_with(run: Path) -> Path | None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        return None
    logger.info("going on from %s", checkpoint)
    metrics = run / "metrics.csv"
    if metrics.is_file() and getattr(rank_zero_only, "rank", 0) == 0:
        # The logger starts the file anew; what was measured so far is kept beside it.
        earlier = len(list(run.glob("metrics.before-restart-*.csv"))) + 1
        metrics.replace(run / f"metrics.before-restart-{earlier}.csv")
    return checkpoint


def _write_provenance(settings: Settings) -> None:
    run = settings.paths.run
    (run / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    write_json(environment(), run / "environment.json")


def _write_results(module: Pretraining, settings: Settings, preprocessing: Preprocessing, run: Path) -> None:
    trainer = module.trainer
    extra = {"run": settings.name, "step": trainer.global_step, "epoch": trainer.current_epoch, "seed": settings.seed}
    weights = run / "encoder.safetensors"
    export_encoder(module.encoder, settings.encoder, preprocessing, weights, extra=extra)
    lines = [f"encoder    {weights}   (fmcib_ssl.load_encoder reads it)"]
    if (run / "metrics.csv").is_file():
        lines.append(f"curves     {training_curves(run / 'metrics.csv', run / 'curves.png')}")
    logger.info("%s", "\n".join(lines))


def _summary(settings: Settings, source: LesionSource, batch_size: int, module: Pretraining) -> str:
    """What is about to happen, in numbers a user can check against what was meant."""
    hardware, trainer, data = settings.hardware, settings.trainer, settings.data
    global_batch = batch_size * settings.world_size
    steps_per_epoch, num_steps = _num_steps(settings, len(source.patches) // global_batch)
    parameters = sum(p.numel() for p in module.encoder.parameters()) / 1e6
    accumulated = f", {trainer.accumulate_grad_batches} accumulated" if trainer.accumulate_grad_batches > 1 else ""
    loss = ""
    if (of_module := getattr(module, "loss", None)) is not None:
        loss_arguments = ", ".join(f"{key} {value}" for key, value in settings.loss.items() if key != "_target_")
        loss = f", {type(of_module).__name__}: {loss_arguments}"
    schedule = _last_name(settings.schedule) if settings.schedule else "constant"
    rate = learning_rate(settings, batch_size)
    base_lr, reference_batch = settings.optimizer["base_lr"], settings.optimizer["reference_batch"]
    times = f" x {trainer.accumulate_grad_batches}" if accumulated else ""
    rows = {
        "run": f"{settings.name}, fmcib_ssl {fmcib_ssl.__version__}, in {settings.paths.run}",
        "lesions": f"{len(source.patches)} in {source.num_scans} scans, from {source.origin}",
        "negatives": f"{data.per_lesion} a lesion, {data.mining}" if data.per_lesion else "none mined",
        "patch": f"{' x '.join(map(str, data.patch_size))} voxels (z, y, x) of {source.preprocessing.spacing_mm:g} mm",
        "batch": f"{batch_size} lesions on each of {settings.world_size} {hardware.accelerator} devices{accumulated}",
        "steps": f"{num_steps} in all, {steps_per_epoch} an epoch",
        "encoder": f"{_last_name(settings.encoder)}, {parameters:.2f} M weights, "
        f"{module.metadata['feature_dim']} features",
        "method": f"{type(module).__name__}{loss}",
        "rate": f"{rate:.3g} at its highest = {base_lr:g} x {global_batch}{times} / {reference_batch}, "
        f"{_last_name(settings.optimizer)}, {schedule}",
    }
    return "\n".join(f"{name:<9}  {text}" for name, text in rows.items())


def _last_name(component: Component) -> str:
    name: str = component["_target_"].rsplit(".", 1)[-1]
    return name
