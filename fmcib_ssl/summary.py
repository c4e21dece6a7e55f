"""What a run is about to do, in numbers that a user can check against what was meant."""

from __future__ import annotations

import fmcib_ssl
from fmcib_ssl.components import learning_rate
from fmcib_ssl.lesion_source import LesionSource
from fmcib_ssl.methods.pretraining import Pretraining
from fmcib_ssl.models.acceleration import resolve_precision
from fmcib_ssl.settings import Component, Settings


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
