"""Probes of frozen features: logistic regression, nearest neighbours, ridge, Cox. The test set chooses nothing.

A probe is fitted for all its settings at once. The one that is best on folds of the training patients, or on a given
validation set, is fitted on all training rows. Features are standardised by the rows that a fit sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from fmcib_ssl.evaluation.folds import grouped_folds
from fmcib_ssl.evaluation.metrics import Kind, auc, concordance
from fmcib_ssl.evaluation.survival import cox_path

Array = npt.NDArray[Any]

#: Inverse strengths of the ridge penalty of logistic regression.
C_GRID = tuple(float(c) for c in np.logspace(-5, 2, 15))
ALPHA_GRID = tuple(float(a) for a in np.logspace(-1, 6, 15))
COX_GRID = tuple(float(a) for a in np.logspace(0, 5, 11))
NEIGHBOR_GRID = (1.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True)
class Inputs:
    """What a probe is given for every lesion.

    Attributes:
        name: in tables.
        x: `(n, dim + num_beside)`; the last `num_beside` columns, such as a diameter, stand beside the features.
        num_components: reduce the features by a PCA of the training rows first, as raw voxels need.
        num_beside: columns that such a PCA leaves alone.
        linear_only: not for nearest neighbours, whose cosine knows only the sign of a single column.
    """

    name: str
    x: Array
    num_components: int | None = None
    num_beside: int = 0
    linear_only: bool = False


@dataclass(frozen=True)
class Probe:
    """A family of models with one setting.

    Attributes:
        name: as it is asked for.
        kinds: labels that it can learn.
        settings: among which the training rows choose.
        path: from training rows, their labels, test rows, the number of classes and the settings to the test rows'
            scores for each setting, `(settings, n)` or `(settings, n, classes)`: probabilities, values or log-hazards.
    """

    name: str
    kinds: tuple[Kind, ...]
    settings: tuple[float, ...]
    path: Callable[[Array, Array, Array, int, Sequence[float]], Array]


def preparation(x: Array, num_components: int | None, seed: int, num_beside: int = 0) -> Pipeline:
    """Standardise, for voxels after a PCA: they share a unit, scaling them would only raise quiet ones' noise."""
    steps: list[Any] = [StandardScaler()]
    if num_components is not None:
        dim = x.shape[1] - num_beside
        pca = PCA(min(num_components, len(x), dim), svd_solver="randomized", random_state=seed)
        if num_beside:
            pca = ColumnTransformer([("pca", pca, slice(0, dim))], remainder="passthrough")
        steps = [pca, *steps]
    return make_pipeline(*steps).fit(x)


def _logistic(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Array:
    scores = np.zeros((len(settings), len(x_test), num_classes))
    for k, c in enumerate(settings):
        model = LogisticRegression(C=c, max_iter=5000).fit(x, y)
        scores[k][:, model.classes_] = model.predict_proba(x_test)
    return scores[:, :, 1] if num_classes == 2 else scores


def _neighbors(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Array:
    """By the cosine of standardised features, each of the k nearest with one vote."""
    nearest = np.argsort(-(normalize(x_test) @ normalize(x).T), axis=1, kind="stable")[:, : int(max(settings))]
    voices = np.eye(num_classes)[y.astype(int)] if num_classes else y[:, None]
    totals = np.cumsum(voices[nearest], axis=1)
    places = [min(int(k), totals.shape[1]) for k in settings]
    scores: Array = np.stack([totals[:, k - 1] / k for k in places])
    if num_classes == 2:
        return scores[:, :, 1]
    return scores if num_classes else scores[:, :, 0]


def _ridge(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Array:
    """All penalties from one decomposition: with `x = U S V`, the coefficients are `V' S / (S^2 + alpha) U' y`."""
    del num_classes
    middle, mean = x.mean(0), y.mean()
    u, s, v = np.linalg.svd(x - middle, full_matrices=False)
    along, shrunk = (x_test - middle) @ v.T, s * (u.T @ (y - mean))
    return np.stack([mean + along @ (shrunk / (s**2 + alpha)) for alpha in settings])


def _cox(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Array:
    del num_classes
    risks: Array = cox_path(x, y, settings) @ x_test.T
    return risks


PROBES = {
    probe.name: probe
    for probe in (
        Probe("logistic", ("binary", "multiclass"), C_GRID, _logistic),
        Probe("knn", ("binary", "multiclass", "ordinal", "continuous"), NEIGHBOR_GRID, _neighbors),
        Probe("ridge", ("ordinal", "continuous"), ALPHA_GRID, _ridge),
        Probe("cox", ("survival",), COX_GRID, _cox),
    )
}
#: The linear probe of each kind of label; it is the one that is used unless another is asked for.
LINEAR_PROBE: dict[Kind, str] = {
    kind: next(name for name, probe in PROBES.items() if kind in probe.kinds and name != "knn")
    for kind in get_args(Kind)
}


def setting_scores(kind: Kind, labels: Array, scores: Array) -> Array:
    """How good each setting is, higher is better: AUC, C-index, or for values the squared error, negative."""
    if kind in ("ordinal", "continuous"):
        error: Array = -np.square(scores - labels).mean(axis=1)
        return error
    metric = concordance if kind == "survival" else auc
    one = np.ones((1, len(labels)))
    return np.array([metric(labels, of_setting, one)[0] for of_setting in scores])


def choose_setting(
    probe: Probe,
    kind: Kind,
    inputs: Inputs,
    labels: Array,
    patients: Array,
    *,
    num_classes: int,
    validation: tuple[Array, Array] | None = None,
    num_folds: int = 5,
    seed: int = 0,
) -> float:
    """The setting with the best mean over folds of the patients, or the best on a validation set.

    Args:
        probe: what is fitted.
        kind: of the labels.
        inputs: the training rows.
        labels: of the training rows.
        patients: of the training rows; a patient is in one fold.
        num_classes: 0 unless the labels are classes.
        validation: rows and labels to choose by, instead of folds.
        num_folds: at most; fewer where a class has fewer patients.
        seed: of the folds and of a PCA.

    Raises:
        ValueError: a class has fewer than two patients, so that there are no folds.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "settings": probe.settings, "seed": seed}
    if validation is not None:
        scores = _scores(probe, inputs, labels, validation[0], **options)
        return probe.settings[int(np.argmax(np.nan_to_num(setting_scores(kind, validation[1], scores), nan=-np.inf)))]
    found = []
    for fit, check in grouped_folds(kind, labels, patients, num_folds, seed):
        train = Inputs(inputs.name, inputs.x[fit], inputs.num_components, inputs.num_beside)
        scores = _scores(probe, train, labels[fit], inputs.x[check], **options)
        found.append(setting_scores(kind, labels[check], scores))
    folds = np.array(found)
    folds = folds[~np.isnan(folds).any(axis=1)]  # a fold without an event, or without one of two classes
    return probe.settings[int(np.argmax(folds.mean(axis=0)))] if len(folds) else probe.settings[0]


def fit_and_score(
    probe: Probe,
    inputs: Inputs,
    labels: Array,
    x_test: Array,
    *,
    num_classes: int,
    setting: float,
    seed: int = 0,
) -> Array:
    """Scores of the test rows by a probe that was fitted on all training rows, `(n,)` or `(n, classes)`."""
    scores: Array = _scores(probe, inputs, labels, x_test, num_classes=num_classes, settings=(setting,), seed=seed)[0]
    return scores


def _scores(
    probe: Probe, train: Inputs, labels: Array, x_test: Array, *, num_classes: int, settings: Sequence[float], seed: int
) -> Array:
    prepare = preparation(train.x, train.num_components, seed, train.num_beside)
    return probe.path(prepare.transform(train.x), labels, prepare.transform(x_test), num_classes, settings)
