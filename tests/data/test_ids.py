"""Ids are text from the table to the results: what is a number for a reader of CSV stays what stands in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from prepared import run, scan_image, write_table

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.splits import assign_folds
from fmcib_ssl.data.store import Store
from fmcib_ssl.data.store_files import write_index
from fmcib_ssl.data.tables import read_table, selected, text_of
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.labels import column_text, join_labels

#: Names that are one number, or none.
IDS = ["0012", "012", "12", "1E2", "100", "1234567890123456789", "1234567890123456788", "1.10", "1.1", "-0", "0"]


def csv(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(["007", "12"], id="a zero in front"),
        pytest.param(["1E2", "5"], id="an exponent"),
        pytest.param(["1234567890123456789", "1234567890123456788", ""], id="19 digits beside an empty cell"),
        pytest.param(["1.10", "1.1"], id="two names of one number"),
        pytest.param(["1.10", "1.2"], id="a zero at the end"),
        pytest.param(["+5", "5"], id="a sign"),
        pytest.param(["12", "B7"], id="letters"),
        pytest.param([" 07 ", "12"], id="blanks round it"),
    ],
)
def test_what_a_number_would_lose_stays_text(cells: list[str], tmp_path: Path) -> None:
    rows = read_table(csv(tmp_path, "id,x\n" + "".join(f"{cell},1\n" for cell in cells)))
    assert rows["id"].fillna("").tolist() == [cell.strip() for cell in cells]


@pytest.mark.parametrize(
    ("cells", "dtype", "values"),
    [
        (["1", "12", "-3"], "int64", [1, 12, -3]),
        (["1", "", "3"], "Int64", [1, None, 3]),
        (["1.5", "", "3"], "float64", [1.5, None, 3.0]),
        (["0.50", "0.25", "1.00"], "float64", [0.5, 0.25, 1.0]),
        (["1e-05", "2.5", "1.5e3"], "float64", [1e-5, 2.5, 1500.0]),
        (["True", "false", "TRUE"], "bool", [True, False, True]),
    ],
)
def test_what_loses_nothing_is_a_number(cells: list[str], dtype: str, values: list[object], tmp_path: Path) -> None:
    column = read_table(csv(tmp_path, "v,x\n" + "".join(f"{cell},1\n" for cell in cells)))["v"]
    assert column.dtype == dtype
    assert [None if pd.isna(value) else value for value in column] == values


def test_numbers_are_the_same_to_the_last_bit(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=500) * 300
    text = [f"{number!r}" for number in numbers.tolist()]
    assert read_table(csv(tmp_path, "v\n" + "\n".join(text)))["v"].tolist() == [float(cell) for cell in text]


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "SEP=;\n"])
def test_excels_first_line_names_the_separator(first: str, tmp_path: Path) -> None:
    rows = read_table(csv(tmp_path, f"{first}id;note\n007;a, b\n12;c\n"))
    assert rows.to_dict("list") == {"id": ["007", "12"], "note": ["a, b", "c"]}
    assert rows.index.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("select", "expected"),
    [({"fold": 1}, [0]), ({"fold": "1"}, [0]), ({"fold": [1, 2]}, [0, 2]), ({"id": "007"}, [0]), ({"id": 7}, [2]),
     ({"flag": True}, [0]), ({"flag": "true"}, [0]), ({"share": 0.5}, [1]), ({"share": 1}, [0])],
)  # fmt: skip
def test_a_selection_finds_what_stands_in_the_file(
    select: dict[str, object], expected: list[int], tmp_path: Path
) -> None:
    rows = read_table(csv(tmp_path, "id,fold,flag,share\n007,1,true,1.0\n12,,false,0.5\n7,2,false,0.25\n"))
    assert np.flatnonzero(selected(rows, select, key="select", where="it")).tolist() == expected
    before = pd.DataFrame({"fold": [1.0, np.nan, 2.0]})  # as tables of earlier versions hold it
    if "fold" in select:
        assert np.flatnonzero(selected(before, select, key="select", where="it")).tolist() == expected


def test_ids_stay_in_store_features_labels_and_folds(tmp_path: Path) -> None:
    sitk.WriteImage(scan_image(), str(tmp_path / "a.nrrd"))
    rows = [f"a.nrrd,{i},0,0,{name},{i % 2 if i else ''}" for i, name in enumerate(IDS)]
    table = write_table(tmp_path, rows, "image_path,coordX,coordY,coordZ,PatientID,fold")
    run(table, tmp_path / "store")
    lesions = Store(tmp_path / "store").lesions
    for frame in (table.rows, lesions):
        assert frame["PatientID"].tolist() == IDS
        assert text_of(frame["fold"]).fillna("").tolist() == ["", *(str(i % 2) for i in range(1, len(IDS)))]

    FeatureTable(lesions, np.zeros((len(IDS), 2), np.float32), {"name": "a"}).write(tmp_path / "features.parquet")
    read = FeatureTable.read(tmp_path / "features.parquet").lesions
    assert read["PatientID"].tolist() == IDS and str(read["fold"].dtype) == "Int64"
    assert column_text(read, "PatientID", "group").tolist() == IDS

    labels = csv(tmp_path, "PatientID,grade\n" + "".join(f"{name},{i}\n" for i, name in enumerate(reversed(IDS))))
    joined, num_absent = join_labels(read, labels, "PatientID")
    assert (joined["grade"].tolist(), num_absent) == (list(reversed(range(len(IDS)))), 0)

    unlike = table.rows.drop(columns="image_path")
    assert assign_folds(unlike, len(IDS)).nunique() == len(IDS), "each is a patient"


def test_tables_with_ids_as_numbers_can_still_be_joined(tmp_path: Path) -> None:
    """An index and features as earlier versions wrote them, floats where a cell was empty."""
    lesions = pd.DataFrame({"lesion_id": list("abc"), "scan_id": ["s"] * 3, "PatientID": [7.0, np.nan, 12.0]})
    write_index(tmp_path, pd.DataFrame({"scan_id": ["s"]}), lesions)
    FeatureTable(lesions, np.zeros((3, 1), np.float32), {"name": "a"}).write(tmp_path / "features.parquet")
    for old in (
        pd.read_parquet(tmp_path / "lesions.parquet"),
        FeatureTable.read(tmp_path / "features.parquet").lesions,
    ):
        labels = csv(tmp_path, "PatientID,grade\n12,2\n7,1\n,5\n")
        joined, num_absent = join_labels(old, labels, "PatientID")
        assert joined["grade"].fillna(-1).tolist() == [1, -1, 2] and num_absent == 1


def test_a_path_of_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "P1").mkdir()
    (tmp_path / "a\\b.nii").touch()  # a name that a backslash is part of
    rows = "image_path,coordX,coordY,coordZ\nP1\\ct.nii.gz,0,0,0\nC:\\ct\\P1\\ct.nii.gz,0,0,0\na\\b.nii,0,0,0\n"
    table = read_annotations(csv(tmp_path, rows), path_prefix="C:\\ct")
    names = ["P1/ct.nii.gz", "P1/ct.nii.gz", "a\\b.nii"]
    assert [table.scan_of(i).path for i in range(3)] == [tmp_path / name for name in names]
