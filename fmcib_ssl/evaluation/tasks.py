"""Published tasks: a YAML says which column is predicted, on which split, and what has been published for it.

The tables themselves are the user's copy of what the authors published; they are read where they lie.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmcib_ssl.data import IMPORTERS, text_of
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.labels import EvaluationError
from fmcib_ssl.evaluation.metrics import Kind

#: Points nearer than this are one lesion.
_SAME_POINT_MM = 0.05


class _PublishedFigure(BaseModel):
    """A figure as published, with where it is from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    metric: str
    value: float
    source: str


class PublishedTask(BaseModel):
    """A task of `scripts/tasks`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    kind: Kind
    label: str | None = None
    time: str | None = None
    event: str | None = None
    tables: dict[str, str] = Field(description="side of the split: path under tables=; `all` where there is no split")
    importer: Literal["deeplesion", "luna16", "lung1"]
    join: Literal["point", "patient"]
    group: str = Field(description="column of the imported tables that names the patient, or what comes nearest")
    classes: dict[str, str] = Field(default={}, description="what a class number means")
    allow_leakage: tuple[str, ...] = Field(default=(), description="known leaks of the split: warned of, not refused")
    note: str = ""
    published: tuple[_PublishedFigure, ...] = ()


def load_task(name: str, folder: Path) -> PublishedTask:
    """Read `folder/name.yaml`.

    Raises:
        EvaluationError: no such task, or a file that is none.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise EvaluationError(
            f"task={name}: there is no such kind of label and no such task; tasks: {', '.join(known)}"
        )
    try:
        return PublishedTask.model_validate(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise EvaluationError(f"{folder / name}.yaml: {error}") from error


def join_task(task: PublishedTask, lesions: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The lesions that the task's tables name, with its columns and `split`.

    Args:
        task: what to join.
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
            f"the features have no column {', '.join(map(repr, absent))}; there is {', '.join(map(str, lesions))}"
        )
    tables = []
    for side, path in task.tables.items():
        if not (folder / path).is_file():
            raise EvaluationError(f"{folder / path}: there is no such table; tables= is the folder with {path} in it")
        tables.append(IMPORTERS[task.importer](folder / path).assign(split=side))
    rows = pd.concat(tables, ignore_index=True)
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
            f"`scripts/import_annotations.py source={task.importer}` writes them"
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
    return joined, notes


def _file_name(path: object) -> str:
    """Without folders and ending: the same scan may be kept in another format."""
    return re.sub(r".*[/\\]|\.(nii(\.gz)?|mh[ad]|nrrd)$", "", str(path))
