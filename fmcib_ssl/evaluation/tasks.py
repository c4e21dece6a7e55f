"""Tasks as data: what is predicted of which lesions, who is trained and tested on, what has been published for it.

`configs/task` holds one YAML a task. The tables and scans are the user's copies of what the authors published; they are
read where they lie.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from fmcib_ssl.data import IMPORTERS, read_table, selected, text_of
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.labels import EvaluationError, column_text, cross_validation, given_split, read_labels
from fmcib_ssl.evaluation.metrics import Kind
from fmcib_ssl.evaluation.patients import Pooling
from fmcib_ssl.evaluation.probes import Protocol
from fmcib_ssl.evaluation.readers import Readers, Target, read_ratings

#: Points nearer than this are one lesion.
_SAME_POINT_MM = 0.05


class Task(BaseModel):
    """What is asked of features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    kind: Kind
    label: str | None = None
    threshold: str | None = Field(None, description="of binary labels: what is 1, such as '<5'")
    readers: Target | None = Field(None, description="what is made of the ratings in columns LABEL_1, LABEL_2, ...")
    time: str | None = None
    event: str | None = None
    tables: dict[str, str] = Field(
        {}, description="side of the split: path under tables=; `all`: the table's own split"
    )
    importer: str = Field("lesions", description="of `import-annotations`; lesions: a table as it is trained on")
    join: Literal["point", "patient"] = "point"
    images: str = Field("", description="folder of the scans under images=")
    labels: str | None = Field(None, description="table with further columns under tables=, joined by the scan's file")
    labels_on: str = Field("file", description="its column with the file")
    select: dict[str, Any] = Field({}, description="lesions that take part, such as {suspect: false}")
    group: str | None = Field("PatientID", description="column that names the patient, or what comes nearest")
    split: str | None = Field(None, description="column with train, test and perhaps val; folds without it")
    folds: PositiveInt = 5
    size: tuple[str, ...] = Field(("diameter_mm",), description="columns with the lesion's size")
    patients: Pooling | None = Field(None, description="pool a patient's lesions; the label is the patient's")
    patch: dict[str, Any] = Field({}, description="preprocessing of baselines that are compared with no encoder")
    classes: dict[str, str] = Field({}, description="what a class number means")
    allow_leakage: tuple[str, ...] = Field((), description="known leaks of the split: warned of, not refused")
    note: str = ""
    checked_on: Literal["real table", "form of the table"] = "real table"
    published: tuple[dict[str, Any], ...] = Field((), description="method, metric, value, source of each")


def load_task(name: str | Path, folder: Path) -> Task:
    """Read `folder/name.yaml`, or the file of that name.

    Raises:
        EvaluationError: no such task, or a file that is none.
    """
    known, file = sorted(path.stem for path in folder.glob("*.yaml")), Path(name)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        if str(name) not in known:
            raise EvaluationError(
                f"task={name}: neither a kind of label nor a published task; the tasks are {', '.join(known)}"
            )
        file = folder / f"{name}.yaml"
    try:
        task = Task.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise EvaluationError(f"{file}: {error}") from error
    if task.importer not in (*IMPORTERS, "lesions"):
        raise EvaluationError(f"{file}: importer={task.importer} is none of lesions, {', '.join(IMPORTERS)}")
    return task


def read_task(task: Task, folder: Path) -> pd.DataFrame:
    """The lesions of a task's tables in the package's form, with `split`: the side, or `all` without one.

    Raises:
        EvaluationError: a missing table.
    """
    tables = []
    for side, path in task.tables.items():
        if not (folder / path).is_file():
            raise EvaluationError(f"{folder / path}: no such table; tables= is the folder with {path} in it")
        rows = IMPORTERS.get(task.importer, read_table)(folder / path)
        tables.append(rows if side == "all" and "split" in rows else rows.assign(split=side))
    rows = pd.concat(tables, ignore_index=True)
    keep = selected(rows, task.select or None, key="select", where=folder / next(iter(task.tables.values())))
    return rows[keep].reset_index(drop=True)


def join_further_labels(task: Task, lesions: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The lesions with the columns of `task.labels`, which stand for their own of the same name; by the scan's file."""
    if task.labels is None:
        return lesions
    if not (folder / task.labels).is_file():
        raise EvaluationError(f"{folder / task.labels}: no such table; tables= is the folder with {task.labels} in it")
    further = read_table(folder / task.labels)
    further.index = pd.Index(further[task.labels_on].map(_file_name))
    new = further.drop(columns=task.labels_on).reindex(lesions["image_path"].map(_file_name)).set_axis(lesions.index)
    return lesions.drop(columns=[name for name in new if name in lesions]).join(new)


def join_task(task: Task, lesions: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The lesions that the task's tables name, with its columns and `split`.

    Args:
        task: from `load_task`.
        lesions: one row a lesion, with what the importer writes: `image_path` and the point, or `PatientID`.
        folder: that the paths of `task.tables` start from.

    Returns:
        The rows, and what a reader should know about them.

    Raises:
        EvaluationError: a missing table or column, nothing in common, or two lesions that fit one row.
    """
    key, *point = ["image_path", "coordX", "coordY", "coordZ"] if task.join == "point" else ["PatientID"]
    if absent := [name for name in (key, *point) if name not in lesions]:
        raise EvaluationError(
            f"the features have no column {', '.join(map(repr, absent))}; they have {', '.join(map(str, lesions))}"
        )
    rows = read_task(task, folder)
    names = [table[key].map(_file_name) if point else text_of(table[key]) for table in (rows, lesions)]
    row_numbers = pd.DataFrame({"name": names[0], "row": range(len(rows))})
    pairs = row_numbers.merge(pd.DataFrame({"name": names[1], "lesion": range(len(lesions))}))
    if point:
        apart = lesions[point].to_numpy(float)[pairs["lesion"]] - rows[point].to_numpy(float)[pairs["row"]]
        pairs = pairs[(np.abs(apart) < _SAME_POINT_MM).all(axis=1)]
    pairs = pairs.sort_values("row", kind="stable")
    if not len(pairs):
        raise EvaluationError(
            f"none of the {len(rows)} lesions of {task.title} is among the {len(lesions)} of the features: they are "
            f"joined by {'file name and point' if task.join == 'point' else 'PatientID'}, as "
            f"`fmcib-ssl import-annotations source={task.importer}` writes them"
        )
    for one, other in (("row", "lesion"), ("lesion", "row")):
        if (doubled := pairs[pairs[one].duplicated(keep=False)]).size:
            ids = ", ".join(lesions[ID_COLUMN].iloc[doubled["lesion"].unique()[:2]])
            raise EvaluationError(f"{ids} of the features and {task.title}: more than one {other} fits")
    columns = rows.iloc[pairs["row"]].reset_index(drop=True)
    chosen = lesions.iloc[pairs["lesion"]].reset_index(drop=True)
    joined = chosen.drop(columns=[name for name in columns if name in chosen]).join(columns)
    notes = [task.note] if task.note else []
    if len(without := rows[~rows.index.isin(pairs["row"])]):
        sides = ", ".join(f"{count} of {side}" for side, count in without["split"].value_counts().items())
        notes.append(f"{len(without)} of {len(rows)} published lesions have no features: {sides}")
    return join_further_labels(task, joined, folder), notes


def protocol_of(
    task: Task, lesions: pd.DataFrame, *, seed: int = 0, num_repeats: int = 1
) -> tuple[Protocol, pd.DataFrame, list[str]]:
    """Who is labelled how, trained on and tested; the labelled rows of the lesions; and notes on them.

    Args:
        task: what is predicted, and on which split.
        lesions: one row a lesion, with the task's columns.
        seed: of the folds, and of the protocol.
        num_repeats: times that folds are drawn anew.

    Raises:
        EvaluationError: a missing column, or values that are no such labels.
    """
    notes = []
    if task.readers is not None:
        if task.label is None:
            raise EvaluationError("readers= needs label=, the name of the columns without their number")
        readers = Readers(task.label, read_ratings(lesions, task.label), task.readers, task.threshold)
        labels = readers.labels()
        notes.append("lesions by target: " + ", ".join(f"{name} {num}" for name, num in readers.counts().items()))
    else:
        columns = {key: getattr(task, key) for key in ("label", "threshold", "time", "event")}
        labels = read_labels(lesions, task.kind, **columns)
    if lost := len(lesions) - len(labels.rows):
        notes.append(f"{lost} of {len(lesions)} lesions have no label and are skipped")
    lesions = lesions.iloc[labels.rows].reset_index(drop=True)
    patients = column_text(lesions, task.group, "group") if task.group else lesions[ID_COLUMN].to_numpy(str)
    lesions = lesions.assign(num_lesions=pd.Series(patients).map(pd.Series(patients).value_counts()))
    split = task.split
    if split is None and task.tables and set(lesions["split"]) != {"all"}:
        split = "split"
    if split is not None:
        splits = [given_split(column_text(lesions, split, "split"))]
        name = "as published" if task.tables else f"column {split}"
    else:
        options = {"num_folds": task.folds, "seed": seed, "num_repeats": num_repeats}
        splits = cross_validation(labels.kind, labels.values, patients, **options)
        name = f"{task.folds} folds by {task.group or 'lesion'}"
        name += f", {num_repeats} times" if num_repeats > 1 else ""
    notes.append(f"{len(lesions)} lesions of {len(np.unique(patients))} patients, {labels.name}, {name}")
    return Protocol(labels, patients, splits, name, seed), lesions, notes


def _file_name(path: object) -> str:
    """Without folders and ending: the same scan may be kept in another format."""
    return re.sub(r".*[/\\]|\.(nii(\.gz)?|mh[ad]|nrrd)$", "", str(path))
