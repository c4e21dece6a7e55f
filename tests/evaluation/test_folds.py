"""No patient on two sides, classes in equal shares, nested shares of the labels."""

from __future__ import annotations

import numpy as np
import pytest

from fmcib_ssl.evaluation.labels import (
    Split,
    cross_validation,
    given_split,
    grouped_folds,
    nested_share,
    shared_patients,
    without_shared,
)
from fmcib_ssl.evaluation.metrics import Kind

RNG = np.random.default_rng(0)
PATIENTS = np.array([f"p{k}" for k in RNG.integers(0, 150, 400)])
LABELS: dict[Kind, np.ndarray] = {
    "binary": (RNG.random(400) < 0.3).astype(int),
    "multiclass": RNG.choice(4, 400, p=[0.5, 0.3, 0.15, 0.05]),
    "ordinal": np.rint(RNG.normal(3, 1, 400)),
    "continuous": RNG.normal(size=400),
    "survival": np.column_stack([RNG.exponential(size=400), RNG.random(400) < 0.6]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_folds_part_patients_and_test_every_lesion_once_a_repeat(kind: Kind) -> None:
    parts = cross_validation(kind, LABELS[kind], PATIENTS, num_folds=5, num_repeats=2)
    assert [part.name for part in parts] == [f"{r}.{k}" for r in range(2) for k in range(5)]
    for part in parts:
        assert not len(shared_patients(part, PATIENTS))
        assert len(part.train) + len(part.test) == 400
    for repeat in (parts[:5], parts[5:]):
        assert sorted(np.concatenate([part.test for part in repeat])) == list(range(400))
    assert {tuple(p.test) for p in parts[:5]}.isdisjoint({tuple(p.test) for p in parts[5:]})


def test_classes_have_about_equal_shares_in_every_fold() -> None:
    y = LABELS["binary"]
    for _, test in grouped_folds("binary", y, PATIENTS, 5, 0):
        assert abs(y[test].mean() - y.mean()) < 0.04


def test_there_are_no_more_folds_than_patients_of_the_rarest_class() -> None:
    y = np.zeros(40, dtype=int)
    y[:3] = 1
    assert len(list(grouped_folds("binary", y, np.arange(40), 5, 0))) == 3
    with pytest.raises(ValueError, match="rarest with 1 patient"):
        list(grouped_folds("binary", y, np.repeat([0, 1], [3, 37]), 5, 0))


@pytest.mark.parametrize("kind", LABELS)
def test_shares_of_the_labels_are_nested_whole_patients_and_seeded(kind: Kind) -> None:
    rows = np.sort(RNG.permutation(400)[:300])
    num_patients = len(np.unique(PATIENTS[rows]))
    larger = rows
    for fraction in (0.5, 0.2, 0.1):
        found = nested_share(kind, LABELS[kind], PATIENTS, rows, fraction=fraction, seed=3)
        taken = np.unique(PATIENTS[found])
        assert len(taken) == round(fraction * num_patients)
        assert set(found) == set(rows[np.isin(PATIENTS[rows], taken)])
        assert set(found) < set(larger)
        again = nested_share(kind, LABELS[kind], PATIENTS, rows, fraction=fraction, seed=3)
        np.testing.assert_array_equal(found, again)
        assert set(found) != set(nested_share(kind, LABELS[kind], PATIENTS, rows, fraction=fraction, seed=4))
        larger = found
    np.testing.assert_array_equal(nested_share(kind, LABELS[kind], PATIENTS, rows, fraction=1, seed=3), rows)


def test_shares_of_the_labels_hold_the_classes_in_their_shares() -> None:
    patients, y = np.arange(1000), (np.arange(1000) % 10 == 0).astype(int)
    for seed in range(5):
        found = nested_share("binary", y, patients, patients, fraction=0.1, seed=seed)
        assert 9 <= y[found].sum() <= 11


def test_a_given_split_is_taken_as_it_is() -> None:
    part = given_split(np.array(["train", "Test ", "tune", "train"]))
    assert (part.train.tolist(), part.test.tolist(), list(part.val)) == ([0, 3], [1], [2])  # type: ignore[arg-type]
    assert given_split(np.array(["train", "test"])).val is None
    with pytest.raises(ValueError, match=r"names 'train', 'val' and 'test', not \['hold-out'\]"):
        given_split(np.array(["train", "test", "hold-out"]))
    with pytest.raises(ValueError, match="0 rows to train"):
        given_split(np.array(["test", "test"]))


def test_shared_patients_leave_what_is_trained_on_and_the_test_stays() -> None:
    patients = np.array(["a", "b", "c", "a", "c", "d", "b"])
    part = Split("split", np.array([0, 1, 2]), np.array([3]), np.array([4, 5, 6]))
    assert shared_patients(part, patients).tolist() == ["a", "b", "c"]
    apart = without_shared(part, patients)
    assert (apart.train.tolist(), apart.test.tolist()) == ([], [3])
    part = Split("split", np.array([0, 1, 2, 5]), np.array([3]), None)
    assert without_shared(part, patients).train.tolist() == [1, 2, 5]
    assert not len(shared_patients(without_shared(part, patients), patients))
