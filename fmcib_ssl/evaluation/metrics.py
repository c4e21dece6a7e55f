"""How well scores fit labels, as functions of the rows' weights, for many weightings at once.

With weights of 1 they are the textbook metrics; with how often a bootstrap drew each row, those of the resample. So the
value and its interval come from one implementation. A weighting for which a metric has no meaning, such as an AUC
without one of the classes, gives NaN.

`labels` are `(n,)` class numbers or values, for survival `(n, 2)`: time, and 1 where the event was seen. `scores` are
`(n,)` or, for several classes, `(n, classes)`; balanced accuracy takes chosen classes. `weights` are `(resamples, n)`,
and what is returned `(resamples,)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Metric = Callable[[Array, Array, Array], Array]
Kind = Literal["binary", "multiclass", "ordinal", "continuous", "survival"]


def auc(labels: Array, scores: Array, weights: Array) -> Array:
    """Area under the ROC curve, ties counting half; for several classes the mean over one against the rest."""
    if scores.ndim == 2:
        return _over_classes(auc, labels, scores, weights)
    ones, zeros = _by_level(labels, scores, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Array = (ones * (np.cumsum(zeros, 1) - zeros / 2)).sum(1) / (ones.sum(1) * zeros.sum(1))
    return area


def average_precision(labels: Array, scores: Array, weights: Array) -> Array:
    """Precision averaged over the steps of recall, as scikit-learn does; for several classes the mean over them."""
    if scores.ndim == 2:
        return _over_classes(average_precision, labels, scores, weights)
    ones, zeros = (part[:, ::-1] for part in _by_level(labels, scores, weights))
    found, false = np.cumsum(ones, 1), np.cumsum(zeros, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(found + false > 0, found / (found + false), 0.0)
        mean: Array = (ones * precision).sum(1) / ones.sum(1)
    return np.where(zeros.sum(1) > 0, mean, np.nan)


def balanced_accuracy(labels: Array, chosen: Array, weights: Array) -> Array:
    """Mean share of each class that is recognised; `chosen` are class numbers, `(n,)`."""
    recalls = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for number in np.unique(labels):
            of_class = labels == number
            recalls.append((weights @ (of_class & (chosen == number))) / (weights @ of_class))
    return _mean(np.stack(recalls))


def most_raised(scores: Array, shares: Array) -> Array:
    """The class whose probability lies highest above its share of the training labels, `(n,)`.

    With classes of unequal size the most probable one is nearly always the largest, above all under a strong penalty;
    this is the rule that is best for the balanced accuracy of true probabilities.

    Args:
        scores: probabilities, `(n, classes)`, or of class 1, `(n,)`.
        shares: of the classes among the training labels, `(classes,)`; of 0 is never chosen.
    """
    both = scores if scores.ndim == 2 else np.stack([1 - scores, scores], axis=1)
    raised = np.divide(both, shares, out=np.zeros_like(both), where=shares > 0)
    chosen: Array = raised.argmax(axis=1)
    return chosen


def mean_absolute_error(labels: Array, scores: Array, weights: Array) -> Array:
    """Mean distance of the score from the label, in the label's unit."""
    error: Array = weights @ np.abs(scores - labels) / weights.sum(1)
    return error


def spearman(labels: Array, scores: Array, weights: Array) -> Array:
    """Rank correlation, ties sharing the middle rank."""
    x, y = _ranks(labels, weights), _ranks(scores, weights)
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (ranks - (weights * ranks).sum(1, keepdims=True) / total for ranks in (x, y))
        spread = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
        correlation: Array = (weights * x * y).sum(1) / spread
    return np.where(spread > 0, correlation, np.nan)


def quadratic_kappa(labels: Array, scores: Array, weights: Array) -> Array:
    """Agreement of grades beyond chance, disagreement weighed by its square; scores are rounded to whole grades.

    With marginals p and q the expected disagreement `sum_ij p_i q_j (i - j)^2` is `E[a^2] + E[b^2] - 2 E[a] E[b]`.
    """
    given = np.rint(scores).clip(labels.min(), labels.max())
    total = weights.sum(1)
    observed = weights @ (labels - given) ** 2 / total
    expected = weights @ labels**2 + weights @ given**2 - 2 * (weights @ labels) * (weights @ given) / total
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa: Array = 1 - observed * total / expected
    return np.where(expected > 0, kappa, np.nan)


def concordance(labels: Array, scores: Array, weights: Array) -> Array:
    """Harrell's C-index: how often, of two lesions whose order is known, the one with the earlier event scored higher.

    The order is known if the earlier of two times is an event, or if at one time one is an event and the other is not.
    Equal scores count half.
    """
    time, event = labels[:, 0], labels[:, 1].astype(bool)
    before = event[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~event))
    right = before * ((scores[:, None] > scores) + 0.5 * (scores[:, None] == scores))
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Array = ((weights @ right) * weights).sum(1) / ((weights @ before.astype(np.float64)) * weights).sum(1)
    return share


#: What is reported for a kind of label, the first being what a probe's setting is judged by where it can be.
METRICS: dict[Kind, dict[str, Metric]] = {
    "binary": {"AUC": auc, "average precision": average_precision, "balanced accuracy": balanced_accuracy},
    "multiclass": {"AUC": auc, "average precision": average_precision, "balanced accuracy": balanced_accuracy},
    "ordinal": {"Spearman": spearman, "quadratic kappa": quadratic_kappa, "MAE": mean_absolute_error},
    "continuous": {"Spearman": spearman, "MAE": mean_absolute_error},
    "survival": {"C-index": concordance},
}
#: Of these, smaller is better.
ERRORS = frozenset({"MAE"})


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
    return _mean(np.stack([metric((labels == k).astype(np.float64), scores[:, k], weights) for k in columns]))


def _mean(values: Array) -> Array:
    """Mean over the first axis of what has a value; NaN where nothing has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, where nothing has a value
        mean: Array = np.nanmean(values, axis=0)
    return mean
