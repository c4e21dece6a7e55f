"""Labels of patients with several lesions: pooling against loops, attention against scikit-learn and a simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sksurv.linear_model import CoxPHSurvivalAnalysis

from fmcib_ssl.evaluation.attention import attend, attention_scores
from fmcib_ssl.evaluation.evaluate import Candidates
from fmcib_ssl.evaluation.labels import EvaluationError, Labels, Split
from fmcib_ssl.evaluation.patients import Pooling, by_patient
from fmcib_ssl.evaluation.probes import PROBES, Inputs, Protocol, score

PATIENTS = np.array(["c", "a", "a", "b", "c", "c", "d"])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 3))


def protocol(values: list[int], patients: np.ndarray = PATIENTS) -> Protocol:
    labels = Labels("died", "binary", np.array(values), np.arange(len(values)), ("no", "yes"))
    split = Split("split", np.array([0, 1, 2, 4, 5]), np.array([3, 6]))
    return Protocol(labels, patients, [split], "split")


LESIONS = pd.DataFrame({"lesion_id": [f"l{k}" for k in range(7)], "age": [3, 1, 1, 2, 3, 3, 4]})
SIZE = Inputs("size", np.arange(7.0)[:, None], linear_only=True)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_pooling_is_that_of_a_loop_over_patients(pooling: Pooling) -> None:
    candidates = Candidates([
        Inputs("x", X), Inputs("x + size", np.hstack([X, SIZE.x]), num_beside=1), SIZE, Inputs("voxels", X, 2)
    ])  # fmt: skip
    made, table, pooled = by_patient(protocol([1, 0, 0, 1, 1, 1, 0]), LESIONS, candidates, pooling)
    assert made.patients.tolist() == table["lesion_id"].tolist() == ["a", "b", "c", "d"]
    assert table["age"].tolist() == [1, 2, 3, 4]
    assert made.labels.values.tolist() == [0, 1, 1, 0]
    assert (made.splits[0].train.tolist(), made.splits[0].test.tolist()) == ([0, 2], [1, 3])
    x, beside, size, voxels = (one.x for one in pooled.inputs)
    for k, patient in enumerate("abcd"):
        own = X[patient == PATIENTS]
        np.testing.assert_allclose(voxels[k], own.mean(0))
        assert size[k] == np.arange(7)[patient == PATIENTS].max()
        if pooling == "attention":
            np.testing.assert_array_equal(x[k][: len(own)], own)
            assert np.isnan(x[k][len(own) :]).all()
        else:
            np.testing.assert_allclose(x[k], getattr(own, pooling)(0))
            np.testing.assert_allclose(beside[k], [*getattr(own, pooling)(0), size[k, 0]])


def test_what_is_no_label_of_a_patient_is_refused() -> None:
    candidates = Candidates([Inputs("x", X)])
    with pytest.raises(EvaluationError, match="'died' differs between lesions of patient 'a' and 1 others"):
        by_patient(protocol([1, 0, 1, 1, 0, 1, 0]), LESIONS, candidates, "mean")
    both = replace(protocol([1, 0, 0, 1, 1, 1, 0]), splits=[Split("s", np.array([0, 1, 3]), np.array([2, 6]))])
    with pytest.raises(EvaluationError, match="patient 'a' is on two sides"):
        by_patient(both, LESIONS, candidates, "max")


def test_attention_is_the_softmax_of_a_loop() -> None:
    bags, attention = RNG.normal(size=(4, 3, 5)), RNG.normal(size=5)
    bags[1, 2], bags[2, 1:] = np.nan, np.nan
    found = attend(torch.from_numpy(bags), torch.from_numpy(attention)).numpy()
    for bag, pooled in zip(bags, found, strict=True):
        own = bag[np.isfinite(bag[:, 0])]
        weights = np.exp(own @ attention)
        np.testing.assert_allclose(pooled, (weights / weights.sum()) @ own)


def test_of_one_lesion_a_patient_attention_is_the_linear_model_of_others() -> None:
    x, x_test = RNG.normal(size=(80, 6)), RNG.normal(size=(30, 6))
    for num_classes in (2, 3):
        y = np.digitize(x[:, 0] + RNG.normal(size=80), [0, 1][: num_classes - 1])
        (found,) = attention_scores(x, y, x_test, num_classes, [2.0])
        theirs = LogisticRegression(C=0.5, tol=1e-9, max_iter=1000).fit(x, y).predict_proba(x_test)
        np.testing.assert_allclose(found, theirs if num_classes > 2 else theirs[:, 1], atol=2e-4)
    y = 40 + x[:, 0] + RNG.normal(size=80)
    (found,) = attention_scores(x[:, None], y, x_test[:, None], 0, [3.0])
    np.testing.assert_allclose(found, Ridge(3.0).fit(x, y).predict(x_test), atol=1e-3)
    time, event = RNG.exponential(np.exp(-x[:, 0])), RNG.random(80) < 0.7
    (found,) = attention_scores(x, np.stack([time, event], axis=1), x_test, 0, [4.0])
    outcome = np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])
    theirs = CoxPHSurvivalAnalysis(alpha=4.0).fit(x, outcome).predict(x_test)
    np.testing.assert_allclose(found - found.mean(), theirs - theirs.mean(), atol=2e-3)


def test_attention_finds_the_lesion_that_matters_and_the_mean_does_not() -> None:
    """Of five lesions one is marked by feature 0, and that one's feature 1 makes the label."""
    rng = np.random.default_rng(1)
    num, lesions = 160, 5
    key = np.repeat(np.arange(lesions)[None] == 0, num, axis=0)
    x = rng.normal(size=(num, lesions, 6))
    x[..., 0] = np.where(key, 4.0, 0.0) + 0.3 * rng.normal(size=(num, lesions))
    y = np.repeat(x[:, 0, 1] + 0.3 * rng.normal(size=num) > 0, lesions).astype(np.int64)
    patients = np.repeat([f"p{k:03d}" for k in range(num)], lesions)
    labels = Labels("label", "binary", y, np.arange(len(y)), ("0", "1"))
    split = Split("split", np.arange(len(y) // 2), np.arange(len(y) // 2, len(y)))
    made = Protocol(labels, patients, [split], "split", num_inner_folds=2)
    table = pd.DataFrame({"lesion_id": np.arange(len(y)).astype(str)})
    aucs: dict[Pooling, float] = {}
    probes: dict[Pooling, str] = {"mean": "logistic", "attention": "attention"}
    for pooling, probe in probes.items():
        own, _, pooled = by_patient(made, table, Candidates([Inputs("x", x.reshape(-1, 6))]), pooling)
        (found,) = score(PROBES[probe], pooled.inputs[0], own)
        aucs[pooling] = roc_auc_score(own.labels.values[found.rows], found.scores)
    assert aucs["attention"] > 0.93
    assert aucs["mean"] < 0.85
