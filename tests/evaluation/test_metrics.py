"""Metrics against scikit-learn, SciPy and scikit-survival on the expanded rows, intervals against known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    mean_absolute_error,
    roc_auc_score,
)

from fmcib_ssl.evaluation import metrics
from fmcib_ssl.evaluation.metrics import Estimate, calibration, interval, patient_weights, risk_halves
from fmcib_ssl.evaluation.probes import SplitScores, estimate, resampled

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


#: Phi(1 / sqrt 2): the AUC of two normal scores one standard deviation apart.
BINORMAL_AUC = 0.7602499389


def test_every_resample_has_scikit_learns_auc() -> None:
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 50)
    scores = np.round(rng.normal(y, 1.0), 1)
    patients = rng.integers(0, 20, 50)
    aucs = metrics.auc(y, scores, patient_weights(patients, 50, seed=4))
    assert aucs[0] == pytest.approx(roc_auc_score(y, scores), abs=1e-12)
    names, draws = np.unique(patients), np.random.default_rng(4)
    for value in aucs[1:]:
        drawn = draws.integers(len(names), size=len(names))
        rows = np.concatenate([np.flatnonzero(patients == names[k]) for k in drawn])
        assert value == pytest.approx(roc_auc_score(y[rows], scores[rows]), abs=1e-12)


def test_the_draws_do_not_depend_on_the_order_of_the_rows() -> None:
    patients = np.array(["a", "b", "b", "c", "d"])
    order = np.array([4, 2, 0, 1, 3])
    weights = patient_weights(patients, 30, seed=1)
    np.testing.assert_array_equal(patient_weights(patients[order], 30, seed=1), weights[:, order])
    assert (weights[:, 1] == weights[:, 2]).all()


@pytest.mark.parametrize("num_parts", [1, 5])
def test_intervals_over_patients_hold_the_truth_and_intervals_over_rows_do_not(num_parts: int) -> None:
    """Three lesions a patient whose scores share three quarters of their variance, 200 times."""
    rng = np.random.default_rng(0)
    covered, tried = {"patients": 0, "rows": 0}, {"patients": 200, "rows": 80}
    num_patients, per_patient = 80, 3
    for trial in range(200):
        y = np.repeat(np.arange(num_patients) % 2, per_patient)
        shared = np.repeat(rng.normal(scale=np.sqrt(0.75), size=num_patients), per_patient)
        scores = y + shared + rng.normal(scale=0.5, size=len(y))
        patients = np.repeat(np.arange(num_patients), per_patient)
        fold = patients // 2 % num_parts
        parts = [SplitScores(str(k), np.flatnonzero(fold == k), scores[fold == k], 1.0, 0) for k in range(num_parts)]
        for name, groups in (("patients", patients), ("rows", np.arange(len(y)))):
            if trial < tried[name]:
                estimated = estimate(metrics.auc, y, parts, patient_weights(groups, 200, trial))
                covered[name] += estimated.low <= BINORMAL_AUC <= estimated.high
    assert 0.90 <= covered["patients"] / tried["patients"] <= 0.985
    assert covered["rows"] / tried["rows"] < 0.87


def test_lesions_of_two_parts_are_not_compared() -> None:
    y = np.array([0, 1, 0, 1])
    parts = [SplitScores("0", np.array([0, 1]), np.array([0.1, 0.2]), 1.0, 2)]
    parts += [SplitScores("1", np.array([2, 3]), np.array([5.0, 6.0]), 1.0, 2)]
    assert resampled(metrics.auc, y, parts, np.ones((1, 4)))[0] == 1.0  # all pooled it would be 0.75


def test_what_has_no_value_is_said() -> None:
    assert interval(np.array([0.5, np.nan, 0.4, 0.6])) == Estimate(0.5, pytest.approx(0.405), pytest.approx(0.595))
    with pytest.raises(ValueError, match="no bootstrap resample"):
        interval(np.array([0.5, np.nan]))


def outcomes(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=n)
    return (rng.uniform(size=n) < p**2).astype(int), p


@pytest.mark.parametrize(("num_bins", "are_tied"), [(4, False), (10, False), (10, True)])
def test_bins_are_those_of_scikit_learn(num_bins: int, are_tied: bool) -> None:
    labels, p = outcomes()
    p = np.where(p < 0.7, 0.2, 0.9) if are_tied else p  # equal probabilities share a bin
    result = calibration(labels, p, num_bins)
    observed, predicted = calibration_curve(labels, p, n_bins=num_bins, strategy="quantile")
    np.testing.assert_allclose(result.observed, observed)
    np.testing.assert_allclose(result.predicted, predicted)
    assert result.brier == pytest.approx(brier_score_loss(labels, p))
    assert result.counts.sum() == len(p)


def test_the_error_is_the_mean_distance_over_rows() -> None:
    labels, p = outcomes()
    result = calibration(labels, p, 5)
    parts = zip(result.counts, result.observed, result.predicted, strict=True)
    assert result.error == pytest.approx(sum(n * abs(o - q) for n, o, q in parts) / len(p))
    rng = np.random.default_rng(1)
    fair = rng.uniform(size=20000)
    assert calibration(rng.uniform(size=20000) < fair, fair).error < 0.02 < result.error


def test_intervals_are_wilsons() -> None:
    labels, p = outcomes(200)
    result = calibration(labels, p, 4)
    for n, share, low, high in zip(result.counts, result.observed, result.low, result.high, strict=True):
        for end in (low, high):  # the ends solve |share - end| = z sqrt(end (1 - end) / n)
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n))


def test_few_rows_and_probabilities_that_say_nothing_have_one_bin() -> None:
    assert len(calibration([0, 1, 1], [0.1, 0.5, 0.9]).counts) == 1
    labels, p = outcomes()
    assert len(calibration(labels, 0.5 + 0.01 * p).counts) == 1


def test_halves_have_the_curves_and_the_test_of_scikit_survival() -> None:
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    compare = pytest.importorskip("sksurv.compare")
    rng = np.random.default_rng(0)
    labels = np.column_stack([np.ceil(8 * rng.exponential(size=150)), rng.random(150) < 0.6])
    is_high = rng.normal(labels[:, 0].mean() - labels[:, 0]) > 0
    result = risk_halves(labels, is_high)
    for curve, rows in zip(result["halves"], (labels[~is_high], labels[is_high]), strict=True):
        times, survival = nonparametric.kaplan_meier_estimator(rows[:, 1].astype(bool), rows[:, 0])
        np.testing.assert_allclose(np.interp(times, curve["times"], curve["survival"]), survival, atol=1e-12)
        assert (curve["times"][0], curve["survival"][0]) == (0.0, 1.0)
    pairs = list(zip(labels[:, 1].astype(bool), labels[:, 0], strict=True))
    y = np.array(pairs, dtype=[("event", bool), ("time", float)])
    assert result["log_rank_p"] == pytest.approx(compare.compare_survival(y, is_high)[1], rel=1e-6)
    assert risk_halves(labels, np.zeros(len(labels), dtype=bool))["log_rank_p"] is None
