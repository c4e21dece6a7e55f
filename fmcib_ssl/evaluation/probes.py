"""What frozen features know: linear probes and AUCs, with intervals by bootstrap over patients.

Lesions of a patient resemble each other, so whole patients are drawn, for the intervals as for the folds in which the
probe's penalty is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int16
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from fmcib_ssl.evaluation.bootstrap import Estimate, interval, patient_weights
from fmcib_ssl.evaluation.frozen_probes import C_GRID, PROBES, Inputs, choose_setting, preparation
from fmcib_ssl.evaluation.metrics import auc
from fmcib_ssl.types import Preprocessing

__all__ = [
    "C_GRID",
    "Estimate",
    "ProbeResult",
    "embed",
    "linear_probe",
    "paired_auc_difference",
    "raw_voxel_features",
    "roc_auc",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ProbeResult:
    """How a probe did on the test set.

    Attributes:
        auc: area under the ROC curve.
        scores: log-odds of class 1 for every test row, `(num_test,)`.
        c: the inverse strength of the penalty that the training folds chose.
    """

    auc: Estimate
    scores: Array
    c: float


def linear_probe(
    train_features: npt.ArrayLike,
    train_labels: npt.ArrayLike,
    test_features: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    *,
    train_groups: npt.ArrayLike | None = None,
    test_groups: npt.ArrayLike | None = None,
    num_components: int | None = None,
    num_folds: int = 5,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> ProbeResult:
    """Fit logistic regression on frozen features of the training set and score the test set.

    Features are standardised by the training set. The penalty is the one with the best mean AUC over folds of the
    training set, grouped by patient.

    Args:
        train_features: `(num_train, dim)`.
        train_labels: 0 or 1, `(num_train,)`.
        test_features: `(num_test, dim)`.
        test_labels: 0 or 1, `(num_test,)`.
        train_groups: the patient of every training row; by default each row is its own.
        test_groups: the patient of every test row.
        num_components: reduce the features by a PCA fitted on the training rows first, as raw voxels need.
        num_folds: of the cross-validation.
        num_bootstrap: resamples for the interval.
        seed: of the folds, the PCA and the bootstrap.

    Raises:
        ValueError: shapes do not fit each other, a feature is not finite, labels are not 0 and 1, a patient is on
            both sides, or a class has fewer patients than there are folds.
    """
    x, y, groups = _checked(train_features, train_labels, train_groups, "training set")
    x_test, y_test, groups_test = _checked(test_features, test_labels, test_groups, "test set")
    if train_groups is not None and test_groups is not None:
        shared = np.intersect1d(groups, groups_test).tolist()
        if shared:
            raise ValueError(f"{len(shared)} patients are in both the training and the test set, such as {shared[:5]}")
    num_patients = [len(np.unique(groups[y == label])) for label in (0, 1)]
    if min(num_patients) < num_folds:
        raise ValueError(
            f"{num_folds} folds need {num_folds} patients of each class in the training set, got "
            f"{num_patients[0]} with label 0 and {num_patients[1]} with label 1: give more data or fewer folds"
        )
    inputs = Inputs("features", x, num_components)
    c = choose_setting(PROBES["logistic"], "binary", inputs, y, groups, num_classes=2, num_folds=num_folds, seed=seed)
    prepare = preparation(x, num_components, seed)
    model = LogisticRegression(C=c, max_iter=5000).fit(prepare.transform(x), y)
    scores = np.asarray(model.decision_function(prepare.transform(x_test)))
    estimate = roc_auc(y_test, scores, groups_test, num_bootstrap=num_bootstrap, seed=seed)
    return ProbeResult(estimate, scores, c)


def roc_auc(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Area under the ROC curve with its percentile interval, patients drawn with replacement.

    Args:
        labels: 0 or 1, `(n,)`.
        scores: higher means class 1, `(n,)`.
        groups: the patient of every row; by default each row is its own.
        num_bootstrap: resamples; one that lacks a class is left out.
        seed: of the resamples.

    Raises:
        ValueError: lengths differ, a score is not finite, or labels are not 0 and 1.
    """
    column, y, patients = _checked(np.reshape(scores, (-1, 1)), labels, groups, "scores")
    value = auc(y, column[:, 0], np.ones((1, len(y))))[0]
    return interval(value, auc(y, column[:, 0], patient_weights(patients, num_bootstrap, seed)))


def paired_auc_difference(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    baseline_scores: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> Estimate:
    """AUC of `scores` less that of `baseline_scores` on the same rows, each resample drawn for both.

    The interval is narrower than two separate ones suggest: both scores meet the same easy and hard patients.
    Arguments and errors are those of `roc_auc`.
    """
    both, y, patients = _checked(np.column_stack([scores, baseline_scores]), labels, groups, "scores")
    weights = np.concatenate([np.ones((1, len(y))), patient_weights(patients, num_bootstrap, seed)])
    ahead = auc(y, both[:, 0], weights) - auc(y, both[:, 1], weights)
    return interval(ahead[0], ahead[1:])


def embed(
    encoder: nn.Module,
    patches: Iterable[Int16[Tensor, "1 z y x"]],
    preprocessing: Preprocessing,
    *,
    batch_size: int = 32,
) -> Array:
    """Features of patches in HU, float32 `(num_patches, features)`, in their order.

    Runs in evaluation mode and on the device of the encoder's parameters; the encoder's mode is restored.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        patches: int16, HU.
        preprocessing: how the encoder was trained to see them.
        batch_size: patches in one forward.

    Raises:
        ValueError: there is no patch, or a patch is not of the size that `preprocessing` names.
    """
    device = next(encoder.parameters()).device
    expected = (1, *preprocessing.patch_size_zyx)
    features: list[Array] = []
    batch: list[Tensor] = []

    def flush() -> None:
        features.append(encoder(preprocessing.normalize(torch.stack(batch).to(device))).float().cpu().numpy())
        batch.clear()

    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            for number, patch in enumerate(patches):
                if tuple(patch.shape) != expected:
                    raise ValueError(
                        f"patch {number} is {tuple(patch.shape)}, the encoder was trained on {expected} (1, z, y, x)"
                    )
                batch.append(patch)
                if len(batch) == batch_size:
                    flush()
            if batch:
                flush()
    finally:
        encoder.train(was_training)
    if not features:
        raise ValueError("there are no patches to embed")
    return np.concatenate(features)


def raw_voxel_features(patches: Iterable[Int16[Tensor, "1 z y x"]], preprocessing: Preprocessing) -> Array:
    """The baseline that knows nothing: each patch's normalised voxels as a row, float32 `(num_patches, voxels)`.

    Give `linear_probe` a `num_components` with it, 64 say.
    """
    return np.stack([preprocessing.normalize(patch).flatten().numpy() for patch in patches])


def _checked(
    features: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike | None, name: str
) -> tuple[Array, Array, Array]:
    """Features as floats, labels as integers 0 and 1, groups or a group a row."""
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    patients = np.arange(len(y)) if groups is None else np.asarray(groups)
    if x.ndim != 2 or y.shape != (len(x),) or patients.shape != (len(x),):
        raise ValueError(
            f"{name}: features should be (n, dim), labels and groups (n,), got {x.shape}, {y.shape}, {patients.shape}"
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise ValueError(f"{name}: {len(bad)} of {len(x)} rows hold NaN or infinity, the first is row {bad[0]}")
    if not np.array_equal(np.unique(y), [0, 1]):
        raise ValueError(f"{name}: labels should be 0 and 1, both present, got {np.unique(y).tolist()[:5]}")
    return x, y.astype(np.int64), patients
