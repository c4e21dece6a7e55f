"""Fine-tuning: labelled lesions split by patient, one training for each split, and metrics on the test patients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from fmcib_ssl import evaluation, models
from fmcib_ssl.data import EpochSampler, LabelledPatches, LesionPatches, WatchedLoader, no_worker_left, text_of
from fmcib_ssl.evaluation import ID_COLUMN, METRICS, Labels, Split
from fmcib_ssl.io import atomic_write, checksum_of, digest_of, write_json
from fmcib_ssl.models import FineTuning, Parts
from fmcib_ssl.training.build import (
    accelerate,
    build_optimizer,
    build_part,
    build_trainer,
    build_views,
    config_errors_in,
    with_patches_of,
)
from fmcib_ssl.training.lesions import open_lesions
from fmcib_ssl.training.run_folder import RunFolder, num_saved
from fmcib_ssl.training.settings import Component, ConfigError, FineTune, Settings
from fmcib_ssl.training.summary import environment
from fmcib_ssl.training.throughput import Progress
from fmcib_ssl.types import Array, Preprocessing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """Labelled lesions, their splits, and the settings of the run.

    Attributes:
        patches: of all lesions of the store.
        preprocessing: of the patches.
        settings: of the run; `options` is their section `finetune`.
        labels: `labels.rows` says which lesions have one.
        ids: of the labelled lesions; so are `patients` and the rows in `splits`.
        patients: whose lesions stay together.
        splits: who is trained on, validated by (`val` is never None) and tested on.
    """

    settings: Settings
    options: FineTune
    patches: LesionPatches
    preprocessing: Preprocessing
    labels: Labels
    ids: Array
    patients: Array
    splits: Sequence[Split]


def fine_tune(settings: Settings, options: FineTune, folder: RunFolder) -> float:
    """Train on each fold of patients, or on one split, and score all test predictions; gives the first metric.

    Raises:
        UserError: settings that contradict the data or the weights; a folder that holds another run.
    """
    run, num_done = folder.path, num_saved(folder.path)
    for change in folder.check_settings(settings.shown()):
        logger.info("with another %s", change)
    encoder, spec = _starting_encoder(settings, options)
    task = _labelled_task(settings, options, getattr(encoder, "preprocessing", None))
    checksum, num_splits = _task_checksum(task), len(task.splits)
    if num_done:
        folder.check_lesions(checksum)
        state = "resuming %s: %d of %d parts are done" if num_done < num_splits else "%s is finished: %d of %d parts"
        logger.info(f"{state}; run=new starts afresh", run, num_done, num_splits)
    logger.info("%s", _task_summary(task, spec))
    if num_done < num_splits:
        folder.note(data_checksum=checksum)
        folder.begin(settings.shown(), environment(), step=num_done)
    tables = []
    for split in task.splits:
        part = run / (f"fold_{split.name}" if options.split is None else split.name)
        predictions_file = part / "predictions.parquet"
        if predictions_file.is_file():
            logger.info("%s is finished", part)
        else:
            with no_worker_left():
                _train_split(task, split, part)
        tables.append(pd.read_parquet(predictions_file))
    predictions = pd.concat(tables, ignore_index=True)
    predictions.to_parquet(run / "predictions.parquet", index=False)
    rows = _results_of(task, predictions)
    about = {"label": task.labels.name, "kind": task.labels.kind, "classes": list(task.labels.classes)}
    write_json(run / "results.json", {"rows": rows, **about, "train": options.train, "weights": options.weights})
    lines = [f"{row['metric']:<20} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in rows]
    logger.info("%s on held-out patients\n%s\nin %s", task.labels.name, "\n".join(lines), run / "results.json")
    if folder.state["finished"] is None:
        folder.finish(step=num_splits)
    return float(rows[0]["value"])


def _labelled_task(settings: Settings, options: FineTune, trained_on: Preprocessing | None) -> _Task:
    """Open the lesions, read their labels and split their patients.

    Args:
        settings: whose `data` is opened.
        options: the section `finetune`.
        trained_on: the patches that the encoder knows; None for random weights.

    Raises:
        UserError: patches that are not those, no such column or label, patients on two sides of a split.
    """
    if trained_on is not None:
        settings = with_patches_of(settings, trained_on, options.weights)
    data = settings.data.model_copy(update={"negatives_per_lesion": 0})
    patches, _ = open_lesions(settings.model_copy(update={"data": data}), main_process=True)
    table = patches.lesions
    assert options.label is not None
    labels = evaluation.read_labels(table, options.task, label=options.label, threshold=options.threshold)
    lesions = table.iloc[labels.rows]
    ids = text_of(lesions[ID_COLUMN]).to_numpy()
    patients = ids if options.group is None else evaluation.column_text(lesions, options.group, "finetune.group")
    try:
        if options.split is None:
            splits = evaluation.cross_validation(
                labels.kind, labels.values, patients, num_folds=options.folds, seed=settings.seed
            )
        else:
            splits = [evaluation.given_split(evaluation.column_text(lesions, options.split, "finetune.split"))]
            if len(shared := evaluation.shared_patients(splits[0], patients)):
                raise ConfigError(
                    f"{len(shared)} patients are on more than one side of {options.split!r}, such as {shared[0]!r}: "
                    "data leakage, results would be optimistic. Fix the split, or accept it with finetune.group=null"
                )
        splits = [_with_validation(split, labels, patients, options.val_share, settings.seed) for split in splits]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _Task(settings, options, patches, trained_on or patches.preprocessing, labels, ids, patients, splits)


def _with_validation(split: Split, labels: Labels, patients: Array, share: float, seed: int) -> Split:
    """Take a share of the training patients for validation, unless the split names some."""
    if split.val is not None:
        return split
    values = labels.values[split.train]
    num_folds = max(2, min(round(1 / share), np.bincount(evaluation.strata(labels.kind, values)).max()))
    fit, val = evaluation.grouped_folds(labels.kind, values, patients[split.train], num_folds, seed)[0]
    return replace(split, train=split.train[fit], val=split.train[val])


def _task_checksum(task: _Task) -> str:
    """Digest of lesions, labels, splits and initial weights."""
    splits = [(split.name, split.train, split.val, split.test) for split in task.splits]
    weights = None if task.options.weights is None else checksum_of([task.options.weights])
    return digest_of(task.ids, task.labels.values, splits, weights)


def _starting_encoder(settings: Settings, options: FineTune) -> tuple[nn.Module, Component]:
    """The encoder to begin with, and what builds it; the same at every call."""
    L.seed_everything(settings.seed, verbose=False)
    if options.weights is None:
        return build_part("encoder", settings.network), settings.network
    try:
        encoder: Any = models.load_encoder(options.weights)
    except (models.EncoderFileError, FileNotFoundError) as error:
        raise ConfigError(f"finetune.weights: {error}") from error
    return encoder, encoder.spec


def _train_split(task: _Task, split: Split, folder: Path) -> None:
    """Train until the validation score rises no more, and let the best weights predict.

    The score, not the loss: after few steps batch norm's running statistics lag behind the weights, which shifts all
    outputs, and the loss with them, but not their order.
    """
    assert split.val is not None
    if len(np.unique(task.labels.values[split.val])) < 2:
        raise ConfigError(f"the validation lesions of part {split.name} all have one label: nothing to stop by")
    settings, options = task.settings, task.options
    encoder, spec = _starting_encoder(settings, options)
    data, hardware = settings.data, settings.hardware
    batch_size = min(data.max_batch_size if data.batch_size == "auto" else data.batch_size, len(split.train))
    if batch_size < 2:
        raise ConfigError("fine-tuning standardises features over a batch: set data.batch_size to 2 or more")
    train, val, test = _loaders(task, split, batch_size)

    L.seed_everything(settings.seed, verbose=False)
    extra = {"run": settings.name, "fold": split.name}
    metadata = models.encoder_metadata(encoder, spec, task.preprocessing, extra=extra)
    module = _build_module(task, split, encoder, batch_size, metadata)
    best = ModelCheckpoint(
        folder / "checkpoints", filename="best", monitor="val/score", mode="max", enable_version_counter=False
    )
    patience = EarlyStopping(monitor="val/score", mode="max", patience=options.patience)
    accelerate(module, module.encoder, hardware)
    shows_progress = (settings.trainer.model_extra or {}).get("enable_progress_bar", True)
    on_one_device = hardware.model_copy(update={"strategy": "auto", "sync_batchnorm": False})
    trainer = build_trainer(
        settings.model_copy(update={"hardware": on_one_device}),
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[best, patience, *([Progress()] if shows_progress else [])],
    )
    for earlier in (folder / "checkpoints").glob("*.ckpt"):
        earlier.unlink()  # of a training that was stopped
    module.train()  # Lightning leaves modes as they are, and a loaded encoder is in eval mode
    trainer.fit(module, train, val)
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    logger.info(
        "%s: %d lesions trained on, stopped after epoch %d, best in %d (validation score %.3f)",
        folder.name, len(split.train), trainer.current_epoch - 1, checkpoint["epoch"], best.best_model_score,
    )  # fmt: skip
    models.export_encoder(module.encoder, spec, task.preprocessing, folder / "encoder.safetensors", extra=extra)
    tables = []
    for side, loader, rows in (("val", val, split.val), ("test", test, split.test)):
        batches = cast(list[tuple[torch.Tensor, torch.Tensor]], trainer.predict(module, loader))
        served, scores = (torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True))
        assert np.array_equal(served, task.labels.rows[rows])
        tables.append(_predictions(task, split.name, side, rows, scores))
    with atomic_write(folder / "predictions.parquet") as file:
        pd.concat(tables).to_parquet(file, index=False)


def _loaders(task: _Task, split: Split, batch_size: int) -> Iterator[WatchedLoader]:
    """Of views of the training lesions, and of the validation and test lesions as they are."""
    assert split.val is not None
    settings, num_workers = task.settings, task.settings.hardware.num_workers
    labels: Array = np.zeros(len(task.patches), np.int64 if task.labels.num_classes else np.float32)
    labels[task.labels.rows] = task.labels.values
    generator = torch.Generator().manual_seed(settings.seed)
    for rows, view_transform in ((split.train, build_views(settings)), (split.val, None), (split.test, None)):
        training = view_transform is not None
        dataset = LabelledPatches(
            task.patches.positive,
            task.labels.rows[rows],
            labels,
            task.preprocessing,
            view_transform=view_transform,
            seed=settings.seed,
        )
        yield WatchedLoader(
            dataset,
            title=task.ids[rows].tolist().__getitem__,
            sampler=EpochSampler(len(rows), batch_size, seed=settings.seed) if training else None,
            drop_last=training,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=settings.hardware.pin_memory,
            persistent_workers=num_workers > 0,
            generator=generator,
        )


def _build_module(
    task: _Task, split: Split, encoder: nn.Module, batch_size: int, metadata: dict[str, Any]
) -> FineTuning:
    settings, options = task.settings, task.options
    values, num_classes = task.labels.values[split.train], task.labels.num_classes
    weights = None
    if num_classes and options.class_weights:
        classes = np.arange(num_classes)
        if len(absent := np.setdiff1d(classes, values)):
            missing = task.labels.classes[absent[0]]
            raise ConfigError(f"no training lesion of fold {split.name} is {missing!r}: use fewer classes or folds")
        weights = torch.tensor(compute_class_weight("balanced", classes=classes, y=values), dtype=torch.float32)
    with config_errors_in("finetune"):
        parts = Parts(
            encoder,
            build_optimizer(settings, batch_size),
            models.feature_dim(encoder, task.preprocessing.patch_size_zyx),
            None if settings.schedule is None else build_part("schedule", settings.schedule),
            metadata=metadata,
        )
        return FineTuning(
            parts,
            num_classes=num_classes,
            class_weights=weights,
            center=0.0 if num_classes else float(values.mean()),
            scale=1.0 if num_classes else float(values.std()) or 1.0,
            depth=options.train,
            encoder_rate=options.encoder_rate if options.weights is not None else 1.0,
            score=partial(_score, task),
        )


def _score(task: _Task, labels: Array, scores: Array) -> float:
    """The first metric of the task."""
    metric = next(iter(METRICS[task.labels.kind].values()))
    scores = scores[:, 1] if task.labels.kind == "binary" else scores
    return evaluation.value_of(metric, labels, scores)


def _predictions(task: _Task, fold: str, side: str, rows: Array, scores: Array) -> pd.DataFrame:
    labels = task.labels
    columns: dict[str, Any] = {"patient": task.patients[rows], "fold": fold, "split": side}
    columns["label"] = labels.values[rows]
    if labels.kind == "multiclass":
        columns |= {f"score_{name}": scores[:, number] for number, name in enumerate(labels.classes)}
    else:
        columns["score"] = scores[:, 1] if labels.num_classes else scores
    if labels.num_classes:
        columns["predicted"] = scores.argmax(axis=1)
    return pd.DataFrame({ID_COLUMN: task.ids[rows], **columns})


def _results_of(task: _Task, predictions: pd.DataFrame) -> list[dict[str, Any]]:
    """Each metric within each fold and then their mean, as for frozen features, with an interval over patients."""
    test = predictions[predictions["split"] == "test"]
    rows_of = pd.Series(range(len(task.patients)), index=task.ids)
    names = [name for name in test if name == "score" or str(name).startswith("score_")]
    splits = []
    for fold, table in test.groupby("fold", sort=False):
        scores = table[names].to_numpy()
        rows = rows_of.loc[table[ID_COLUMN]].to_numpy()
        chosen = table["predicted"].to_numpy() if "predicted" in table else None
        scores = scores if len(names) > 1 else scores[:, 0]
        splits.append(evaluation.SplitScores(str(fold), rows, scores, setting=0.0, num_train=0, chosen=chosen))
    weights = evaluation.patient_weights(task.patients, task.options.num_bootstrap, task.settings.seed)
    return [
        {"metric": metric, **asdict(evaluation.estimate(function, task.labels.values, splits, weights))}
        for metric, function in METRICS[task.labels.kind].items()
    ]


def _task_summary(task: _Task, spec: Component) -> str:
    """What a fine-tuning is about to do, one line a split."""
    settings, options, labels, split = task.settings, task.options, task.labels, task.splits[0]
    counts = ""
    if labels.num_classes:
        per_class = np.bincount(labels.values, minlength=labels.num_classes)
        counts = ": " + ", ".join(f"{count} {name}" for name, count in zip(labels.classes, per_class, strict=True))
    assert split.val is not None
    rows = {
        "run": f"{settings.name} in {settings.paths.run}",
        "encoder": f"{spec['_target_'].rpartition('.')[2]}, {options.weights or 'random weights'}",
        "trained": options.train,
        "label": f"{labels.name}, {labels.kind}{counts}",
        "lesions": f"{len(task.patients)} of {len(np.unique(task.patients))} patients",
        "parts": f"{len(task.splits)} {'folds' if options.split is None else 'split'}; the first trains on "
        f"{len(split.train)} lesions, stops by {len(split.val)}, is tested on {len(split.test)}",
    }
    return "\n".join(f"{name:<9}  {text}" for name, text in rows.items())
