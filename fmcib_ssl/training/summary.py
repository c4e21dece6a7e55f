"""What a run says before its first step, and what it leaves and says after its last."""

from __future__ import annotations

import logging
import shlex
from datetime import timedelta
from pathlib import Path

import lightning as L
from torch import Tensor

import fmcib_ssl
from fmcib_ssl.data import LesionDataModule
from fmcib_ssl.evaluation import ContactRow, contact_sheet, training_curves
from fmcib_ssl.io import Identifiers, identifier
from fmcib_ssl.models import Pretraining, export_encoder, resolve_precision
from fmcib_ssl.training.build import learning_rate, num_steps
from fmcib_ssl.training.lesions import LesionSource
from fmcib_ssl.training.loggers import RunLogger
from fmcib_ssl.training.online_probe import OnlineProbe
from fmcib_ssl.training.settings import Component, Settings
from fmcib_ssl.types import Preprocessing, SampleKey

logger = logging.getLogger(__name__)


def run_summary(settings: Settings, source: LesionSource, batch_size: int, module: Pretraining, step: int) -> str:
    """A line for each part of a run of which `step` optimizer steps are done."""
    hardware, trainer, data = settings.hardware, settings.trainer, settings.data
    global_batch = batch_size * settings.world_size
    steps_per_epoch, all_steps = num_steps(settings, len(source.patches) // global_batch)
    parameters = sum(p.numel() for p in module.encoder.parameters()) / 1e6
    accumulated = f", {trainer.accumulate_grad_batches} accumulated" if trainer.accumulate_grad_batches > 1 else ""
    chunk_size = getattr(module, "chunk_size", None)
    chunks = f", in chunks of {chunk_size}" if chunk_size and chunk_size < batch_size else ""
    loss = ""
    if (built := getattr(module, "loss", None)) is not None:
        loss_arguments = ", ".join(f"{key} {value}" for key, value in settings.loss.items() if key != "_target_")
        loss = f", {type(built).__name__}: {loss_arguments}"
    schedule = _last_name(settings.schedule) if settings.schedule else "constant"
    rate = learning_rate(settings, batch_size)
    base_lr, reference_batch = settings.optimizer["base_lr"], settings.optimizer["reference_batch"]
    times = f" x {trainer.accumulate_grad_batches}" if accumulated else ""
    flops = module.flops_per_lesion
    work = "not counted" if flops is None else f"{flops / 1e9:.3g} GFLOP a lesion, forward and back"
    switches = ("channels_last", "skip_padded_kernels", "compile", "gradient_checkpointing")
    switched_on = [name for name in switches if getattr(hardware, name)]
    rows = {
        "run": f"{settings.name}, fmcib_ssl {fmcib_ssl.__version__}, in {settings.paths.run}",
        "lesions": f"{len(source.patches)} in {source.num_scans} scans, from {source.origin}",
        "negatives": f"{data.negatives_per_lesion} a lesion, {data.mining}"
        if data.negatives_per_lesion
        else "none mined",
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


def draw_contact_sheet(
    data: LesionDataModule, preprocessing: Preprocessing, path: Path, num_rows: int, identifiers: Identifiers = "show"
) -> Path:
    """Draw what the encoder will see: lesions, spread over the table, with the views of epoch 0.

    Args:
        data: of the run.
        preprocessing: of its patches.
        path: of the picture.
        num_rows: lesions on it.
        identifiers: whether lesions are called by their scans, whose names may be patients', or by digits of them.
    """
    dataset = data.dataset
    num_rows = min(num_rows, len(dataset))
    rows = []
    for i in range(num_rows):
        key = SampleKey(0, i * len(dataset) // num_rows)
        pair = dataset[key]
        views = dataset.collate([pair])
        scan, comma, row = dataset.patches.title(pair["lesion"]).partition(", row ")
        title = f"{identifier(scan, identifiers)}{comma}{row}"
        positive, negative = ((first[0], second[0]) for first, second in (views["positive"], views["negative"]))
        rows.append(ContactRow(title, pair["positive"], positive, _first_negative(negative)))
    return contact_sheet(rows, path, preprocessing)


def _first_negative(views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Of one negative `(1, z, y, x)` itself, of `(K, 1, z, y, x)` the first, if there is one."""
    if views[0].ndim == 4:
        return views
    return (views[0][0], views[1][0]) if len(views[0]) else None


def write_results(module: Pretraining, settings: Settings, preprocessing: Preprocessing, run: Path) -> None:
    """Export the encoder, and draw the curves of the metrics."""
    trainer = module.trainer
    extra = {"run": settings.name, "step": trainer.global_step, "epoch": trainer.current_epoch, "seed": settings.seed}
    weights = run / "encoder.safetensors"
    export_encoder(module.encoder, settings.encoder, preprocessing, weights, extra=extra)
    lines = [f"encoder    {weights}   (fmcib_ssl.load_encoder reads it)"]
    if (run / "metrics.csv").is_file():
        curves = training_curves(run / "metrics.csv", run / "curves.png")
        lines.append(f"curves     {curves}")
        for tracker in trainer.loggers:
            if isinstance(tracker, RunLogger):
                tracker.show("curves", curves)
    logger.info("%s", "\n".join(lines))


def outcome(run: Path, store: Path, trainer: L.Trainer, loss: float, seconds: float) -> str:
    """What came of the run, and the command that a user is likely to want next."""
    took = timedelta(seconds=round(seconds))
    lines = [f"done       {trainer.global_step} steps, loss {loss:.4g}; this start took {took}"]
    probes = (callback for callback in trainer.callbacks if isinstance(callback, OnlineProbe))  # type: ignore[attr-defined]
    lines += [f"probe      {probe.last_result}" for probe in probes if probe.last_result]
    arguments = [f"checkpoint={run}", f"store={store}", f"output={run / 'features.parquet'}"]
    lines.append(f"next       {shlex.join(['python', 'scripts/embed.py', *arguments])}")
    return "\n".join(lines)


def _last_name(component: Component) -> str:
    name: str = component["_target_"].rsplit(".", 1)[-1]
    return name
