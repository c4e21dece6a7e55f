"""Tasks as data: that each can be read, says where its figures are from, and joins the tables of its authors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fmcib_ssl.data.importers import IMPORTERS
from fmcib_ssl.evaluation.labels import EvaluationError, column_text, given_split, read_labels, shared_patients
from fmcib_ssl.evaluation.tasks import Task, join_further_labels, join_task, load_task, protocol_of, read_task

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in (ROOT / "configs" / "task").glob("*.yaml")}
#: Where the data at hand has tables: the tasks' folder of tables, by name.
AT_HAND = {
    **dict.fromkeys(("lidc_texture", "lidc_margin", "lidc_spiculation", "lidc_malignancy"), "."),
    **dict.fromkeys(("luna16_malignancy_crops", "sarcoma_metastasis", "sarcoma_survival"), "."),
    **dict.fromkeys(("deeplesion_site", "luna16_malignancy", "lung1_survival"), "annotations"),
}


def load(name: str) -> Task:
    return load_task(name, FILES[name].parent)


def as_embedded(task: Task, folder: Path) -> pd.DataFrame:
    """Lesions as a table of features has them: shuffled, without the split, points after a journey through CSV."""
    tables = [IMPORTERS[task.importer](folder / path) for path in task.tables.values()]
    rows = pd.concat(tables).sample(frac=1, random_state=0).reset_index(drop=True)
    rows["image_path"] = "elsewhere/" + rows["image_path"].str.replace(".mhd", ".nii.gz")
    rows[["coordX", "coordY", "coordZ"]] = rows[["coordX", "coordY", "coordZ"]].round(3)
    rows["lesion_id"] = [f"l{k}" for k in range(len(rows))]
    return rows.drop(columns=[name for name in ("split", task.label) if name in rows])


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_figure_says_where_it_is_from(name: str) -> None:
    task = load(name)
    for figure in task.published:
        assert 0 < figure["value"] < 1
        assert " doi:10." in figure["source"]
        assert "github.com/AIM-Harvard/" in figure["source"]
    # what an author published is on that author's split, or the note says what it is on
    assert task.published or "no published figure" in task.note or "readers" in task.model_fields_set


@pytest.mark.parametrize("name", sorted(AT_HAND))
def test_tasks_have_labels_and_a_split_in_the_tables_at_hand(real_data: Path, name: str) -> None:
    task, folder = load(name), real_data / AT_HAND[name]
    rows = read_task(task, folder)
    rows = join_further_labels(task, rows.assign(lesion_id=[f"l{k}" for k in range(len(rows))]), folder)
    protocol, lesions, notes = protocol_of(task, rows)
    tested = {  # lesions or patients that stand in the authors' tables
        "luna16_malignancy_crops": 142, "sarcoma_metastasis": 51, "sarcoma_survival": 51, "deeplesion_site": 1221,
        "luna16_malignancy": 170, "lung1_survival": 421,
    }.get(name, 981)  # fmt: skip
    assert sum(len(split.test) for split in protocol.splits) == tested
    assert set(task.size) <= {*lesions, "diameter_mm"}
    assert protocol.name in notes[-1]
    assert ("as published" in notes[-1]) == (len(protocol.splits) == 1)


def test_further_labels_are_those_of_the_same_file(real_data: Path) -> None:
    task, folder = load("luna16_malignancy_crops"), real_data
    rows = join_further_labels(task, read_task(task, folder), folder)
    published = pd.read_csv(folder / "lidc_crops" / "fmcib_task2_voi_map.csv").set_index("f")
    for row in rows[rows["split"].notna()].itertuples():
        assert published.loc[Path(row.image_path).name, "malignancy"] == row.malignancy
    assert rows["split"].value_counts().to_dict() == {"train": 283, "val": 141, "test": 142}


@pytest.mark.parametrize(
    ("name", "sizes", "num_shared"),
    [
        ("deeplesion_site", {"train": 2610, "val": 1220, "test": 1221}, 291),
        ("luna16_malignancy", {"train": 338, "val": 169, "test": 170}, 115),
        ("lung1_survival", {"all": 421}, None),
    ],
)
def test_published_tables_join_whatever_the_order(
    real_data: Path, name: str, sizes: dict[str, int], num_shared: int | None
) -> None:
    task, folder = load(name), real_data / "annotations"
    lesions = as_embedded(task, folder)
    joined, notes = join_task(task, lesions, folder)
    assert joined["split"].value_counts().to_dict() == sizes
    assert notes == [task.note]
    # the same lesion, not only the same number of them
    told = joined.set_index("lesion_id").loc[lesions["lesion_id"]]
    if task.join == "point":
        np.testing.assert_allclose(told["coordX"], lesions["coordX"], atol=1e-3)
    else:
        assert told["PatientID"].tolist() == lesions["PatientID"].tolist()
    labels = read_labels(joined, task.kind, label=task.label, time=task.time, event=task.event)
    assert len(labels.rows) == sum(sizes.values())
    if num_shared is not None:
        part = given_split(column_text(joined, "split", "split"))
        assert len(shared_patients(part, column_text(joined, task.group, "group"))) == num_shared
        assert len(labels.classes) == len(task.classes)


def test_lesions_without_features_are_said_and_none_at_all_is_refused(real_data: Path) -> None:
    task, folder = load("luna16_malignancy"), real_data / "annotations"
    lesions = as_embedded(task, folder)
    joined, notes = join_task(task, lesions.iloc[:600], folder)
    assert len(joined) == 600
    assert notes[-1].startswith("77 of 677 published lesions have no features: ")
    moved = lesions.assign(coordX=lesions["coordX"] + 1)
    with pytest.raises(EvaluationError, match="none of the 677 lesions of LUNA16, malignancy is among the 677"):
        join_task(task, moved, folder)
    with pytest.raises(EvaluationError, match=r"task2_train\.csv: no such table"):
        join_task(task, lesions, folder / "luna16")
    with pytest.raises(EvaluationError, match="no column 'coordZ'"):
        join_task(task, lesions.drop(columns="coordZ"), folder)


def test_a_task_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"task=lung2: neither a kind .* the tasks are .*lidc_texture"):
        load_task("lung2", ROOT / "configs" / "task")
    (tmp_path / "mine.yaml").write_text("title: mine\nkind: binary\nlables: y\n")
    with pytest.raises(EvaluationError, match=r"mine.yaml: (.|\n)*lables"):
        load_task("mine", tmp_path)
    (tmp_path / "other.yaml").write_text("title: mine\nkind: binary\nimporter: theirs\n")
    with pytest.raises(EvaluationError, match=r"other.yaml: importer=theirs is none of lesions, deeplesion"):
        load_task(tmp_path / "other.yaml", ROOT)
