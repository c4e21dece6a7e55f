"""Weighted metrics against scikit-learn, SciPy and scikit-survival on the expanded rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    mean_absolute_error,
    roc_auc_score,
)

from fmcib_ssl.evaluation import metrics

PRECISION, SPEARMAN = metrics.METRICS["binary"]["average precision"], metrics.METRICS["ordinal"]["Spearman"]
RNG = np.random.default_rng(0)
NUM = 150
WEIGHTS = RNG.integers(0, 4, (4, NUM)).astype(float)
EXPANDED = [np.repeat(np.arange(NUM), w.astype(int)) for w in WEIGHTS]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x)
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("digits", [1, 12], ids=["ties", "no ties"])
def test_of_two_classes(digits: int) -> None:
    y = RNG.integers(0, 2, NUM)
    scores = np.round(1 / (1 + np.exp(-RNG.normal(y))), digits)
    for k, rows in enumerate(EXPANDED):
        assert metrics.auc(y, scores, WEIGHTS)[k] == pytest.approx(roc_auc_score(y[rows], scores[rows]))
        precision = average_precision_score(y[rows], scores[rows])
        assert PRECISION(y, scores, WEIGHTS)[k] == pytest.approx(precision)
        accuracy = balanced_accuracy_score(y[rows], scores[rows] > 0.5)
        assert metrics.balanced_accuracy(y, scores > 0.5, WEIGHTS)[k] == pytest.approx(accuracy)


def test_of_several_classes() -> None:
    y = RNG.integers(0, 4, NUM)
    scores = softmax(RNG.normal(size=(NUM, 4)) + np.eye(4)[y])
    one_hot = np.eye(4)[y]
    for k, rows in enumerate(EXPANDED):
        expected = roc_auc_score(y[rows], scores[rows], multi_class="ovr", average="macro")
        assert metrics.auc(y, scores, WEIGHTS)[k] == pytest.approx(expected)
        expected = average_precision_score(one_hot[rows], scores[rows], average="macro")
        assert PRECISION(y, scores, WEIGHTS)[k] == pytest.approx(expected)
        expected = balanced_accuracy_score(y[rows], scores[rows].argmax(1))
        assert metrics.balanced_accuracy(y, scores.argmax(1), WEIGHTS)[k] == pytest.approx(expected)


def test_the_chosen_class_is_the_one_that_true_probabilities_make_best() -> None:
    """Two normal classes, one of them rare: with the true posterior nothing has a better balanced accuracy."""
    rng = np.random.default_rng(1)
    y = (rng.random(20_000) < 0.05).astype(int)
    x = rng.normal(y)
    probability = 0.05 * np.exp(x - 0.5) / (0.05 * np.exp(x - 0.5) + 0.95)
    chosen = metrics.most_raised(probability, np.array([0.95, 0.05]))
    np.testing.assert_array_equal(chosen, x > 0.5)  # halfway between the classes
    best = max(balanced_accuracy_score(y, x > cut) for cut in np.linspace(-1, 2, 61))
    assert balanced_accuracy_score(y, chosen) == pytest.approx(best, abs=0.01)
    assert metrics.most_raised(np.array([[0.5, 0.3, 0.2]]), np.array([0.9, 0.1, 0.0])).tolist() == [1]


def test_of_grades_and_values() -> None:
    y = np.rint(RNG.normal(3, 1.2, NUM)).clip(1, 5)
    scores = y + RNG.normal(size=NUM)
    grades = np.rint(scores).clip(1, 5).astype(int)
    found = {name: metric(y, scores, WEIGHTS) for name, metric in metrics.METRICS["ordinal"].items()}
    for k, rows in enumerate(EXPANDED):
        kappa = cohen_kappa_score(y[rows].astype(int), grades[rows], weights="quadratic")
        expected = {"Spearman": spearmanr(y[rows], scores[rows])[0], "quadratic kappa": kappa}
        expected["MAE"] = mean_absolute_error(y[rows], scores[rows])
        assert {name: values[k] for name, values in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("digits", [0, 12], ids=["ties", "no ties"])
def test_of_times(digits: int) -> None:
    oracle = pytest.importorskip("sksurv.metrics").concordance_index_censored
    time = np.round(RNG.exponential(8, NUM), digits)
    event = RNG.random(NUM) < 0.6
    risk = np.round(RNG.normal(-time / 10), max(digits, 1))
    labels = np.column_stack([time, event])
    for k, rows in enumerate(EXPANDED):
        expected = oracle(event[rows], time[rows], risk[rows], tied_tol=0)[0]
        assert metrics.concordance(labels, risk, WEIGHTS)[k] == pytest.approx(expected)


def test_without_one_of_the_classes_there_is_no_value() -> None:
    y, scores = np.array([0, 0, 1]), np.array([0.1, 0.6, 0.7])
    weights = np.array([[1.0, 1, 0], [0, 0, 2], [1, 1, 1]])
    for metric in (metrics.auc, PRECISION):
        assert np.isnan(metric(y, scores, weights)).tolist() == [True, True, False]
    assert np.isnan(SPEARMAN(np.ones(3), scores, weights)).all()
