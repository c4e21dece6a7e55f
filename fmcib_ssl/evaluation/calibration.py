"""Whether probabilities can be taken at their word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Probabilities that differ by no more say nothing in bins.
MIN_RANGE = 0.05


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
    """Compare probabilities with how often class 1 occurs.

    Bins are bounded by quantiles of the probabilities, as `sklearn.calibration.calibration_curve` with
    `strategy="quantile"` has them; equal probabilities share a bin.

    Args:
        labels: 0 or 1, `(n,)`.
        probabilities: of class 1, `(n,)`.
        num_bins: fewer if there are not twenty rows for each; one if all probabilities are about the same.

    Raises:
        ValueError: a probability outside 0 to 1, or labels other than 0 and 1.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if p.min() < 0 or p.max() > 1 or not np.isin(y, (0, 1)).all():
        raise ValueError(
            f"calibration takes labels of 0 and 1 and probabilities in 0 to 1, got labels {np.unique(y)[:3]} and "
            f"scores from {p.min():.3g} to {p.max():.3g}"
        )
    num_bins = max(1, min(num_bins, len(y) // 20)) if np.ptp(p) > MIN_RANGE else 1
    edges = np.quantile(p, np.linspace(0, 1, num_bins + 1))
    bins = np.searchsorted(edges[1:-1], p)
    counts = np.bincount(bins, minlength=num_bins)
    there = counts > 0
    n = counts[there]
    observed, predicted = (np.bincount(bins, v, num_bins)[there] / n for v in (y, p))
    z2 = 1.959964**2
    middle = (observed + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (observed * (1 - observed) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    error = float((n * np.abs(observed - predicted)).sum() / len(y))
    return Calibration(predicted, observed, middle - half, middle + half, n, error, float(((p - y) ** 2).mean()))
