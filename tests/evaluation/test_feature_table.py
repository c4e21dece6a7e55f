"""The file of features: what goes in comes out, rows are joined by id, damage is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError

PROVENANCE = {"name": "test", "kind": "encoder", "preprocessing": {"patch_size_zyx": [8, 8, 8]}}


def lesions(num: int = 6) -> pd.DataFrame:
    """A column of every kind that a lesion table has."""
    return pd.DataFrame(
        {
            "lesion_id": [f"lesion {i}" for i in range(num)],
            "row": np.arange(1, num + 1),
            "diameter_mm": [np.nan, *np.linspace(3, 30, num - 1)],
            "site": [None, *["lung", "liver, left"] * num][:num],
            "suspect": np.arange(num) % 2 == 0,
            "malignancy": pd.array([None, *range(1, num)], dtype="Int64"),
            "split": pd.Categorical((["train", "test"] * num)[:num]),
            "scanned": pd.to_datetime(["2020-02-29"] * num),
        }
    )


def table(num: int = 6, dim: int = 5, scale: float = 1.0) -> FeatureTable:
    features = np.random.default_rng(0).normal(0, scale, (num, dim)).astype(np.float32)
    return FeatureTable(lesions(num), features, PROVENANCE)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = table()
    read = FeatureTable.read(written.write(tmp_path / "new folder" / "features.parquet"))
    pd.testing.assert_frame_equal(read.lesions, written.lesions)
    assert read.features.dtype == np.float32 and read.features.tobytes() == written.features.tobytes()
    assert read.provenance == PROVENANCE


@pytest.mark.parametrize("half", [False, True])
def test_the_file_can_be_read_without_this_package(tmp_path: Path, half: bool) -> None:
    written = table()
    path = written.write(tmp_path / "features.parquet", half=half)
    dtype, arrow_type = (np.float16, pa.float16()) if half else (np.float32, pa.float32())
    assert pq.read_schema(path).field("features").type == pa.list_(arrow_type, 5)
    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["features"]), written.features.astype(dtype))
    np.testing.assert_array_equal(FeatureTable.read(path).features, written.features.astype(dtype).astype(np.float32))


def test_what_is_too_large_for_half_stays_whole(tmp_path: Path) -> None:
    written = table(scale=1e5)
    read = FeatureTable.read(written.write(tmp_path / "features.parquet", half=True))
    np.testing.assert_array_equal(read.features, written.features)


def test_no_rows_are_a_table_too(tmp_path: Path) -> None:
    empty = table().aligned([])
    assert FeatureTable.read(empty.write(tmp_path / "features.parquet")).features.shape == (0, 5)


def test_rows_are_joined_by_id() -> None:
    whole = table(50)
    order = np.random.default_rng(1).permutation(50)
    by_id = dict(zip(whole.lesions["lesion_id"], whole.features, strict=True))
    shuffled = FeatureTable(whole.lesions.iloc[order], whole.features[order], PROVENANCE)
    wanted = [f"lesion {i}" for i in (49, 3, 17, 0)]
    found = shuffled.aligned(wanted)
    assert found.lesions["lesion_id"].tolist() == wanted
    np.testing.assert_array_equal(found.features, np.stack([by_id[lesion] for lesion in wanted]))
    assert found.lesions["row"].tolist() == [50, 4, 18, 1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["lesion 1", "lesion 7", "lesion 8"], "'test' has no features of 2 of 3 lesions: 'lesion 7', 'lesion 8'"),
        (["lesion 1", "lesion 1"], "duplicate lesion_id: 'lesion 1'"),
    ],
)
def test_lesions_that_cannot_be_joined_are_named(wanted: list[str], message: str) -> None:
    with pytest.raises(FeatureTableError, match=message):
        table().aligned(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((5, 3), np.float32)}, r"float32 \(6, dim\).*\(5, 3\)"),
        ({"features": np.zeros((6, 3))}, "they are float64"),
        ({"lesions": lesions().drop(columns="lesion_id")}, "has no column 'lesion_id'"),
        ({"lesions": lesions().assign(features=0)}, "already has a column 'features'"),
        ({"lesions": lesions().assign(lesion_id=range(6))}, "should be text in every row; it is 0, 1"),
        ({"lesions": lesions().assign(lesion_id=list("abcdea"))}, "duplicate lesion_id: 'a'"),
        ({"provenance": {"when": pd.Timestamp(0)}}, "only plain values"),
        ({"provenance": {"value": float("nan")}}, "only plain values"),
    ],
)
def test_what_is_no_table_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {"lesions": lesions(), "features": np.zeros((6, 3), np.float32), "provenance": PROVENANCE}
    with pytest.raises(FeatureTableError, match=message):
        FeatureTable(**{**values, **changes})


def test_side_by_side_joins_by_lesion() -> None:
    first, second = table(6), table(5, dim=3).aligned(f"lesion {i}" for i in (4, 2, 0))
    joined = FeatureTable.side_by_side([first, second])
    assert joined.lesions["lesion_id"].tolist() == ["lesion 0", "lesion 2", "lesion 4"]
    np.testing.assert_array_equal(joined.features, np.hstack([first.features[[0, 2, 4]], second.features[[2, 1, 0]]]))
    assert joined.provenance["name"] == f"{first.name} + {second.name}"
    assert FeatureTable.side_by_side([first]) is first


def test_features_made_elsewhere_join_as_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = FeatureTable(lesions().assign(image_path=[f"{i}.nii" for i in range(6)]), table().features, PROVENANCE)
    own.write("features.parquet")
    Path("radiomics.csv").write_text(
        "image_path,label,volume,entropy\n4.nii,x,40,4.5\n1.nii,y,10,1.5\n9.nii,z,90,9.5\n"
    )
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, {})
    both = FeatureTable.side_by_side([own, FeatureTable.read("radiomics.parquet")])
    assert both.lesions["lesion_id"].tolist() == ["lesion 1", "lesion 4"]
    np.testing.assert_array_equal(both.features[:, :-2], own.features[[1, 4]])
    np.testing.assert_array_equal(both.features[:, -2:], [[10, 1.5], [40, 4.5]])


def test_a_column_that_parquet_cannot_hold_is_named(tmp_path: Path) -> None:
    mixed = FeatureTable(lesions().assign(odd=[1, "two", 3.0, [], {}, None]), np.zeros((6, 3), np.float32), PROVENANCE)
    with pytest.raises(FeatureTableError, match="odd"):
        mixed.write(tmp_path / "features.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table().write(tmp_path / "features.parquet")
    before = path.read_bytes()

    def full_disk(_table: object, file: Any, **_options: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(FeatureTableError, match="No space left"):
        table(scale=2).write(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet.*fmcib-ssl embed"):
        FeatureTable.read(tmp_path / "absent.parquet")
