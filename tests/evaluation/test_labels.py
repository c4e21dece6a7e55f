"""What becomes of a column, and of a table that is joined to the lesions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fmcib_ssl.evaluation.labels import EvaluationError, join_labels, read_labels

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
        ("binary", {"label": "texture"}, "label=texture: there is no such column; there is lesion_id, grade"),
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
        ("name,grade\n1.nii,2\n", "path:name", "label=path: there is no such column"),
    ],
)
def test_a_table_that_cannot_be_joined_is_refused(tmp_path: Path, text: str, on: str, message: str) -> None:
    (tmp_path / "more.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        join_labels(LESIONS, tmp_path / "more.csv", on)
