"""Calibration against scikit-learn and statsmodels' formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from fmcib_ssl.evaluation.metrics import calibration


def drawn(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=n)
    return (rng.uniform(size=n) < p**2).astype(int), p


@pytest.mark.parametrize("num_bins", [4, 10])
def test_bins_are_those_of_scikit_learn(num_bins: int) -> None:
    labels, p = drawn()
    found = calibration(labels, p, num_bins)
    observed, predicted = calibration_curve(labels, p, n_bins=num_bins, strategy="quantile")
    np.testing.assert_allclose(found.observed, observed)
    np.testing.assert_allclose(found.predicted, predicted)
    assert found.brier == pytest.approx(brier_score_loss(labels, p))
    assert found.counts.sum() == len(p)


def test_equal_probabilities_share_a_bin() -> None:
    labels, p = drawn()
    p = np.where(p < 0.7, 0.2, 0.9)
    found = calibration(labels, p)
    observed, predicted = calibration_curve(labels, p, n_bins=10, strategy="quantile")
    np.testing.assert_allclose(found.observed, observed)
    np.testing.assert_allclose(found.predicted, predicted)


def test_the_error_is_the_mean_distance_over_rows() -> None:
    labels, p = drawn()
    found = calibration(labels, p, 5)
    parts = zip(found.counts, found.observed, found.predicted, strict=True)
    assert found.error == pytest.approx(sum(n * abs(o - q) for n, o, q in parts) / len(p))
    rng = np.random.default_rng(1)
    fair = rng.uniform(size=20000)
    assert calibration(rng.uniform(size=20000) < fair, fair).error < 0.02 < found.error


def test_intervals_are_wilsons() -> None:
    labels, p = drawn(200)
    found = calibration(labels, p, 4)
    for n, share, low, high in zip(found.counts, found.observed, found.low, found.high, strict=True):
        for end in (low, high):  # the ends solve |share - end| = z sqrt(end (1 - end) / n)
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n))


def test_few_rows_and_probabilities_that_say_nothing_have_one_bin() -> None:
    assert len(calibration([0, 1, 1], [0.1, 0.5, 0.9]).counts) == 1
    labels, p = drawn()
    assert len(calibration(labels, 0.5 + 0.01 * p).counts) == 1
