"""Probes against scikit-learn, intervals against theory and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fmcib_ssl.evaluation.probes import (
    C_GRID,
    Estimate,
    embed,
    linear_probe,
    paired_auc_difference,
    raw_voxel_features,
    roc_auc,
)
from fmcib_ssl.types import Preprocessing


def blobs(n: int, dim: int = 6, gap: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    features = rng.normal(size=(n, dim)) * np.geomspace(0.01, 100, dim)
    features[:, 0] += 0.01 * gap * labels
    return features, labels


def test_the_probe_is_scikit_learns_pipeline_at_the_chosen_penalty() -> None:
    (x, y), (x_test, y_test) = blobs(120, seed=0), blobs(80, seed=1)
    result = linear_probe(x, y, x_test, y_test)
    assert result.c in C_GRID
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=result.c, max_iter=5000)).fit(x, y)
    np.testing.assert_allclose(result.scores, oracle.decision_function(x_test), rtol=1e-6)
    assert result.auc.value == pytest.approx(roc_auc_score(y_test, result.scores), abs=1e-12)
    assert result.auc.low < result.auc.value < result.auc.high


def test_the_pca_of_the_probe_is_fitted_on_the_training_rows() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 500)), np.arange(60) % 2
    x_test, y_test = rng.normal(3, 10, size=(40, 500)), np.arange(40) % 2
    result = linear_probe(x, y, x_test, y_test, num_components=8)
    oracle = make_pipeline(
        PCA(8, svd_solver="randomized", random_state=0),
        StandardScaler(),
        LogisticRegression(C=result.c, max_iter=5000),
    ).fit(x, y)
    np.testing.assert_allclose(result.scores, oracle.decision_function(x_test), rtol=1e-6)


def test_the_penalty_is_chosen_without_the_test_set() -> None:
    (x, y), (x_test, y_test) = blobs(100), blobs(50, seed=2)
    result = linear_probe(x, y, x_test, y_test)
    flipped = linear_probe(x, y, -x_test[::-1], 1 - y_test)
    assert result.c == flipped.c


def test_the_penalty_is_the_one_of_a_grid_search_over_folds_of_patients() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    y = np.repeat(rng.integers(0, 2, 40), 5)
    x = np.repeat(rng.normal(size=(40, 30)), 5, axis=0) + 0.1 * rng.normal(size=(200, 30))
    x[:, 0] += y
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        {"logisticregression__C": C_GRID},
        scoring="roc_auc",
        cv=StratifiedGroupKFold(5, shuffle=True, random_state=0),
    )

    def chosen(groups: np.ndarray) -> float:
        return float(search.fit(x, y, groups=groups).best_params_["logisticregression__C"])

    assert linear_probe(x, y, x, y, train_groups=patients).c == chosen(patients)
    assert linear_probe(x, y, x, y).c == chosen(np.arange(200))
    assert chosen(patients) != chosen(np.arange(200))  # or this test would not see the groups


def test_the_interval_covers_the_true_auc() -> None:
    """Binormal scores with a gap of d deviations have AUC Phi(d / sqrt 2); 95 % of intervals should hold it."""
    true_auc = 0.7602499389  # d = 1
    rng = np.random.default_rng(0)
    held = 0
    for k in range(200):
        y = np.arange(120) % 2
        estimate = roc_auc(y, rng.normal(y, 1.0), num_bootstrap=300, seed=k)
        held += estimate.low <= true_auc <= estimate.high
    assert 0.90 <= held / 200 <= 0.99


def test_rows_of_a_patient_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(40) % 2, 8)
    scores = np.repeat(rng.normal(np.arange(40) % 2, 1.5), 8)
    rows = roc_auc(y, scores)
    patients = roc_auc(y, scores, np.repeat(np.arange(40), 8))
    assert patients.high - patients.low > 2 * (rows.high - rows.low)


def test_a_paired_difference_knows_that_the_patients_are_the_same() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(150) % 2
    base = rng.normal(y, 1.2)
    better = base + 0.3 * y
    difference = paired_auc_difference(y, better, base)
    a, b = roc_auc(y, better), roc_auc(y, base)
    assert difference.value == pytest.approx(a.value - b.value)
    assert difference.low > 0  # while the two intervals overlap
    assert a.low < b.high
    same = paired_auc_difference(y, base, base)
    assert same == Estimate(0.0, 0.0, 0.0)
    assert paired_auc_difference(y, base, better).value == -difference.value


def test_an_estimate_reads_as_in_a_table() -> None:
    assert str(Estimate(0.8149, 0.7, 0.9)) == "0.81 (0.70 to 0.90)"


class MeanAndMode(nn.Module):
    """Features: the mean of the patch, and whether the module is training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        mean = x.mean((1, 2, 3, 4)) * self.scale
        return torch.stack([mean, torch.full_like(mean, float(self.training))], 1)


@pytest.mark.parametrize("training", [False, True])
def test_embed_keeps_order_and_mode(training: bool) -> None:
    encoder = MeanAndMode().train(training)
    hu = np.random.default_rng(0).integers(-1300, 500, (7, 1, 2, 3, 4)).astype(np.int16)
    features = embed(encoder, map(torch.from_numpy, hu), Preprocessing((2, 3, 4)), batch_size=3)
    expected = ((np.maximum(hu, -1024) + 1024.0) / 3072).reshape(7, -1).mean(1)
    np.testing.assert_allclose(features[:, 0], expected, rtol=1e-5)
    assert (features[:, 1] == 0).all()
    assert encoder.training is training


def test_embed_refuses_other_patches_and_restores_the_mode() -> None:
    encoder = MeanAndMode().train()
    with pytest.raises(ValueError, match=r"patch 0 is \(1, 2, 2, 2\).*trained on \(1, 2, 3, 4\)"):
        embed(encoder, [torch.zeros((1, 2, 2, 2), dtype=torch.int16)], Preprocessing((2, 3, 4)))
    assert encoder.training
    with pytest.raises(ValueError, match="no patches"):
        embed(encoder, [], Preprocessing((2, 3, 4)))


def test_raw_voxels_are_the_normalised_patch() -> None:
    hu = np.random.default_rng(0).integers(-1300, 500, (3, 1, 2, 3, 4)).astype(np.int16)
    rows = raw_voxel_features(map(torch.from_numpy, hu), Preprocessing((2, 3, 4)))
    np.testing.assert_allclose(rows, (np.maximum(hu, -1024) + 1024.0).reshape(3, 24) / 3072, rtol=1e-6)


def test_what_cannot_be_probed_is_refused_with_the_reason() -> None:
    x, y = blobs(40)
    with pytest.raises(ValueError, match=r"1 patients are in both the training and the test set, such as \[39\]"):
        linear_probe(x, y, x, y, train_groups=np.arange(40), test_groups=np.arange(39, 79))
    with pytest.raises(ValueError, match="training set: 1 of 40 rows hold NaN or infinity, the first is row 3"):
        linear_probe(np.where(np.arange(40)[:, None] == 3, np.nan, x), y, x, y)
    with pytest.raises(ValueError, match=r"test set: labels should be 0 and 1, both present, got \[1\.0\]"):
        linear_probe(x, y, x, np.ones(40))
    with pytest.raises(ValueError, match=r"test set: features should be \(n, dim\).*\(40, 6\), \(39,\)"):
        linear_probe(x, y, x, y[:-1])
    with pytest.raises(ValueError, match=r"5 folds need 5 patients of each class .* give more data or fewer folds"):
        linear_probe(x, y, x, y, train_groups=np.arange(40) % 3)
    one_class = next(seed for seed in range(9) if np.ptp(np.random.default_rng(seed).integers(2, size=2)) == 0)
    with pytest.raises(ValueError, match="no bootstrap resample holds both classes"):
        roc_auc([0, 1], [0.1, 0.2], num_bootstrap=1, seed=one_class)
