"""Neighbours against scikit-learn, and never of the same patient."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from fmcib_ssl.evaluation.probes import nearest_lesions
from fmcib_ssl.evaluation.report_features import agreement


@pytest.fixture
def lesions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    patients = np.array([f"p{k}" for k in rng.integers(0, 25, 80)])
    # lesions of a patient resemble each other most
    of_patient = {patient: rng.normal(size=16) for patient in np.unique(patients)}
    features = np.stack([of_patient[patient] for patient in patients]) + 0.3 * rng.normal(size=(80, 16))
    return features.astype(np.float32), patients


def test_neighbours_are_scikit_learns_among_other_patients(lesions: tuple[np.ndarray, np.ndarray]) -> None:
    features, patients = lesions
    queries, would_be_their_own = [0, 17, 40], 0
    found = nearest_lesions(features, patients, queries, 5)
    for line, query in enumerate(queries):
        others = np.flatnonzero(patients != patients[query])
        oracle = NearestNeighbors(n_neighbors=5, metric="cosine").fit(features[others])
        distances, places = oracle.kneighbors(features[query : query + 1])
        np.testing.assert_array_equal(found.rows[line], others[places[0]])
        np.testing.assert_allclose(found.cosines[line], 1 - distances[0], atol=1e-5)
        everyone = NearestNeighbors(n_neighbors=2, metric="cosine").fit(features)
        would_be_their_own += patients[everyone.kneighbors(features[query : query + 1])[1][0, 1]] == patients[query]
    assert would_be_their_own > 0


def test_where_there_are_too_few_other_patients() -> None:
    found = nearest_lesions(np.eye(4), np.array(["a", "a", "a", "b"]), [0, 3], 5)
    assert found.rows.tolist() == [[3, -1, -1, -1], [0, 1, 2, -1]]
    assert np.isinf(found.cosines[0, 1:]).all()


def test_agreement_is_counted_pair_by_pair(lesions: tuple[np.ndarray, np.ndarray]) -> None:
    features, patients = lesions
    labels = np.random.default_rng(1).integers(0, 3, 80)
    queries = list(range(0, 80, 3))
    found = nearest_lesions(features, patients, queries, 4)
    hits, chance = agreement(found, queries, labels, patients)
    pairs = [labels[q] == labels[row] for q, line in zip(queries, found.rows, strict=True) for row in line if row >= 0]
    lots = [np.mean([labels[q] == labels[j] for j in range(80) if patients[j] != patients[q]]) for q in queries]
    assert (hits, chance) == (pytest.approx(np.mean(pairs)), pytest.approx(np.mean(lots)))
