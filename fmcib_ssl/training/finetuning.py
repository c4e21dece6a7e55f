"""Fine-tuning: what is learned, and on whom (lesions with labels, parted by patient), and the training of one part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from fmcib_ssl.data.labelled import LabelledPatches
from fmcib_ssl.data.loader import EpochSampler
from fmcib_ssl.data.store import Store
from fmcib_ssl.data.workers import WatchedLoader
from fmcib_ssl.evaluation.embedding_sources import SourcePatches, open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.labels import (
    Labels,
    Split,
    column_text,
    cross_validation,
    given_split,
    grouped_folds,
    read_labels,
    shared_patients,
    strata,
)
from fmcib_ssl.evaluation.metrics import METRICS, patient_weights
from fmcib_ssl.evaluation.probes import SplitScores, estimate
from fmcib_ssl.io import atomic_write, checksum_of, digest_of
from fmcib_ssl.models.encoders import feature_dim
from fmcib_ssl.models.export import EncoderFileError, encoder_metadata, export_encoder, load_encoder
from fmcib_ssl.models.finetune import FineTuning
from fmcib_ssl.training.build import accelerate, blame, build, build_optimizer, build_trainer, build_views
from fmcib_ssl.training.lesions import store_of
from fmcib_ssl.training.settings import Component, ConfigError, FineTune, Settings
from fmcib_ssl.training.throughput import Progress
from fmcib_ssl.types import Preprocessing, ViewTransform

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Task:
    """What is learned, on whom; arrays have one entry a labelled lesion.

    Attributes:
        patches: of all lesions of the source.
        labels: `labels.rows` says which of those have one.
        patients: of each.
        parts: who is trained on, validated by (`val` is never None) and tested on.
        preprocessing: of the patches.
    """

    patches: SourcePatches
    labels: Labels
    patients: Array
    parts: Sequence[Split]
    preprocessing: Preprocessing

    def ids(self) -> Array:
        """The lesions' ids."""
        return self.patches.lesions[ID_COLUMN].to_numpy()[self.labels.rows]


def labelled_task(settings: Settings, asked: FineTune, trained_on: Preprocessing | None) -> Task:
    """Open the lesions, read their labels and part their patients.

    Args:
        settings: of the run.
        asked: its section `finetune`.
        trained_on: the patches that the encoder knows; None for random weights.

    Raises:
        ConfigError: patches that are not those, no such column or label, patients on two sides of a split.
        EvaluationError, FeatureTableError: tables that cannot be used.
    """
    data = settings.data
    if trained_on is not None and trained_on.patch_size_zyx != data.patch_size:
        size = ",".join(map(str, trained_on.patch_size_zyx))
        raise ConfigError(
            f"data.patch_size={list(data.patch_size)}, and {asked.weights} was trained on other patches: set "
            f"data.patch_size=[{size}]"
        )
    spacing = data.spacing_mm
    if trained_on is not None and spacing not in (None, trained_on.spacing_mm):
        raise ConfigError(
            f"data.spacing_mm={spacing:g}, and {asked.weights} was trained on {trained_on.spacing_mm:g} mm: set "
            f"data.spacing_mm={trained_on.spacing_mm:g}"
        )
    if trained_on is not None and trained_on.padding != data.padding:
        raise ConfigError(
            f"data.padding={data.padding}, and {asked.weights} was trained on patches with {trained_on.padding}: set "
            f"data.padding={trained_on.padding}"
        )
    patches, preprocessing = _open(settings, trained_on)
    assert asked.label is not None
    labels = read_labels(patches.lesions, asked.task, label=asked.label, threshold=asked.threshold)
    lesions = patches.lesions.iloc[labels.rows]
    ids = lesions[ID_COLUMN].to_numpy()
    patients = ids if asked.group is None else column_text(lesions, asked.group, "finetune.group")
    try:
        if asked.split is None:
            parts = cross_validation(labels.kind, labels.values, patients, num_folds=asked.folds, seed=settings.seed)
        else:
            parts = [given_split(column_text(lesions, asked.split, "finetune.split"))]
            if len(shared := shared_patients(parts[0], patients)):
                raise ConfigError(
                    f"{len(shared)} patients stand on more than one side of {asked.split!r}, such as {shared[0]!r}: "
                    "results would be optimistic. Fix the split, or accept it with finetune.group=null"
                )
        parts = [_with_validation(part, labels, patients, asked.val_share, settings.seed) for part in parts]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Task(patches, labels, patients, parts, preprocessing)


def _open(settings: Settings, trained_on: Preprocessing | None) -> tuple[SourcePatches, Preprocessing]:
    data = settings.data
    store = store_of(settings, spacing_mm=trained_on.spacing_mm if trained_on else None)
    voxels = Store(store).settings
    wanted = trained_on or Preprocessing(data.patch_size, voxels.spacing_mm, voxels.padding_hu, padding=data.padding)
    patches = open_patches({"kind": "store", "path": store, "select": data.select}, wanted)
    return patches, patches.preprocessing


def _with_validation(part: Split, labels: Labels, patients: Array, share: float, seed: int) -> Split:
    """Set a share of the training patients aside, unless the split has done so."""
    if part.val is not None:
        return part
    values = labels.values[part.train]
    num_folds = max(2, min(round(1 / share), np.bincount(strata(labels.kind, values)).max()))
    folds = grouped_folds(labels.kind, values, patients[part.train], num_folds, seed)
    fit, check = folds[0]
    return replace(part, train=part.train[fit], val=part.train[check])


def task_checksum(asked: FineTune, task: Task) -> str:
    """Of who is trained on and tested on, with which labels, and of the weights that the training begins with."""
    parts = [(part.name, part.train, part.val, part.test) for part in task.parts]
    weights = None if asked.weights is None else checksum_of([asked.weights])
    return digest_of(task.ids(), task.labels.values, parts, weights)


def starting_encoder(settings: Settings, asked: FineTune) -> tuple[nn.Module, Component]:
    """The encoder to begin with, and what builds it; the same at every call."""
    L.seed_everything(settings.seed, verbose=False)
    if asked.weights is None:
        return build("encoder", settings.encoder), settings.encoder
    try:
        encoder: Any = load_encoder(asked.weights)
    except (EncoderFileError, FileNotFoundError) as error:
        raise ConfigError(f"finetune.weights: {error}") from error
    return encoder, encoder.spec


def train_part(settings: Settings, asked: FineTune, task: Task, part: Split, folder: Path) -> None:
    """Train until the validation score rises no more, and let the best weights predict.

    The score, not the loss: after few steps batch norm's running statistics lag behind the weights, which shifts all
    outputs, and the loss with them, but not their order.
    """
    assert part.val is not None
    if len(np.unique(task.labels.values[part.val])) < 2:
        raise ConfigError(f"the validation lesions of part {part.name} all have one label: nothing to stop by")
    encoder, spec = starting_encoder(settings, asked)
    datasets = _datasets(settings, task, part)
    batch_size = settings.data.max_batch_size if settings.data.batch_size == "auto" else settings.data.batch_size
    batch_size = min(batch_size, len(part.train))
    if batch_size < 2:
        raise ConfigError("fine-tuning standardises features over a batch: set data.batch_size to 2 or more")
    loading: dict[str, Any] = {
        "num_workers": settings.hardware.num_workers,
        "pin_memory": settings.hardware.pin_memory,
        "persistent_workers": settings.hardware.num_workers > 0,
        "generator": torch.Generator().manual_seed(settings.seed),
    }
    order = EpochSampler(len(part.train), batch_size, seed=settings.seed)
    loading["batch_size"] = batch_size
    train = _loader(task, datasets["train"], sampler=order, drop_last=True, **loading)
    val, test = (_loader(task, datasets[side], **loading) for side in ("val", "test"))

    L.seed_everything(settings.seed, verbose=False)
    metadata = encoder_metadata(encoder, spec, task.preprocessing, extra={"run": settings.name, "fold": part.name})
    module = _module(settings, task, part, encoder=encoder, batch_size=batch_size, metadata=metadata)
    best = ModelCheckpoint(
        folder / "checkpoints", filename="best", monitor="val/score", mode="max", enable_version_counter=False
    )
    patience = EarlyStopping(monitor="val/score", mode="max", patience=asked.patience)
    accelerate(module, module.encoder, settings.hardware)
    shown = (settings.trainer.model_extra or {}).get("enable_progress_bar", True)
    trainer = build_trainer(
        settings,
        devices=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[best, patience, *([Progress()] if shown else [])],
    )
    for earlier in (folder / "checkpoints").glob("*.ckpt"):
        earlier.unlink()  # of a training that was stopped
    module.train()  # Lightning leaves modes as they are, and a loaded encoder is in eval mode
    trainer.fit(module, train, val)
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    logger.info(
        "%s: %d lesions trained on, stopped after epoch %d, best in %d (validation score %.3f)",
        folder.name, len(part.train), trainer.current_epoch - 1, checkpoint["epoch"], best.best_model_score,
    )  # fmt: skip
    export_encoder(module.encoder, spec, task.preprocessing, folder / "encoder.safetensors", extra=metadata["extra"])
    tables = []
    for side, loader, rows in (("val", val, part.val), ("test", test, part.test)):
        scores = _predict(trainer, module, loader, task.labels.rows[rows])
        tables.append(_table(task, part.name, side, rows, scores))
    with atomic_write(folder / "predictions.parquet") as file:
        pd.concat(tables).to_parquet(file, index=False)


def _loader(task: Task, dataset: LabelledPatches, **arguments: Any) -> WatchedLoader:
    ids = task.patches.lesions[ID_COLUMN].to_numpy()
    return WatchedLoader(dataset, title=lambda place: str(ids[dataset.rows[place]]), **arguments)


def _datasets(settings: Settings, task: Task, part: Split) -> dict[str, LabelledPatches]:
    view_transform = build_views(settings)
    classes = task.labels.num_classes > 0
    labels: Array = np.zeros(len(task.patches), np.int64 if classes else np.float32)
    labels[task.labels.rows] = task.labels.values
    transforms: dict[str, ViewTransform | None] = {"train": view_transform, "val": None, "test": None}
    rows = {"train": part.train, "val": part.val, "test": part.test}
    return {
        side: LabelledPatches(
            task.patches.read,
            task.labels.rows[rows[side]],
            labels,
            task.preprocessing,
            view_transform=transform,
            seed=settings.seed,
        )
        for side, transform in transforms.items()
    }


def _module(
    settings: Settings,
    task: Task,
    part: Split,
    *,
    encoder: nn.Module,
    batch_size: int,
    metadata: dict[str, Any],
) -> FineTuning:
    asked = settings.finetune
    assert asked is not None
    values, num_classes = task.labels.values[part.train], task.labels.num_classes
    weights = None
    if num_classes and asked.class_weights:
        classes = np.arange(num_classes)
        if len(absent := np.setdiff1d(classes, values)):
            missing = task.labels.classes[absent[0]]
            raise ConfigError(f"no training lesion of fold {part.name} is {missing!r}: use fewer classes or folds")
        weights = torch.tensor(compute_class_weight("balanced", classes=classes, y=values), dtype=torch.float32)
    with blame("finetune"):
        return FineTuning(
            encoder,
            feature_dim(encoder, task.preprocessing.patch_size_zyx),
            build_optimizer(settings, batch_size),
            None if settings.schedule is None else build("schedule", settings.schedule),
            num_classes=num_classes,
            class_weights=weights,
            center=0.0 if num_classes else float(values.mean()),
            scale=1.0 if num_classes else float(values.std()) or 1.0,
            depth=asked.train,
            encoder_rate=asked.encoder_rate if asked.weights is not None else 1.0,
            score=partial(_score, task),
            metadata=metadata,
        )


def _score(task: Task, labels: Array, scores: Array) -> float:
    """The first metric of the task."""
    metric = next(iter(METRICS[task.labels.kind].values()))
    scores = scores[:, 1] if task.labels.kind == "binary" else scores
    return float(metric(labels, scores, np.ones((1, len(labels))))[0])


def _predict(trainer: L.Trainer, module: FineTuning, loader: WatchedLoader, rows: Array) -> Array:
    """Scores in the order of `rows`, found by the rows that come back with them."""
    batches = cast(list[tuple[torch.Tensor, torch.Tensor]], trainer.predict(module, loader))
    found, scores = (torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True))
    by_row = pd.Series(range(len(found)), index=found)
    return scores[by_row.loc[rows].to_numpy()]


def _table(task: Task, fold: str, side: str, rows: Array, scores: Array) -> pd.DataFrame:
    labels = task.labels
    columns: dict[str, Any] = {
        ID_COLUMN: task.ids()[rows],
        "patient": task.patients[rows],
        "fold": fold,
        "split": side,
        "label": labels.values[rows],
    }
    if labels.kind == "multiclass":
        columns |= {f"score_{name}": scores[:, number] for number, name in enumerate(labels.classes)}
    else:
        columns["score"] = scores[:, 1] if labels.num_classes else scores
    if labels.num_classes:
        columns["predicted"] = scores.argmax(axis=1)
    return pd.DataFrame(columns)


def results_of(task: Task, predictions: pd.DataFrame, seed: int, num_bootstrap: int) -> list[dict[str, Any]]:
    """Each metric within each fold and then their mean, as for frozen features, with an interval over patients."""
    test = predictions[predictions["split"] == "test"]
    rows_of = pd.Series(range(len(task.patients)), index=task.ids())
    names = [name for name in test if name == "score" or str(name).startswith("score_")]
    parts = []
    for fold, table in test.groupby("fold", sort=False):
        scores = table[names].to_numpy()
        rows = rows_of.loc[table[ID_COLUMN]].to_numpy()
        chosen = table["predicted"].to_numpy() if "predicted" in table else None
        scores = scores if len(names) > 1 else scores[:, 0]
        parts.append(SplitScores(str(fold), rows, scores, setting=0.0, num_train=0, chosen=chosen))
    drawn = patient_weights(task.patients, num_bootstrap, seed)
    weights = np.concatenate([np.ones((1, len(task.patients))), drawn])
    results = []
    for metric, function in METRICS[task.labels.kind].items():
        told = estimate(function, task.labels.values, parts, weights)
        results.append({"metric": metric, "value": told.value, "low": told.low, "high": told.high})
    return results


def task_summary(settings: Settings, asked: FineTune, task: Task, spec: Component) -> str:
    """What a fine-tuning is about to do, one line a part."""
    labels, part = task.labels, task.parts[0]
    counts = ""
    if labels.num_classes:
        per_class = np.bincount(labels.values, minlength=labels.num_classes)
        counts = ": " + ", ".join(f"{count} {name}" for name, count in zip(labels.classes, per_class, strict=True))
    assert part.val is not None
    rows = {
        "run": f"{settings.name} in {settings.paths.run}",
        "encoder": f"{spec['_target_'].rpartition('.')[2]}, {asked.weights or 'random weights'}",
        "trained": asked.train,
        "label": f"{labels.name}, {labels.kind}{counts}",
        "lesions": f"{len(task.patients)} of {len(np.unique(task.patients))} patients",
        "parts": f"{len(task.parts)} {'folds' if asked.split is None else 'split'}; the first trains on "
        f"{len(part.train)} lesions, stops by {len(part.val)}, is tested on {len(part.test)}",
    }
    return "\n".join(f"{name:<9}  {text}" for name, text in rows.items())
