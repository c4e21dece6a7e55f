"""Resamples against a loop; intervals against simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fmcib_ssl.evaluation import metrics
from fmcib_ssl.evaluation.metrics import Estimate, interval, patient_weights
from fmcib_ssl.evaluation.probes import SplitScores, estimate, resampled

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
    held, tried = {"patients": 0, "rows": 0}, {"patients": 200, "rows": 80}
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
                told = estimate(metrics.auc, y, parts, patient_weights(groups, 200, trial))
                held[name] += told.low <= BINORMAL_AUC <= told.high
    assert 0.90 <= held["patients"] / tried["patients"] <= 0.985
    assert held["rows"] / tried["rows"] < 0.87


def test_the_interval_of_a_c_index_holds_the_truth() -> None:
    """Exponential times with hazard exp(x): of two lesions the riskier dies first with 1 / (1 + exp(-|difference|))."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400_000, 2))
    gap = np.abs(x[:, 0] - x[:, 1])
    truth = float(np.mean(1 / (1 + np.exp(-gap))))
    held = 0
    for trial in range(200):
        risk = rng.normal(size=80)
        labels = np.column_stack([rng.exponential(np.exp(-risk)), np.ones(80)])
        told = interval(metrics.concordance(labels, risk, patient_weights(range(80), 200, trial)))
        held += told.low <= truth <= told.high
    assert 0.89 <= held / 200 <= 0.985


def test_lesions_of_two_parts_are_not_compared() -> None:
    y = np.array([0, 1, 0, 1])
    parts = [SplitScores("0", np.array([0, 1]), np.array([0.1, 0.2]), 1.0, 2)]
    parts += [SplitScores("1", np.array([2, 3]), np.array([5.0, 6.0]), 1.0, 2)]
    assert resampled(metrics.auc, y, parts, np.ones((1, 4)))[0] == 1.0  # all pooled it would be 0.75


def test_what_has_no_value_is_said() -> None:
    assert interval(np.array([0.5, np.nan, 0.4, 0.6])) == Estimate(0.5, pytest.approx(0.405), pytest.approx(0.595))
    with pytest.raises(ValueError, match="no bootstrap resample"):
        interval(np.array([0.5, np.nan]))
