"""What fine-tuning learns, and on whom: lesions with labels, parted by patient."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fmcib_ssl.evaluation.embedding_sources import SourcePatches, open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.folds import Part, cross_validation, given_split, grouped_folds, shared_patients, strata
from fmcib_ssl.evaluation.labels import Labels, column_text, read_labels
from fmcib_ssl.settings import ConfigError, FineTune, Settings
from fmcib_ssl.types import Preprocessing

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
    parts: Sequence[Part]
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
                    "the result would be too good. Mend the split, or say finetune.group=null to let it be"
                )
        parts = [_with_validation(part, labels, patients, asked.val_share, settings.seed) for part in parts]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Task(patches, labels, patients, parts, preprocessing)


def _open(settings: Settings, trained_on: Preprocessing | None) -> tuple[SourcePatches, Preprocessing]:
    data = settings.data
    if (phantom := data.phantom) is not None:
        from fmcib_ssl.data.phantom import make_archive  # noqa: PLC0415  (a store must not need the readers of scans)

        make_archive(phantom.folder, phantom.num_scans, seed=phantom.seed, num_workers=settings.hardware.num_workers)
    source: dict[str, Any] = {"kind": "store", "path": data.store, "select": data.select}
    wanted = trained_on
    if data.store is None:
        source |= {
            "kind": "scans", "annotations": data.annotations, "image_root": data.image_root,
            "path_prefix": data.path_prefix, "coordinates": data.coordinates, "on_bad_row": data.on_bad_row,
        }  # fmt: skip
        spacing_mm = 1.0 if data.spacing_mm is None else data.spacing_mm
        wanted = trained_on or Preprocessing(data.patch_size, spacing_mm, padding=data.padding)
    elif trained_on is None:
        from fmcib_ssl.data.store import Store  # noqa: PLC0415

        there = Store(data.store).settings
        wanted = Preprocessing(data.patch_size, there.spacing_mm, there.padding_hu, padding=data.padding)
    _, patches, preprocessing = open_patches(source, wanted)
    if len(patches.rejected):
        patches.rejected.to_csv(settings.paths.run / "rejected.csv", index=False)
        logger.info("%d rows cannot be used: %s", len(patches.rejected), settings.paths.run / "rejected.csv")
    return patches, preprocessing


def _with_validation(part: Part, labels: Labels, patients: Array, share: float, seed: int) -> Part:
    """Set a share of the training patients aside, unless the split has done so."""
    if part.val is not None:
        return part
    values = labels.values[part.train]
    num_folds = max(2, min(round(1 / share), np.bincount(strata(labels.kind, values)).max()))
    folds = grouped_folds(labels.kind, values, patients[part.train], num_folds, seed)
    fit, check = folds[0]
    return replace(part, train=part.train[fit], val=part.train[check])
