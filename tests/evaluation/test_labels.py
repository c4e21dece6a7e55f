"""What becomes of a column and of a joined table; no patient on two sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fmcib_ssl.evaluation.labels import (
    EvaluationError,
    Split,
    cross_validation,
    given_split,
    grouped_folds,
    join_labels,
    nested_share,
    read_labels,
    shared_patients,
    without_shared,
)
from fmcib_ssl.evaluation.metrics import Kind

LESIONS = pd.DataFrame(
    {
        "lesion_id": ["a", "b", "c", "d"],
        "grade": [1, 5, None, 3],
        "site": ["lung", "bone", "lung", None],
        "days": [10.0, 20.0, 30.0, None],
        "died": [True, False, True, True],
        "file": ["1.nii", "2.nii", "3.nii", "4.nii"],
    }
)


@pytest.mark.parametrize(
    ("threshold", "expected"), [("<5", [1, 0, 1]), (">= 3", [0, 1, 1]), ("==1", [1, 0, 0]), ("!=1.0", [0, 1, 1])]
)
def test_a_threshold_makes_two_classes_and_an_empty_cell_none(threshold: str, expected: list[int]) -> None:
    found = read_labels(LESIONS, "binary", label="grade", threshold=threshold)
    assert (found.values.tolist(), found.rows.tolist(), found.num_classes) == (expected, [0, 1, 3], 2)


def test_kinds() -> None:
    site = read_labels(LESIONS, "multiclass", label="site")
    assert (site.values.tolist(), site.classes, site.rows.tolist()) == ([1, 0, 1], ("bone", "lung"), [0, 1, 2])
    assert read_labels(LESIONS, "ordinal", label="grade").values.tolist() == [1, 5, 3]
    survival = read_labels(LESIONS, "survival", time="days", event="died")
    assert survival.values.tolist() == [[10, 1], [20, 0], [30, 1]]
    assert (survival.name, survival.num_classes) == ("days", 0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("binary", {"label": "grade"}, "3 different values.*threshold='>3'"),
        ("binary", {"label": "texture"}, "label=texture: no such column; the columns are lesion_id, grade"),
        ("binary", {"label": "site", "threshold": "<5"}, "'site' should hold numbers; 3 do not, such as 'lung'"),
        ("binary", {"label": "grade", "threshold": "5"}, "should be a comparison such as '<5'"),
        ("binary", {"label": "grade", "threshold": "<9"}, "3 lesions have a label, and it is the same"),
        ("ordinal", {"label": "grade", "threshold": "<5"}, "goes with task=binary, not ordinal"),
        ("survival", {"time": "days"}, "survival needs two columns"),
        (
            "survival",
            {"time": "days", "event": "grade"},
            "'grade' should hold 0 or 1, true or false; 2 do not",
        ),
        ("binary", {}, "label= names the column"),
    ],
)
def test_what_is_no_label_is_refused(kind: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_labels(LESIONS, kind, **options)  # type: ignore[arg-type]


def test_a_table_is_joined_by_name_and_never_by_position(tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("name,grade,split\n3.nii,7,test\n1.nii,8,train\n9.nii,9,train\n")
    joined, absent = join_labels(LESIONS, tmp_path / "more.csv", "file:name")
    assert absent == 2
    assert joined["lesion_id"].tolist() == list("abcd")
    np.testing.assert_array_equal(joined["grade"], [8, np.nan, 7, np.nan])
    assert joined["split"].fillna("").tolist() == ["train", "", "test", ""]
    assert read_labels(joined, "ordinal", label="grade").rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "on", "message"),
    [
        ("name,grade\n1.nii,2\n1.nii,3\n", "file:name", "duplicate name '1.nii'"),
        ("name,grade\n1.mhd,2\n", "file:name", "no file of the features is a name of"),
        ("name,grade\n1.nii,2\n", "file", "has no column 'file'; it has 'name', 'grade'"),
        ("name,grade\n1.nii,2\n", "path:name", "label=path: no such column"),
    ],
)
def test_a_table_that_cannot_be_joined_is_refused(tmp_path: Path, text: str, on: str, message: str) -> None:
    (tmp_path / "more.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        join_labels(LESIONS, tmp_path / "more.csv", on)


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
