"""Probes of frozen features: logistic, nearest neighbours, ridge, Cox, attention. The test set chooses nothing.

The setting that is best on folds of the training patients, or on given validation rows, is fitted on all training rows.
Features are standardised by the rows that a fit sees. At the end of the module are the quick probes that run while an
encoder is trained, and the nearest lesions of other patients, which a report shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
from scipy.optimize import minimize
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler, normalize

from fmcib_ssl.evaluation.labels import Labels, Split, grouped_folds, nested_share
from fmcib_ssl.evaluation.metrics import (
    Estimate,
    Kind,
    Metric,
    auc,
    balanced_accuracy,
    by_class_of,
    concordance,
    interval,
    mean_of_known,
    most_raised,
    patient_weights,
    value_of,
)
from fmcib_ssl.types import Array

#: Fits take longer the weaker the penalty: after so many that are worse than the best, weaker ones are left out.
_PATIENCE = 4
#: Standardised features are clipped to this many standard deviations.
_CLIP = 10.0
#: Sharpness of the vote while training, as Wu et al. and most who came after them have it.
_KNN_TEMPERATURE = 0.07


@dataclass(frozen=True)
class Inputs:
    """What a probe is given for every lesion.

    Attributes:
        name: in tables.
        x: `(n, dim + num_beside)`; the last `num_beside` columns, such as a diameter, stand beside the features. For
            the probe `attention` it may be `(patients, lesions, dim)`, NaN where a patient has fewer lesions.
        num_components: reduce the features by a PCA of the training rows first, as raw voxels need.
        num_beside: columns that such a PCA leaves alone.
        linear_only: not for nearest neighbours, whose cosine knows only the sign of a single column.
    """

    name: str
    x: Array
    num_components: int | None = None
    num_beside: int = 0
    linear_only: bool = False


@dataclass(frozen=True, eq=False)
class Protocol:
    """What all features are evaluated on.

    Attributes:
        labels: the row numbers of splits count these.
        patients: the patient of every lesion, `(n,)`.
        splits: who is trained on and who is tested.
        name: of the splits, in tables of results.
        seed: decides inner folds, PCA, which patients are in a share of the labels, and the resamples.
        num_inner_folds: folds of the training patients by which a setting is chosen, at least 2.
        population: patients of all evaluations that meet the same resamples, these among them; empty: only these.
    """

    labels: Labels
    patients: Array
    splits: Sequence[Split]
    name: str
    seed: int = 0
    num_inner_folds: int = 5
    population: Sequence[str] = ()

    @lru_cache(256)  # noqa: B019  # drawn once for all features; the rows are few
    def training(self, split: Split, fraction: float) -> tuple[Array, list[tuple[Array, Array]]]:
        """Rows to train on, a share of the split's, and pairs of rows to fit and to check by which a setting is chosen.

        Where the split has validation rows these are what is checked.

        Raises:
            ValueError: too few patients of a class for folds.
        """
        kind, labels, patients = self.labels.kind, self.labels.values, self.patients
        rows = nested_share(kind, labels, patients, split.train, fraction=fraction, seed=self.seed)
        if split.val is not None:
            return rows, [(rows, split.val)]
        pairs = grouped_folds(kind, labels[rows], patients[rows], self.num_inner_folds, self.seed)
        return rows, [(rows[fit], rows[check]) for fit, check in pairs]

    def weights(self, num_bootstrap: int) -> Array:
        """Weights of every lesion, as of `patient_weights`."""
        others = np.setdiff1d(self.population, self.patients) if len(self.population) else self.patients[:0]
        weights = patient_weights(np.concatenate([self.patients, others]), num_bootstrap, self.seed)
        return weights[:, : len(self.patients)]


@dataclass(frozen=True)
class SplitScores:
    """What a probe makes of the test rows of a split; `scores` are `(n,)` or `(n, classes)`, `chosen` class numbers."""

    split: str
    rows: Array
    scores: Array
    setting: float
    num_train: int
    chosen: Array | None = None


@dataclass(frozen=True)
class Probe:
    """A family of models with one setting.

    Attributes:
        kinds: labels that it can learn.
        settings: among which the training rows choose, from the strongest regularisation to the weakest.
        path: from training rows, their labels, test rows, the number of classes and the settings to the test rows'
            scores for one setting after the other, `(n,)` or `(n, classes)`: probabilities, values or log-hazards.
        probabilities: scores are probabilities to be taken at their word: of settings with one AUC, such as all
            penalties of a single column, that with the best log loss is chosen.
    """

    kinds: tuple[Kind, ...]
    settings: tuple[float, ...]
    path: Callable[[Array, Array, Array, int, Sequence[float]], Iterable[Array]]
    probabilities: bool = False


def _logistic(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Iterator[Array]:
    """The minimum that scikit-learn's `LogisticRegression` has, for each setting from where the last one ended.

    In the basis of the rows' singular vectors the penalty is the same, there are no more columns than rows, and the
    Hessian is nearly diagonal, so that a few steps of L-BFGS on columns that are scaled by it reach the minimum.
    """
    # scikit-learn's GridSearchCV can express the choice (a callable `refit`) and finds the same penalty, but it begins
    # every fit anew: for 994 lesions with 128 features, 15 penalties and 5 folds 2.9 s of one core; this takes 0.2 s.
    if num_classes:
        classes, of_class = np.unique(y.astype(int), return_inverse=True)
        one_hot = np.eye(len(classes))[:, of_class] / len(y)
    else:  # shares of votes: each row is as much of class 1 as its share says
        classes, num_classes, one_hot = np.arange(2), 2, np.stack([1 - y, y]) / len(y)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    rows, rows_test = (np.column_stack([side, np.ones(len(side))]) for side in (u * s, x_test @ v.T))
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
    nearest, _ = _nearest(normalize(x_test) @ normalize(x).T, int(max(settings)))
    votes = np.eye(num_classes)[y.astype(int)] if num_classes else y[:, None]
    totals = np.cumsum(votes[nearest], axis=1)
    counts = [min(int(k), totals.shape[1]) for k in settings]
    scores: Array = np.stack([totals[:, k - 1] / k for k in counts])
    return scores if num_classes > 2 else scores[:, :, -1]


def _ridge(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Array:
    """All penalties from one decomposition: with `x = U S V`, the coefficients are `V' S / (S^2 + alpha) U' y`."""
    del num_classes
    middle, mean = x.mean(0), y.mean()
    u, s, v = np.linalg.svd(x - middle, full_matrices=False)
    along, shrunk = (x_test - middle) @ v.T, s * (u.T @ (y - mean))
    return np.stack([mean + along @ (shrunk / (s**2 + alpha)) for alpha in settings])


def _cox(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Array:
    """Log-hazards by the Cox model, for each penalty above 0; `y` is `(n, 2)`: time, and 1 where the event was seen.

    What is minimised is `penalty / 2 * |b|^2` less the logarithm of the partial likelihood, ties by Breslow's method.
    It is written here, since what is published does not fit: lifelines needs pandas below 3, scikit-survival is under
    the GPL and bound to one release of scikit-learn, and both take minutes for hundreds of features.

    Source: Cox, Regression Models and Life-Tables, 1972; Breslow, Covariance Analysis of Censored Survival Data, 1974.
    """
    del num_classes
    if not y[:, 1].any():
        raise ValueError("no event was seen: a Cox model has nothing to learn from")
    # Of more features than rows only the span of the rows has coefficients, for any penalty above 0: fit in its basis.
    basis = np.linalg.svd(x, full_matrices=False)[2] if x.shape[1] > len(x) else np.eye(x.shape[1])
    order = np.argsort(-y[:, 0], kind="stable")
    time, event, rows = y[order, 0], y[order, 1], x[order] @ basis.T
    # In descending time, those at risk with row i are all up to the last row of its time.
    first, last = np.searchsorted(-time, -time, "left"), np.searchsorted(-time, -time, "right") - 1

    def loss(b: Array, penalty: float) -> tuple[float, Array]:
        risk = rows @ b
        hazard = np.exp(risk - risk.max())
        at_risk = np.cumsum(hazard)[last]
        log_likelihood = event @ (risk - risk.max() - np.log(at_risk))
        cumulative = np.cumsum((event / at_risk)[::-1])[::-1][first]
        slope = rows.T @ (event - hazard * cumulative)
        return float(penalty / 2 * b @ b - log_likelihood), penalty * b - slope

    coefficients = np.zeros((len(settings), rows.shape[1]))
    start, options = np.zeros(rows.shape[1]), {"maxiter": 2000, "ftol": 1e-11, "gtol": 1e-6}
    for k in np.argsort(settings)[::-1]:  # from the strongest, each begins where the last one ended
        start = minimize(loss, start, (settings[k],), "L-BFGS-B", jac=True, options=options).x
        coefficients[k] = start
    return np.asarray(coefficients @ basis @ x_test.T)


def _attention(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Iterator[Array]:
    from fmcib_ssl.evaluation.attention import attention_scores  # noqa: PLC0415  # torch takes seconds

    return attention_scores(x, y, x_test, num_classes, settings)


def _grid(first: float, last: float, num: int) -> tuple[float, ...]:
    return tuple(float(value) for value in np.logspace(first, last, num))


_CLASSES: tuple[Kind, ...] = ("binary", "multiclass")
_VALUES: tuple[Kind, ...] = ("ordinal", "continuous", "share")
PROBES = {
    "logistic": Probe((*_CLASSES, "share"), _grid(-5, 2, 15), _logistic, probabilities=True),  # inverse strengths
    "knn": Probe(_CLASSES + _VALUES, (80.0, 40.0, 20.0, 10.0, 5.0, 3.0, 1.0), _neighbors),
    "ridge": Probe(_VALUES[:2], _grid(6, -1, 15), _ridge),
    "cox": Probe(("survival",), _grid(5, 0, 11), _cox),
    "attention": Probe((*_CLASSES, *_VALUES[:2], "survival"), _grid(4, -1, 6), _attention),  # of patients
}
#: The linear probe of each kind of label; it is the one that is used unless another is asked for.
LINEAR_PROBE: dict[Kind, str] = {
    kind: next(name for name, probe in PROBES.items() if kind in probe.kinds and name != "knn")
    for kind in get_args(Kind)
}


def score(probe: Probe, inputs: Inputs, protocol: Protocol, fraction: float = 1.0) -> list[SplitScores]:
    """Fit a probe on the training rows of every split, or on a share of their patients, and score the test rows.

    Raises:
        ValueError: too few patients of a class to choose a setting.
    """
    labels, results = protocol.labels, []
    for split in protocol.splits:
        rows, folds = protocol.training(split, fraction)
        setting = _choose_setting(probe, inputs, labels, folds, protocol.seed)
        (scores,) = _path(probe, inputs, labels, (rows, split.test), settings=(setting,), seed=protocol.seed)
        chosen = None
        if labels.num_classes:
            shares = np.bincount(labels.values[rows], minlength=labels.num_classes) / len(rows)
            chosen = most_raised(scores, shares)
        results.append(SplitScores(split.name, split.test, scores, setting, len(rows), chosen))
    return results


def _choose_setting(
    probe: Probe, inputs: Inputs, labels: Labels, folds: Sequence[tuple[Array, Array]], seed: int = 0
) -> float:
    """The setting with the best mean over pairs of rows to fit and to check.

    Of equally good ones that with the best log loss, if scores are probabilities, then that with the weakest
    regularisation. AUC comes first: by log loss, features that tell little would be given penalties under which they
    tell nothing, and a baseline is to be as good as it can be.
    """
    paths = [_path(probe, inputs, labels, fold, settings=probe.settings, seed=seed) for fold in folds]
    truths = [labels.values[check] for _, check in folds]
    best, highest, likeliest = 0, -np.inf, -np.inf
    for k, of_setting in enumerate(zip(*paths, strict=True)):
        judged = list(zip(truths, of_setting, strict=True))
        values = [_setting_score(labels.kind, y, scores) for y, scores in judged]
        known = [value for value in values if not np.isnan(value)]  # not of a fold without an event, or of one class
        value = float(np.mean(known)) if known else -np.inf
        likelihood = float(np.mean([_log_likelihood(*one) for one in judged])) if probe.probabilities else 0.0
        tie = abs(value - highest) <= 1e-6 * abs(highest)
        if (likelihood >= likeliest - 1e-6 * abs(likeliest)) if tie else value > highest:
            best, highest, likeliest = k, value, likelihood
        elif probe.probabilities and k - best >= _PATIENCE:
            break
    return probe.settings[best]


def _path(
    probe: Probe, inputs: Inputs, labels: Labels, fold: tuple[Array, Array], *, settings: Sequence[float], seed: int
) -> Iterator[Array]:
    """Scores of the rows to check, fitted on the others, for one setting after the other."""
    fit, check = fold
    prepare = _preparation(inputs, fit, seed)
    x, x_test = (_by_lesion(prepare.transform, inputs.x[rows]) for rows in (fit, check))
    yield from probe.path(x, labels.values[fit], x_test, labels.num_classes, settings)


def _by_lesion(transform: Callable[[Array], Array], x: Array) -> Array:
    """Rows of `x`, or of each of its patients the lesions, through a transform."""
    return transform(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _preparation(inputs: Inputs, rows: Array, seed: int) -> Pipeline:
    """Standardise by these rows; voxels after a PCA: they share a unit, and scaling would raise quiet ones' noise.

    Then clip: a channel that is silent in these rows and answers in one other row has a value there of thousands of
    their standard deviations, and alone would decide that row's score.
    """
    steps: list[Any] = [StandardScaler(), FunctionTransformer(np.clip, kw_args={"a_min": -_CLIP, "a_max": _CLIP})]
    if inputs.num_components is not None:
        dim = inputs.x.shape[1] - inputs.num_beside
        pca = PCA(min(inputs.num_components, len(rows), dim), svd_solver="randomized", random_state=seed)
        if inputs.num_beside:
            pca = ColumnTransformer([("pca", pca, slice(0, dim))], remainder="passthrough")
        steps = [pca, *steps]
    x = inputs.x[rows]
    return make_pipeline(*steps).fit(x.reshape(-1, x.shape[-1]))


def _setting_score(kind: Kind, labels: Array, scores: Array) -> float:
    """How good a setting is, higher is better: AUC, C-index, or the squared error, negative."""
    if kind in _VALUES:
        return float(-np.square(scores - labels).mean())
    return value_of(concordance if kind == "survival" else auc, labels, scores)


def _log_likelihood(labels: Array, scores: Array) -> float:
    """Mean log-probability of the true class, or of both weighed by their shares: log loss, negative."""
    by_class = np.log(np.maximum(by_class_of(scores), np.finfo(float).eps))
    if by_class.shape[1] == 2:
        return float((np.stack([1 - labels, labels], axis=1) * by_class).sum(axis=1).mean())
    return float(np.take_along_axis(by_class, labels.astype(int)[:, None], axis=1).mean())


def resampled(metric: Metric, values: Array, results: Sequence[SplitScores], weights: Array) -> Array:
    """A metric for every row of weights: within each split, then the mean over those where it has a value.

    Scores of two splits come from two models and share no scale, so lesions of different splits are not compared.
    """
    by_split = []
    for one in results:
        scores = one.chosen if metric is balanced_accuracy and one.chosen is not None else one.scores
        by_split.append(metric(values[one.rows], scores, weights[:, one.rows]))
    return mean_of_known(by_split)


def within(results: Sequence[SplitScores], strata: Array) -> list[SplitScores]:
    """Each split's scores cut into strata, `(n,)`: `resampled` then compares only lesions of one stratum."""
    return [
        replace(
            one,
            rows=one.rows[own],
            scores=one.scores[own],
            chosen=None if one.chosen is None else one.chosen[own],
        )
        for one in results
        for stratum in np.unique(strata)
        if (own := strata[one.rows] == stratum).any()
    ]


def estimate(metric: Metric, values: Array, results: Sequence[SplitScores], weights: Array) -> Estimate:
    """The value by the first row of weights, the interval by the others.

    Raises:
        ValueError: no resample has a value.
    """
    return interval(resampled(metric, values, results, weights))


class Neighbors(NamedTuple):
    """The nearest lesions of other patients, the nearest first; -1 and -inf where there are no more of them."""

    rows: Array  # (queries, k)
    cosines: Array  # (queries, k)


def nearest_lesions(features: Array, patients: Array, queries: Sequence[int], num_neighbors: int = 5) -> Neighbors:
    """Find each query's nearest neighbours by cosine, leaving out lesions of its own patient.

    Args:
        features: `(n, dim)`.
        patients: of every lesion, `(n,)`.
        queries: rows of `features`.
        num_neighbors: columns of the result; fewer if there are not as many lesions.
    """
    unit, results = normalize(features), []
    for rows in np.array_split(np.asarray(queries, dtype=np.int64), -(-len(queries) // 256)):
        cosine = (unit[rows] @ unit.T).astype(np.float64)
        cosine[patients[rows][:, None] == patients] = -np.inf
        results.append(_nearest(cosine, num_neighbors))
    rows, cosines = map(np.concatenate, zip(*results, strict=True))
    return Neighbors(np.where(np.isfinite(cosines), rows, -1), cosines)


def _nearest(cosine: Array, num: int) -> tuple[Array, Array]:
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :num]
    return order, np.take_along_axis(cosine, order, axis=1)


def knn_scores(features: Array, classes: Array, patients: Array, num_neighbors: int = 20) -> Array:
    """Quick probe: the vote of each lesion's nearest neighbours among lesions of other patients.

    Quick enough to run during training, and only for comparing a run with itself over time, as `linear_scores`.

    Args:
        features: `(n, dim)`.
        classes: 0 to C - 1, `(n,)`.
        patients: of every lesion, `(n,)`.
        num_neighbors: that vote; fewer where there are not as many.

    Returns:
        `(n, C)`: shares of the vote, weighted by `exp(cosine / 0.07)`.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, sec. 3.4.
    """
    rows, cosines = nearest_lesions(features, patients, range(len(features)), num_neighbors)
    weights = np.exp((cosines - cosines[:, :1]) / _KNN_TEMPERATURE)
    votes = np.einsum("nk,nkc->nc", weights, np.eye(classes.max() + 1)[classes[rows]])
    return np.asarray(votes / votes.sum(axis=1, keepdims=True))


def linear_scores(features: Array, classes: Array, patients: Array, num_folds: int = 5, seed: int = 0) -> Array:
    """Quick probe: scores by a ridge classifier fitted on the other folds; folds are grouped by patient.

    Its penalty is chosen by the leave-one-out error on the training folds.

    Args:
        features: `(n, dim)`.
        classes: 0 to C - 1, `(n,)`, each of at least two patients.
        patients: of every lesion, `(n,)`.
        num_folds: at most; fewer if a class has fewer patients.
        seed: 0 or more; the folds follow from it.

    Returns:
        `(n, C)`, higher for a likelier class.
    """
    scores = np.zeros((len(features), classes.max() + 1))
    for fit, check in grouped_folds("multiclass", classes, patients, num_folds, seed):
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(_grid(-1, 5, 7))).fit(features[fit], classes[fit])
        decision = model.decision_function(features[check])
        scores[check] = decision if decision.ndim == 2 else np.column_stack([-decision, decision])
    return scores
