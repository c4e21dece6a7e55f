"""Probes of frozen features: logistic regression, nearest neighbours, ridge, Cox. The test set chooses nothing.

The setting that is best on folds of the training patients, or on a given validation set, is fitted on all training
rows. Features are standardised by the rows that a fit sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from fmcib_ssl.evaluation.metrics import Kind, auc, concordance
from fmcib_ssl.evaluation.survival import cox_path

Array = npt.NDArray[Any]

#: From the strongest regularisation to the weakest; of logistic regression inverse strengths of the ridge penalty.
C_GRID = tuple(float(c) for c in np.logspace(-5, 2, 15))
ALPHA_GRID = tuple(float(a) for a in np.logspace(6, -1, 15))
COX_GRID = tuple(float(a) for a in np.logspace(5, 0, 11))
NEIGHBOR_GRID = (80.0, 40.0, 20.0, 10.0, 5.0, 3.0, 1.0)
#: Fits take longer the weaker the penalty: after so many that are worse than the best, weaker ones are left out.
PATIENCE = 4


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
        settings: among which the training rows choose, from the strongest regularisation to the weakest.
        path: from training rows, their labels, test rows, the number of classes and the settings to the test rows'
            scores for one setting after the other, `(n,)` or `(n, classes)`: probabilities, values or log-hazards.
        probabilities: scores are probabilities to be taken at their word: of settings with one AUC, such as all
            penalties of a single column, that with the best log loss is chosen.
    """

    name: str
    kinds: tuple[Kind, ...]
    settings: tuple[float, ...]
    path: Callable[[Array, Array, Array, int, Sequence[float]], Iterable[Array]]
    probabilities: bool = False


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


def _logistic(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Iterator[Array]:
    """The minimum that scikit-learn's `LogisticRegression` has, for each setting from where the last one ended.

    In the basis of the rows' singular vectors the penalty is the same, there are no more columns than rows, and the
    Hessian is nearly diagonal, so that a few steps of L-BFGS on columns that are scaled by it reach the minimum.
    """
    classes, of_class = np.unique(y.astype(int), return_inverse=True)
    one_hot = np.eye(len(classes))[:, of_class] / len(y)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    rows, rows_test = (np.column_stack([part, np.ones(len(part))]) for part in (u * s, x_test @ v.T))
    curvature = np.append(s**2 / len(y), 1.0)
    coefficients = np.zeros((1 if len(classes) == 2 else len(classes), len(s) + 1))
    coefficients[:, -1] = np.log(one_hot.sum(1))[-len(coefficients) :]
    if len(classes) == 2:
        coefficients[:, -1] -= np.log(one_hot.sum(1))[0]

    def log_probabilities(of: Array, b: Array) -> Array:
        """`(classes, n)`. Of two classes the first has a logit of 0."""
        logits = np.stack([of @ column for column in b])  # many times as fast as one product of so narrow a matrix
        logits = np.pad(logits, ((len(classes) - len(b), 0), (0, 0)))
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=0))

    def loss(flat: Array, scale: Array, penalty: Array) -> tuple[float, Array]:
        b = flat.reshape(scale.shape) * scale
        log_p = log_probabilities(rows, b)
        residuals = (np.exp(log_p) / len(y) - one_hot)[-len(b) :]
        slope = np.stack([residual @ rows for residual in residuals]) + penalty * b
        return float((penalty * b * b).sum() / 2 - (one_hot * log_p).sum()), (slope * scale).ravel()

    for c in settings:
        penalty = np.append(np.full(len(s), 1 / (c * len(y))), 0.0)
        p = np.exp(log_probabilities(rows, coefficients))[-len(coefficients) :]
        scale = 1 / np.sqrt(np.outer(np.maximum((p * (1 - p)).mean(1), 1e-3), curvature) + penalty)
        start, options = (coefficients / scale).ravel(), {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-7}
        fit = minimize(loss, start, (scale, penalty), "L-BFGS-B", jac=True, options=options)
        coefficients = fit.x.reshape(scale.shape) * scale
        scores = np.zeros((len(x_test), num_classes))
        scores[:, classes] = np.exp(log_probabilities(rows_test, coefficients)).T
        yield scores[:, 1] if num_classes == 2 else scores


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
        Probe("logistic", ("binary", "multiclass"), C_GRID, _logistic, probabilities=True),
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


def setting_score(kind: Kind, labels: Array, scores: Array) -> float:
    """How good a setting is, higher is better: AUC, C-index, or the squared error, negative."""
    if kind in ("ordinal", "continuous"):
        return float(-np.square(scores - labels).mean())
    metric = concordance if kind == "survival" else auc
    return float(metric(labels, scores, np.ones((1, len(labels))))[0])


def log_likelihood(labels: Array, scores: Array) -> float:
    """Mean log-probability of the true class: log loss, negative."""
    by_class = scores if scores.ndim == 2 else np.stack([1 - scores, scores], axis=1)
    of_truth = np.take_along_axis(by_class, labels.astype(int)[:, None], axis=1)
    return float(np.log(np.maximum(of_truth, np.finfo(float).eps)).mean())


def choose_setting(
    probe: Probe,
    kind: Kind,
    inputs: Inputs,
    labels: Array,
    folds: Sequence[tuple[Array, Array]],
    *,
    num_classes: int,
    validation: tuple[Array, Array] | None = None,
    seed: int = 0,
) -> float:
    """The setting with the best mean over folds, or the best on a validation set.

    Of equally good ones that with the best log loss, if scores are probabilities, then that with the weakest
    regularisation. AUC comes first: by log loss, features that tell little would be given penalties under which they
    tell nothing, and a baseline is to be as good as it can be.

    Args:
        probe: what is fitted.
        kind: of the labels.
        inputs: the training rows.
        labels: of the training rows.
        folds: of the training rows: which are fitted on and which judge; not used with a validation set.
        num_classes: 0 unless the labels are classes.
        validation: rows and labels to choose by, instead of folds.
        seed: of a PCA.
    """
    sides = [(fit, inputs.x[check], labels[check]) for fit, check in folds]
    if validation is not None:
        sides = [(np.arange(len(labels)), *validation)]
    options: dict[str, Any] = {"num_classes": num_classes, "settings": probe.settings, "seed": seed}
    paths = [
        _path(probe, replace(inputs, x=inputs.x[fit]), labels[fit], x_check, **options) for fit, x_check, _ in sides
    ]
    best, highest, likeliest = 0, -np.inf, -np.inf
    for k, of_setting in enumerate(zip(*paths, strict=True)):
        judged = [(y, scores) for (_, _, y), scores in zip(sides, of_setting, strict=True)]
        values = [setting_score(kind, y, scores) for y, scores in judged]
        known = [value for value in values if not np.isnan(value)]  # not of a fold without an event, or of one class
        value = float(np.mean(known)) if known else -np.inf
        likelihood = float(np.mean([log_likelihood(*one) for one in judged])) if probe.probabilities else 0.0
        tie = abs(value - highest) <= 1e-6 * abs(highest)
        if (likelihood >= likeliest - 1e-6 * abs(likeliest)) if tie else value > highest:
            best, highest, likeliest = k, value, likelihood
        elif probe.probabilities and k - best >= PATIENCE:
            break
    return probe.settings[best]


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
    (scores,) = _path(probe, inputs, labels, x_test, num_classes=num_classes, settings=(setting,), seed=seed)
    return scores


def _path(
    probe: Probe, train: Inputs, labels: Array, x_test: Array, *, num_classes: int, settings: Sequence[float], seed: int
) -> Iterator[Array]:
    """Scores of the test rows for one setting after the other."""
    prepare = preparation(train.x, train.num_components, seed, train.num_beside)
    yield from probe.path(prepare.transform(train.x), labels, prepare.transform(x_test), num_classes, settings)
