"""Splits by patient: what must hold for any table, and the balance beside scikit-learn's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from fmcib_ssl.data.annotations import AnnotationsError
from fmcib_ssl.data.splits import assign_folds, assign_splits, describe_splits

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def random_table(seed: int) -> pd.DataFrame:
    """Patients with one to six scans and one to four lesions in each."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(int(rng.integers(6, 80))):
        malignant = rng.random() < 0.3
        for scan in range(int(rng.integers(1, 7))):
            rows += [
                {
                    "image_path": f"{patient}/{scan}.nii.gz",
                    "PatientID": f"P{patient}",
                    "label": int(malignant),
                    "diameter_mm": rng.lognormal(2),
                }
                for _ in range(int(rng.integers(1, 5)))
            ]
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1))


@pytest.mark.parametrize("seed", range(8))
def test_what_must_always_hold(seed: int) -> None:
    rows = random_table(seed)
    rng = np.random.default_rng(seed)
    sides = assign_splits(rows, SHARES, labels=["label", "diameter_mm"], seed=seed)
    assert sides.index.equals(rows.index)
    assert set(sides) == set(SHARES)
    assert (sides.groupby(rows["PatientID"]).nunique() == 1).all()
    assert (sides.groupby(rows["image_path"]).nunique() == 1).all()
    assert (assign_splits(rows, SHARES, seed=seed + 1) != sides).any()
    # The order of the rows decides nothing.
    shuffled = rows.iloc[rng.permutation(len(rows))]
    again = assign_splits(shuffled, SHARES, labels=["label", "diameter_mm"], seed=seed)
    pd.testing.assert_series_equal(again.sort_index(), sides)
    num_folds = int(rng.integers(2, 6))
    folds = assign_folds(rows, num_folds, labels=["label"], seed=seed)
    assert set(folds) == set(range(num_folds))
    assert (folds.groupby(rows["PatientID"]).nunique() == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_folds_are_as_balanced_as_scikit_learns(seed: int) -> None:
    rows = random_table(100 + seed)

    def imbalance(folds: np.ndarray) -> float:
        """Largest deviation of a fold from its fifth of the lesions of a class."""
        table = pd.crosstab(folds, rows["label"].to_numpy())
        return float((table / table.sum() - 1 / 5).abs().to_numpy().max())

    theirs = np.empty(len(rows), dtype=int)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    for fold, (_, test) in enumerate(splitter.split(rows, rows["label"], rows["PatientID"])):
        theirs[test] = fold
    ours = assign_folds(rows, 5, labels=["label"], seed=seed).to_numpy()
    assert imbalance(ours) <= imbalance(theirs) + 0.02


def test_the_real_crops_are_balanced_in_labels_scans_and_patients(real_data: Path) -> None:
    rows = pd.read_csv(real_data / "lidc_crops" / "voi_index.csv")
    rows["image_path"] = rows["seriesuid"]
    sides = assign_splits(rows, SHARES, "patient_id", ["malignancy", "texture"])
    held = describe_splits(rows, sides, "patient_id", ["malignancy", "texture"])
    assert held["patients"].sum() == 551
    assert held["scans"].sum() == 552
    for name, share in SHARES.items():
        assert held.loc[name, "lesions"] / 994 == pytest.approx(share, abs=0.01)
        assert held.loc[name, "scans"] / 552 == pytest.approx(share, abs=0.03)
    assert np.ptp(held.filter(like="=").to_numpy(), axis=0).max() < 0.02


def test_what_cannot_be_split() -> None:
    rows = random_table(0)
    unnamed = rows.assign(PatientID=rows["PatientID"].where(rows.index != 2))
    two = pd.DataFrame({"image_path": ["a", "a", "b"], "PatientID": ["P1", "P2", "P3"]})
    for table, shares, message in (
        (unnamed, SHARES, r"1 rows have no 'PatientID', the first is row 2.*group=image_path"),
        (two, {"train": 1.0}, r"a is listed under several values of 'PatientID': P1, P2"),
        (two.iloc[1:], SHARES, "cannot fill 3 sides"),
        (rows, {"train": 0.9999, "val": 0.0001}, "'val' would be empty"),
        (rows, {"train": 1.0, "val": 0.0}, "each must be above 0"),
    ):
        with pytest.raises(AnnotationsError, match=message):
            assign_splits(table, shares)
    with pytest.raises(AnnotationsError, match="num_folds=1 must be 2 or more"):
        assign_folds(rows, 1)


def test_an_empty_label_is_a_class_of_its_own() -> None:
    names = [f"P{i}" for i in range(40)]
    label = [None if i % 4 == 0 else "a" for i in range(40)]
    rows = pd.DataFrame({"image_path": names, "PatientID": names, "label": label})
    folds = assign_folds(rows, 2, labels=["label"])
    assert folds[rows["label"].isna()].value_counts().to_dict() == {0: 5, 1: 5}
    assert describe_splits(rows, folds, labels=["label"])["label="].tolist() == [0.25, 0.25]


def test_blanks_round_a_name_do_not_make_another_patient() -> None:
    rows = pd.DataFrame({"image_path": list("abcd"), "PatientID": ["P1", "P1 ", "P2", " P2"]})
    sides = assign_folds(rows, 2)
    assert sides[0] == sides[1] != sides[2] == sides[3]
