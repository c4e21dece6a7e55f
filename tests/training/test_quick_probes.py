"""The quick probes against scikit-learn, one patient or one fold at a time."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmcib_ssl.training.quick_probes import KNN_TEMPERATURE, knn_scores, linear_scores, macro_auc


def lesions(num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 40, 120)
    classes = rng.integers(0, num_classes, 120)
    means = rng.normal(size=(num_classes, 8))
    return (means[classes] + 1.2 * rng.normal(size=(120, 8))).astype(np.float32), classes, groups


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_vote_is_that_of_scikit_learn_without_the_own_patient(num_classes: int) -> None:
    features, classes, groups = lesions(num_classes)
    scores = knn_scores(features, classes, groups, num_neighbors=7)
    for group in np.unique(groups):
        others = groups != group
        knn = KNeighborsClassifier(
            7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / KNN_TEMPERATURE)
        )
        expected = knn.fit(features[others], classes[others]).predict_proba(features[~others])
        np.testing.assert_allclose(scores[~others], expected, atol=1e-4)


def test_fewer_lesions_than_neighbours() -> None:
    features, classes, groups = np.eye(3, dtype=np.float32), np.array([0, 1, 1]), np.array([0, 1, 2])
    np.testing.assert_allclose(knn_scores(features, classes, groups), [[0, 1], [0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_linear_probe_sees_what_logistic_regression_sees(num_classes: int) -> None:
    features, classes, groups = lesions(num_classes)
    auc = macro_auc(classes, linear_scores(features, classes, groups))
    oracle = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(C=0.1)),
        features,
        classes,
        groups=groups,
        cv=StratifiedGroupKFold(5, shuffle=True, random_state=0),
        method="predict_proba",
    )
    assert auc == pytest.approx(macro_auc(classes, oracle), abs=0.03)
    assert auc > 0.8


def test_a_patient_never_helps_to_judge_itself() -> None:
    """Each patient is a direction of its own and its class drawn by lot: only a look at the same patient knows it."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    features = (5 * np.eye(60)[groups] + 0.1 * rng.normal(size=(240, 60))).astype(np.float32)
    classes = rng.permutation(np.arange(60) % 2)[groups]
    assert KNeighborsClassifier(3).fit(features[::2], classes[::2]).score(features[1::2], classes[1::2]) == 1
    for scores in (knn_scores(features, classes, groups, 3), linear_scores(features, classes, groups)):
        assert macro_auc(classes, scores) < 0.65


def test_the_auc_over_classes_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    classes, scores = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    assert macro_auc(classes, scores) == pytest.approx(roc_auc_score(classes, scores, multi_class="ovr"))
    binary = (classes > 0).astype(int)
    assert macro_auc(binary, scores[:, :2]) == pytest.approx(roc_auc_score(binary, scores[:, 1]))
