"""The Cox model against scikit-survival and lifelines, curves and log-rank against both."""

from __future__ import annotations

import numpy as np
import pytest

from fmcib_ssl.evaluation.metrics import risk_halves
from fmcib_ssl.evaluation.probes import PROBES


def cohort(num: int = 150, dim: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, dim))
    x = (x - x.mean(0)) / x.std(0)
    time, censored = rng.exponential(np.exp(-0.7 * x[:, 0])), rng.exponential(1.5, num)
    return x, np.column_stack([np.minimum(time, censored), time < censored])


def coefficients(x: np.ndarray, labels: np.ndarray, penalties: list[float]) -> np.ndarray:
    """Log-hazards of the axes."""
    return np.stack(list(PROBES["cox"].path(x, labels, np.eye(x.shape[1]), 0, penalties)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("penalty", [0.5, 30.0])
def test_coefficients_are_those_of_scikit_survival(ties: bool, penalty: float) -> None:
    model = pytest.importorskip("sksurv.linear_model").CoxPHSurvivalAnalysis(alpha=penalty, ties="breslow", tol=1e-12)
    x, labels = cohort()
    if ties:
        labels[:, 0] = np.ceil(5 * labels[:, 0])
    pairs = list(zip(labels[:, 1].astype(bool), labels[:, 0], strict=True))
    model.fit(x, np.array(pairs, dtype=[("event", bool), ("time", float)]))
    np.testing.assert_allclose(coefficients(x, labels, [100.0, penalty])[1], model.coef_, atol=2e-6)


def test_coefficients_are_those_of_lifelines() -> None:
    """As lifelines 0.30.3 gives them for `CoxPHFitter(penalizer=30 / 150)`, which divides by the sample's deviation."""
    x, labels = cohort()
    x = x * np.sqrt(149 / 150)
    found = coefficients(x, labels, [30.0])[0]
    lifelines = [0.3879304331, 0.1536311594, 0.0416701761, -0.0600178924, 0.1353625810, 0.0857010738]
    np.testing.assert_allclose(found, lifelines, atol=1e-5)


def test_more_features_than_rows_is_the_same_as_in_the_basis_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    x, labels = cohort(40, 6)
    rotation = np.linalg.qr(rng.normal(size=(200, 200)))[0][:6]
    wide = coefficients(x @ rotation, labels, [3.0])[0]
    np.testing.assert_allclose(wide @ rotation.T, coefficients(x, labels, [3.0])[0], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(wide), np.linalg.norm(wide @ rotation.T), rtol=1e-3)


def test_halves_have_the_curves_and_the_test_of_scikit_survival() -> None:
    nonparametric = pytest.importorskip("sksurv.nonparametric")
    compare = pytest.importorskip("sksurv.compare")
    x, labels = cohort()
    labels[:, 0] = np.ceil(8 * labels[:, 0])
    is_high = x[:, 0] > 0
    told = risk_halves(labels, is_high)
    for curve, rows in zip(told["halves"], (labels[~is_high], labels[is_high]), strict=True):
        times, survival = nonparametric.kaplan_meier_estimator(rows[:, 1].astype(bool), rows[:, 0])
        np.testing.assert_allclose(np.interp(times, curve["times"], curve["survival"]), survival, atol=1e-12)
        assert (curve["times"][0], curve["survival"][0]) == (0.0, 1.0)
    pairs = list(zip(labels[:, 1].astype(bool), labels[:, 0], strict=True))
    y = np.array(pairs, dtype=[("event", bool), ("time", float)])
    assert told["log_rank_p"] == pytest.approx(compare.compare_survival(y, is_high)[1], rel=1e-6)
    assert risk_halves(labels, np.zeros(len(labels), dtype=bool))["log_rank_p"] is None


def test_without_an_event_nothing_is_learned() -> None:
    x, labels = cohort(20)
    with pytest.raises(ValueError, match="no event was seen"):
        coefficients(x, labels * [1, 0], [1.0])
