"""How well scores fit labels, with intervals by bootstrap over patients.

A metric is a function of the rows' weights, for many weightings at once. With weights of 1 it is the textbook metric;
with how often a bootstrap drew each row, that of the resample. So the value and its interval come from one
implementation, and two tables of features that meet the same weights are compared on the same patients. A weighting for
which a metric has no meaning, such as an AUC without one of the classes, gives NaN.

`labels` are `(n,)` class numbers or values, for survival `(n, 2)`: time, and 1 where the event was seen. `scores` are
`(n,)` or, for several classes, `(n, classes)`; balanced accuracy takes chosen classes. `weights` are `(resamples, n)`,
and what is returned `(resamples,)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import CensoredData, binomtest, ecdf, logrank
from sklearn.calibration import calibration_curve

from fmcib_ssl.types import Array

Metric = Callable[[Array, Array, Array], Array]
Kind = Literal["binary", "multiclass", "ordinal", "continuous", "share", "survival"]

#: Probabilities that differ by no more say nothing in bins.
_MIN_RANGE = 0.05


def auc(labels: Array, scores: Array, weights: Array) -> Array:
    """Area under the ROC curve, ties counting half; for several classes the mean over one against the rest."""
    if scores.ndim == 2:
        return _over_classes(auc, labels, scores, weights)
    ones, zeros = _by_level(labels, scores, weights)
    return _ratio((ones * (np.cumsum(zeros, 1) - zeros / 2)).sum(1), ones.sum(1) * zeros.sum(1))


def _average_precision(labels: Array, scores: Array, weights: Array) -> Array:
    """Precision averaged over the steps of recall, as scikit-learn does; for several classes the mean over them."""
    if scores.ndim == 2:
        return _over_classes(_average_precision, labels, scores, weights)
    ones, zeros = (side[:, ::-1] for side in _by_level(labels, scores, weights))
    hits = np.cumsum(ones, 1)
    total = hits + np.cumsum(zeros, 1)
    precision = np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)
    return np.where(zeros.sum(1) > 0, _ratio((ones * precision).sum(1), ones.sum(1)), np.nan)


def balanced_accuracy(labels: Array, chosen: Array, weights: Array) -> Array:
    """Mean share of each class that is recognised; `chosen` are class numbers, `(n,)`."""
    classes = [labels == number for number in np.unique(labels)]
    return mean_of_known([_ratio(weights @ (own & (chosen == labels)), weights @ own) for own in classes])


def by_class_of(scores: Array) -> Array:
    """Probabilities of all classes, `(n, classes)`; of two classes those of class 1, `(n,)`, are enough."""
    return scores if scores.ndim == 2 else np.stack([1 - scores, scores], axis=1)


def most_raised(scores: Array, shares: Array) -> Array:
    """The class whose probability lies highest above its share of the training labels, `(n,)`.

    With classes of unequal size the most probable one is nearly always the largest, above all under a strong penalty;
    this is the rule that is best for the balanced accuracy of true probabilities.

    Args:
        scores: probabilities, `(n, classes)`, or of class 1, `(n,)`.
        shares: of the classes among the training labels, `(classes,)`; of 0 is never chosen.
    """
    by_class = by_class_of(scores)
    raised = np.divide(by_class, shares, out=np.zeros_like(by_class), where=shares > 0)
    return np.asarray(raised.argmax(axis=1))


def _mean_absolute_error(labels: Array, scores: Array, weights: Array) -> Array:
    """Mean distance of the score from the label, in the label's unit."""
    return _ratio(weights @ np.abs(scores - labels), weights.sum(1))


def _spearman(labels: Array, scores: Array, weights: Array) -> Array:
    """Rank correlation, ties sharing the middle rank."""
    return _pearson(_ranks(labels, weights), _ranks(scores, weights), weights)


def _pearson(labels: Array, scores: Array, weights: Array) -> Array:
    """Linear correlation."""
    total = weights.sum(1, keepdims=True)
    x, y = (values - _ratio((weights * values).sum(1, keepdims=True), total) for values in (labels, scores))
    return _ratio((weights * x * y).sum(1), np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1)))


def _quadratic_kappa(labels: Array, scores: Array, weights: Array) -> Array:
    """Agreement of grades beyond chance, disagreement weighed by its square; scores are rounded to whole grades.

    With marginals p and q the expected disagreement `sum_ij p_i q_j (i - j)^2` is `E[a^2] + E[b^2] - 2 E[a] E[b]`.
    """
    grades = np.rint(scores).clip(labels.min(), labels.max())
    total = weights.sum(1)
    observed = weights @ (labels - grades) ** 2 / total
    expected = weights @ labels**2 + weights @ grades**2 - 2 * (weights @ labels) * (weights @ grades) / total
    return 1 - _ratio(observed * total, expected)


def concordance(labels: Array, scores: Array, weights: Array) -> Array:
    """Harrell's C-index: how often, of two lesions whose order is known, the one with the earlier event scored higher.

    The order is known if the earlier of two times is an event, or if at one time one is an event and the other is not.
    Equal scores count half.
    """
    time, event = labels[:, 0], labels[:, 1].astype(bool)
    before = event[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~event))
    right = before * ((scores[:, None] > scores) + 0.5 * (scores[:, None] == scores))
    return _ratio(((weights @ right) * weights).sum(1), ((weights @ before.astype(np.float64)) * weights).sum(1))


#: What is reported for a kind of label, the first being what a probe's setting is judged by where it can be.
METRICS: dict[Kind, dict[str, Metric]] = {
    "binary": {"AUC": auc, "average precision": _average_precision, "balanced accuracy": balanced_accuracy},
    "multiclass": {"AUC": auc, "average precision": _average_precision, "balanced accuracy": balanced_accuracy},
    "ordinal": {"Spearman": _spearman, "quadratic kappa": _quadratic_kappa, "MAE": _mean_absolute_error},
    "continuous": {"Spearman": _spearman, "Pearson": _pearson, "MAE": _mean_absolute_error},
    "share": {"Spearman": _spearman, "Pearson": _pearson, "MAE": _mean_absolute_error},
    "survival": {"C-index": concordance},
}
#: Of these, smaller is better.
ERRORS = frozenset({"MAE"})


def value_of(metric: Metric, labels: Array, scores: Array) -> float:
    """The textbook metric, each row counted once."""
    return float(metric(labels, scores, np.ones((1, len(labels))))[0])


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Each number in this format."""
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"

    def __str__(self) -> str:
        """As it stands in a table: `0.81 (0.74 to 0.88)`."""
        return format(self, ".2f")


def patient_weights(patients: npt.ArrayLike, num_bootstrap: int, seed: int) -> Array:
    """Weights of the rows, `(1 + num_bootstrap, n)`: first ones, for the value; then how often a resample has each row.

    Args:
        patients: the patient of every row, `(n,)`; as many are drawn as there are.
        num_bootstrap: resamples.
        seed: the draws follow from it and from the patients' sorted names, not from the order of the rows.
    """
    names, member_of = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(names), size=(num_bootstrap, len(names)))
    drawn += len(names) * np.arange(num_bootstrap)[:, None]
    times = np.bincount(drawn.ravel(), minlength=num_bootstrap * len(names)).reshape(num_bootstrap, -1)
    return np.concatenate([np.ones((1, len(member_of))), times[:, member_of]])


def interval(drawn: Array) -> Estimate:
    """A value, the first, with the percentile interval of its resamples; those without a value (NaN) are left out.

    Raises:
        ValueError: no resample has a value.
    """
    resamples = drawn[1:][~np.isnan(drawn[1:])]
    if not len(resamples):
        raise ValueError("no bootstrap resample holds both classes: there are too few patients for an interval")
    low, high = np.percentile(resamples, [2.5, 97.5])
    return Estimate(float(drawn[0]), float(low), float(high))


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed, in bins of about equal size.

    Attributes:
        predicted: mean probability in each bin, `(bins,)`, ascending.
        observed: share of class 1 in each bin.
        low: lower end of the share's 95 % interval (Wilson).
        high: upper end.
        counts: rows in each bin.
        error: expected calibration error: the mean distance of observed from predicted over all rows.
        brier: mean squared distance of probability and label.
    """

    predicted: Array
    observed: Array
    low: Array
    high: Array
    counts: Array
    error: float
    brier: float


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike, num_bins: int = 10) -> Calibration:
    """Compare probabilities with how often class 1 occurs; equal probabilities share a bin.

    Args:
        labels: 0 or 1, `(n,)`.
        probabilities: that the label is 1, `(n,)`.
        num_bins: fewer if there are not twenty rows for each; one if all probabilities are about the same.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    num_bins = max(1, min(num_bins, len(y) // 20)) if np.ptp(p) > _MIN_RANGE else 1
    observed, predicted = calibration_curve(y, p, n_bins=num_bins, strategy="quantile")
    edges = np.quantile(p, np.linspace(0, 1, num_bins + 1))  # as calibration_curve has them, which gives no counts
    counts = np.unique(np.searchsorted(edges[1:-1], p), return_counts=True)[1]
    wilson = [binomtest(round(s * n), n).proportion_ci(method="wilson") for s, n in zip(observed, counts, strict=True)]
    low, high = np.array(wilson).T
    error = float((counts * np.abs(observed - predicted)).sum() / len(y))
    return Calibration(predicted, observed, low, high, counts, error, float(((p - y) ** 2).mean()))


def risk_halves(labels: Array, is_high: Array) -> dict[str, Any]:
    """Kaplan-Meier curves of those at high and at low risk, and the log-rank test between them; plain values.

    The test takes rows for independent: give one row a patient.

    Args:
        labels: `(n, 2)`: time, and 1 where the event was seen.
        is_high: `(n,)`, which rows are of the half at high risk.

    Returns:
        `log_rank_p`, None where a half is empty; and `halves`, each with `name`, `num`, `num_events`, `times` and
        `survival`, which holds from its time on; the curve begins at 0 with 1.
    """
    halves, samples = [], []
    for name, rows in (("low risk", labels[~is_high]), ("high risk", labels[is_high])):
        event = rows[:, 1].astype(bool)
        curve = {"name": name, "num": len(rows), "num_events": int(event.sum()), "times": [0.0], "survival": [1.0]}
        if len(rows):
            samples.append(CensoredData(uncensored=rows[event, 0], right=rows[~event, 0]))
            function = ecdf(samples[-1]).sf
            curve["times"] += function.quantiles.tolist()
            curve["survival"] += function.probabilities.tolist()
        halves.append(curve)
    p = float(logrank(*samples).pvalue) if len(samples) == 2 else np.nan
    return {"log_rank_p": p if np.isfinite(p) else None, "halves": halves}


def _ratio(numerator: Array, denominator: Array) -> Array:
    """NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _by_level(labels: Array, scores: Array, weights: Array) -> tuple[Array, Array]:
    """Weight of class 1 and of class 0 at each distinct score, ascending."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    y, w = labels[order], weights[:, order]
    return np.add.reduceat(w * y, starts, axis=1), np.add.reduceat(w * (1 - y), starts, axis=1)


def _ranks(values: Array, weights: Array) -> Array:
    """The middle rank of each row among the weighted rows, up to a constant."""
    levels, level_of = np.unique(values, return_inverse=True)
    order = np.argsort(level_of, kind="stable")
    starts = np.searchsorted(level_of[order], np.arange(len(levels)))
    at_level = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Array = (np.cumsum(at_level, 1) - at_level / 2)[:, level_of]
    return ranks


def _over_classes(metric: Metric, labels: Array, scores: Array, weights: Array) -> Array:
    columns = range(scores.shape[1])
    return mean_of_known([metric((labels == k).astype(np.float64), scores[:, k], weights) for k in columns])


def mean_of_known(values: Sequence[Array]) -> Array:
    """Mean over those that have a value; NaN where none has."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(0), known.sum(0))
