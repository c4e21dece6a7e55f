"""Published tasks: every shipped one can be read, and joins the published tables as an importer writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fmcib_ssl.data.importers import IMPORTERS
from fmcib_ssl.evaluation.labels import EvaluationError, column_text, given_split, read_labels, shared_patients
from fmcib_ssl.evaluation.tasks import PublishedTask, join_task, load_task

TASKS = Path(__file__).resolve().parents[2] / "scripts" / "tasks"
NAMES = sorted(path.stem for path in TASKS.glob("*.yaml"))


def as_embedded(task: PublishedTask, folder: Path) -> pd.DataFrame:
    """Lesions as a table of features has them: shuffled, without the split, points after a journey through CSV."""
    tables = [IMPORTERS[task.importer](folder / path) for path in task.tables.values()]
    rows = pd.concat(tables).sample(frac=1, random_state=0).reset_index(drop=True)
    rows["image_path"] = "elsewhere/" + rows["image_path"].str.replace(".mhd", ".nii.gz")
    rows[["coordX", "coordY", "coordZ"]] = rows[["coordX", "coordY", "coordZ"]].round(3)
    rows["lesion_id"] = [f"l{k}" for k in range(len(rows))]
    return rows.drop(columns=[name for name in ("split", task.label) if name in rows])


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_says_where_it_is_from(name: str) -> None:
    task = load_task(name, TASKS)
    for figure in task.published:
        assert 0 < figure.value < 1
        assert "doi:10.1038/s42256-024-00807-9" in figure.source
    assert task.published or "no published figure" in task.note


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
    task, folder = load_task(name, TASKS), real_data / "annotations"
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
    task, folder = load_task("luna16_malignancy", TASKS), real_data / "annotations"
    lesions = as_embedded(task, folder)
    joined, notes = join_task(task, lesions.iloc[:600], folder)
    assert len(joined) == 600
    assert notes[-1].startswith("77 of 677 published lesions have no features: ")
    moved = lesions.assign(coordX=lesions["coordX"] + 1)
    with pytest.raises(EvaluationError, match="none of the 677 lesions of LUNA16, malignancy is among the 677"):
        join_task(task, moved, folder)
    with pytest.raises(EvaluationError, match=r"task2_train\.csv: there is no such table"):
        join_task(task, lesions, folder / "luna16")
    with pytest.raises(EvaluationError, match="no column 'coordZ'"):
        join_task(task, lesions.drop(columns="coordZ"), folder)


def test_a_task_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"task=lung2: there is no such kind .* tasks: deeplesion_site, luna16"):
        load_task("lung2", TASKS)
    (tmp_path / "mine.yaml").write_text("title: mine\nkind: binary\nlables: y\n")
    with pytest.raises(EvaluationError, match=r"mine.yaml: (.|\n)*lables"):
        load_task("mine", tmp_path)
