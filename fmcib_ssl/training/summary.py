"""What is recorded and said of a run: versions, code, machine, plan, outcome; and what its ranks have to agree on."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor

import fmcib_ssl
from fmcib_ssl.data import LesionDataModule, LesionPatches
from fmcib_ssl.evaluation import ContactRow, contact_sheet, training_curves
from fmcib_ssl.io import Identifiers, checksum_of, identifier, redacted
from fmcib_ssl.models import Pretraining, export_encoder, resolve_precision
from fmcib_ssl.training.build import learning_rate, num_steps
from fmcib_ssl.training.loggers import RunLogger
from fmcib_ssl.training.online_probe import OnlineProbe
from fmcib_ssl.training.run_folder import DATA_ACCESS, flat_settings
from fmcib_ssl.training.settings import Component, ConfigError, Settings
from fmcib_ssl.types import Preprocessing, SampleKey

logger = logging.getLogger(__name__)

#: Packages that can change a result.
_PACKAGES = ("fmcib_ssl", "torch", "torchvision", "lightning", "monai", "SimpleITK", "numpy", "scipy", "timm")
#: Settings that each machine may have its own of: where data lie, and how they are read.
_FREE_ON_EACH_RANK = (
    "name", "contact_sheet_rows", "identifiers", "logger", "paths.", "hardware.num_workers", "hardware.num_threads",
    "hardware.pin_memory", *DATA_ACCESS,
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions of what computed, the state of the code, and the machine; plain values."""
    return {
        "command": redacted(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        # In a container there is no checkout; its image names its commit.
        "git": _git_state(Path(__file__).parent) or {"commit": os.environ.get("FMCIB_SSL_REVISION") or None},
    }


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout that holds `folder`; None outside one or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "uncommitted": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_ranks_agree(facts: Mapping[str, Any]) -> None:
    """Compare, on all ranks, what a run follows from: plain values by what they are called.

    Raises:
        ConfigError: on all ranks, naming what differs, and where.
    """
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, dict(facts))
    if lines := _differences(of_all):
        raise ConfigError(
            "the ranks were not given the same run, and nothing was trained:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nStart all of them with the same command, code and lesions"
        )


def facts_of_rank(settings: Mapping[str, Any], patches: Any) -> dict[str, Any]:
    """What has to be the same on all ranks: settings, lesions in their order, code and versions.

    Args:
        settings: of the run, plain values.
        patches: whose table `lesions` is compared without the place of the scans.
    """
    run = str(settings["paths"]["run"])
    flat = {key: value for key, value in flat_settings(settings).items() if not key.startswith(_FREE_ON_EACH_RANK)}
    facts = {key: value.replace(run, "RUN") if isinstance(value, str) else value for key, value in flat.items()}
    table = patches.lesions
    rows = pd.util.hash_pandas_object(table.drop(columns="image_path", errors="ignore"))
    digest = hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()
    facts["lesions, in their order"] = f"{len(table)} with digest {digest[:8]}"
    facts |= {f"version of {name}": _version(name) for name in _PACKAGES}
    facts["code of fmcib_ssl"] = checksum_of(sorted(Path(__file__).parents[1].rglob("*.py")))[:8]
    return facts


def _differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same on all ranks, a line each: every value with its ranks."""
    lines = []
    for key in dict.fromkeys(key for own in facts for key in own):
        ranks: dict[str, list[str]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(str(own.get(key, "missing")), []).append(str(rank))
        if len(ranks) > 1:
            values = (f"{value} on rank{'s' * (len(own) > 1)} {', '.join(own)}" for value, own in ranks.items())
            lines.append(f"{key}: {'; '.join(values)}")
    return lines


def run_summary(settings: Settings, patches: LesionPatches, batch_size: int, module: Pretraining, step: int) -> str:
    """A line for each part of a run of which `step` optimizer steps are done."""
    hardware, data, optimizer = settings.hardware, settings.data, settings.optimizer
    global_batch = batch_size * settings.world_size
    steps_per_epoch, all_steps = num_steps(settings, len(patches) // global_batch)
    num_scans = patches.lesions["scan_id"].nunique()
    chunk_size, accumulated = getattr(module, "chunk_size", None), settings.trainer.accumulate_grad_batches
    num_weights = sum(p.numel() for p in module.encoder.parameters()) / 1e6
    switches = ("channels_last", "skip_padded_kernels", "compile", "gradient_checkpointing")
    precision = resolve_precision(hardware.precision, hardware.accelerator)
    loss = ""
    if (built := getattr(module, "loss", None)) is not None:
        arguments = ", ".join(f"{key} {value}" for key, value in settings.loss.items() if key != "_target_")
        loss = f", {type(built).__name__}: {arguments}"
    rows = {
        "run": f"{settings.name}, fmcib_ssl {fmcib_ssl.__version__}, in {settings.paths.run}",
        "lesions": f"{len(patches)} in {num_scans} scans, from store {patches.store.path}",
        "negatives": f"{data.negatives_per_lesion} a lesion, {data.mining}",
        "patch": f"{' x '.join(map(str, data.patch_size))} voxels (z, y, x) of {patches.preprocessing.spacing_mm:g} mm",
        "batch": f"{batch_size} lesions on each of {settings.world_size} {hardware.accelerator} devices"
        + (f", in chunks of {chunk_size}" if chunk_size and chunk_size < batch_size else "")
        + (f", {accumulated} accumulated" if accumulated > 1 else ""),
        "steps": f"{all_steps} in all, {steps_per_epoch} an epoch" + (f"; {step} are done" if step else ""),
        "encoder": f"{_last_name(module.metadata['encoder'])}, {num_weights:.2f} M weights, "
        f"{module.metadata['feature_dim']} features, from {settings.encoder.get('weights') or 'random weights'}",
        "step": ", ".join([precision, *[name for name in switches if getattr(hardware, name)]]),
        "method": f"{type(module).__name__}{loss}",
        "rate": f"{learning_rate(settings, batch_size):.3g} at its highest = {optimizer['base_lr']:g} x "
        f"{global_batch * accumulated} / {optimizer['reference_batch']}, {_last_name(optimizer)}, "
        f"{_last_name(settings.schedule) if settings.schedule else 'constant'}",
    }
    if module.flops_per_lesion is not None:
        rows["work"] = f"{module.flops_per_lesion / 1e9:.3g} GFLOP a lesion, forward and back"
    return "\n".join(f"{name:<9}  {text}" for name, text in rows.items())


def draw_contact_sheet(
    data: LesionDataModule, preprocessing: Preprocessing, path: Path, num_rows: int, identifiers: Identifiers = "show"
) -> Path:
    """Draw what the encoder will see: lesions, spread over the table, with the views of epoch 0.

    Args:
        data: makes the views.
        preprocessing: how they were normalised.
        path: PNG to write.
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
        positive, negative = ((one[0], other[0]) for one, other in (views["positive"], views["negative"]))
        first: tuple[Tensor, Tensor] | None = negative
        if negative[0].ndim == 5:  # of several negatives the first, if there is one
            first = (negative[0][0], negative[1][0]) if len(negative[0]) else None
        rows.append(ContactRow(title, pair["positive"], positive, first))
    return contact_sheet(rows, path, preprocessing)


def write_results(module: Pretraining, settings: Settings, preprocessing: Preprocessing, run: Path) -> None:
    """Export the encoder, and draw the curves of the metrics."""
    trainer = module.trainer
    extra = {"run": settings.name, "step": trainer.global_step, "epoch": trainer.current_epoch, "seed": settings.seed}
    weights = run / "encoder.safetensors"
    head = getattr(module, "head", None) if settings.export.keep_head else None
    export_encoder(module.encoder, module.metadata["encoder"], preprocessing, weights, extra=extra, head=head)
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
    lines.append(f"next       {shlex.join(['fmcib-ssl', 'embed', *arguments])}")
    return "\n".join(lines)


def _last_name(component: Component) -> str:
    name: str = component["_target_"].rsplit(".", 1)[-1]
    return name
