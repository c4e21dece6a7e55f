"""Intervals by bootstrap over patients: whole patients are drawn with replacement, all resamples at once.

A row that is drawn k times has weight k, so a resample is a row of weights and a metric is a function of weights
(`metrics`). Two tables of features that meet the same weights are compared on the same patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As it stands in a table: `0.81 (0.74 to 0.88)`."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def patient_weights(patients: npt.ArrayLike, num_bootstrap: int, seed: int) -> Array:
    """How often each row is in each resample, `(num_bootstrap, n)`; as many patients are drawn as there are.

    Args:
        patients: the patient of every row, `(n,)`.
        num_bootstrap: resamples.
        seed: the draws follow from it and from the patients' sorted names, not from the order of the rows.
    """
    names, member_of = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(names), size=(num_bootstrap, len(names)))
    drawn += len(names) * np.arange(num_bootstrap)[:, None]
    times = np.bincount(drawn.ravel(), minlength=num_bootstrap * len(names)).reshape(num_bootstrap, -1)
    return times[:, member_of].astype(np.float64)


def interval(value: float, resampled: Array) -> Estimate:
    """A value with the percentile interval of its resamples; those that have no value (NaN) are left out.

    Raises:
        ValueError: no resample has a value.
    """
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled):
        raise ValueError("no bootstrap resample holds both classes: there are too few patients for an interval")
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
