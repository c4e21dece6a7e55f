"""Fine-tuning from its settings: one training for each fold of patients, or one for a given split.

Every fold leaves its folder when it is finished; a run that was stopped goes on with the first that is not.
"""

from __future__ import annotations

import logging
import os
import warnings
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

from fmcib_ssl.components import accelerate, blame, build, build_optimizer, build_trainer, build_views, refuse_unused
from fmcib_ssl.data.labelled import LabelledPatches
from fmcib_ssl.data.sampler import EpochSampler
from fmcib_ssl.data.workers import WatchedLoader, no_worker_left
from fmcib_ssl.evaluation.bootstrap import patient_weights
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTableError
from fmcib_ssl.evaluation.folds import Part
from fmcib_ssl.evaluation.labels import EvaluationError
from fmcib_ssl.evaluation.metrics import METRICS
from fmcib_ssl.evaluation.scoring import PartScores, estimate
from fmcib_ssl.finetune_task import Task, labelled_task
from fmcib_ssl.io import atomic_write, checksum_of, digest_of
from fmcib_ssl.methods.finetune import FineTuning
from fmcib_ssl.models.encoders import feature_dim
from fmcib_ssl.models.export import EncoderFileError, encoder_metadata, export_encoder, load_encoder
from fmcib_ssl.safety import redacted
from fmcib_ssl.settings import Component, ConfigError, FineTune, Settings
from fmcib_ssl.training.progress import Progress
from fmcib_ssl.training.provenance import environment, write_json
from fmcib_ssl.training.run_folder import RunFolder, saved_settings
from fmcib_ssl.training.same_run import check_same_run, unlike_the_last
from fmcib_ssl.types import ViewTransform

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

#: Sections that only pretraining uses.
_UNUSED = ("method", "loss", "head", "logger", "callbacks", "contact_sheet_rows")


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
    encoder, spec = _encoder(settings, asked)
    task = labelled_task(settings, asked, getattr(encoder, "preprocessing", None))
    checksum = _checksum(asked, task)
    if num_done:
        folder.check_lesions([checksum])
        what = (
            "resuming %s: %d of %d parts are done" if num_done < len(task.parts) else "%s is finished: %d of %d parts"
        )
        logger.info(f"{what}; run=new starts afresh", run, num_done, len(task.parts))
    logger.info("%s", _summary(settings, asked, task, spec))
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
                _train_part(settings, asked, task, part, place)
        tables.append(pd.read_parquet(done))
    predictions = pd.concat(tables, ignore_index=True)
    predictions.to_parquet(run / "predictions.parquet", index=False)
    rows = _results(task, predictions, settings.seed, asked.num_bootstrap)
    about = {"label": task.labels.name, "kind": task.labels.kind, "classes": list(task.labels.classes)}
    write_json({"rows": rows, **about, "train": asked.train, "weights": asked.weights}, run / "results.json")
    lines = [f"{row['metric']:<20} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in rows]
    logger.info("%s on held-out patients\n%s\nin %s", task.labels.name, "\n".join(lines), run / "results.json")
    if folder.finished is None:
        folder.finish(step=len(task.parts))
    return float(rows[0]["value"])


def _checksum(asked: FineTune, task: Task) -> str:
    """Of who is trained on and tested on, with which labels, and of the weights that the training begins with."""
    parts = [(part.name, part.train, part.val, part.test) for part in task.parts]
    weights = None if asked.weights is None else checksum_of([asked.weights])
    return digest_of(task.ids(), task.labels.values, parts, weights)


def _encoder(settings: Settings, asked: FineTune) -> tuple[nn.Module, Component]:
    """The encoder to begin with, and what builds it; the same at every call."""
    L.seed_everything(settings.seed, verbose=False)
    if asked.weights is None:
        return build("encoder", settings.encoder), settings.encoder
    try:
        encoder: Any = load_encoder(asked.weights)
    except (EncoderFileError, FileNotFoundError) as error:
        raise ConfigError(f"finetune.weights: {error}") from error
    return encoder, encoder.spec


def _train_part(settings: Settings, asked: FineTune, task: Task, part: Part, folder: Path) -> None:
    """Train until the validation score rises no more, and let the best weights predict.

    The score, not the loss: after few steps batch norm's running statistics lag behind the weights, which shifts all
    outputs, and the loss with them, but not their order.
    """
    assert part.val is not None
    if len(np.unique(task.labels.values[part.val])) < 2:
        raise ConfigError(f"the validation lesions of part {part.name} all have one label: nothing to stop by")
    encoder, spec = _encoder(settings, asked)
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


def _datasets(settings: Settings, task: Task, part: Part) -> dict[str, LabelledPatches]:
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
    part: Part,
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


def _results(task: Task, predictions: pd.DataFrame, seed: int, num_bootstrap: int) -> list[dict[str, Any]]:
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
        parts.append(PartScores(str(fold), rows, scores, setting=0.0, num_train=0, chosen=chosen))
    drawn = patient_weights(task.patients, num_bootstrap, seed)
    weights = np.concatenate([np.ones((1, len(task.patients))), drawn])
    results = []
    for metric, function in METRICS[task.labels.kind].items():
        told = estimate(function, task.labels.values, parts, weights)
        results.append({"metric": metric, "value": told.value, "low": told.low, "high": told.high})
    return results


def _summary(settings: Settings, asked: FineTune, task: Task, spec: Component) -> str:
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
