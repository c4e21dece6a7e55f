"""Published tasks: a YAML says which column is predicted, on which split, and what has been published for it.

The tables themselves are the user's copy of what the authors published; they are read where they lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmcib_ssl.data.importers import IMPORTERS
from fmcib_ssl.data.tables import AnnotationsError, read_table, text_of
from fmcib_ssl.evaluation.labels import EvaluationError
from fmcib_ssl.evaluation.metrics import Kind

#: Points nearer than this are one lesion.
SAME_POINT_MM = 0.05
_ENDINGS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd")


class PublishedFigure(BaseModel):
    """A figure as published, with where it is from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
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
    published: tuple[PublishedFigure, ...] = ()

    @property
    def has_split(self) -> bool:
        """Whether the authors published who is trained on and who is tested."""
        return set(self.tables) != {"all"}


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
        EvaluationError: a table that is not there, columns that are missing, nothing in common, or two lesions that
            fit one row.
    """
    rows = pd.concat([_imported(task, folder / path).assign(split=side) for side, path in task.tables.items()])
    rows = rows.reset_index(drop=True)
    matched = _by_point(rows, lesions) if task.join == "point" else _by_patient(rows, lesions)
    if (matched < 0).all():
        raise EvaluationError(
            f"none of the {len(rows)} lesions of {task.title} is among the {len(lesions)} of the features: they are "
            f"joined by {'file name and point' if task.join == 'point' else 'PatientID'}, as "
            f"`scripts/import_annotations.py source={task.importer}` writes them"
        )
    there = rows[matched >= 0]
    chosen = lesions.iloc[matched[matched >= 0]].reset_index(drop=True)
    if chosen["lesion_id"].duplicated().any():
        twice = chosen["lesion_id"][chosen["lesion_id"].duplicated()].iloc[0]
        raise EvaluationError(f"lesion {twice} of the features fits two rows of {task.title}")
    columns = there.reset_index(drop=True)
    joined = chosen.drop(columns=[name for name in columns if name in chosen]).join(columns)
    notes = [task.note] if task.note else []
    if len(there) < len(rows):
        by_side = rows["split"][matched < 0].value_counts().to_dict()
        lacking = ", ".join(f"{count} of {side}" for side, count in by_side.items())
        notes.append(f"{len(rows) - len(there)} of {len(rows)} published lesions have no features: {lacking}")
    return joined, notes


def _imported(task: PublishedTask, path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise EvaluationError(f"{path}: there is no such table; tables= is the folder with {path.name}'s folder in it")
    try:
        return IMPORTERS[task.importer](path) if task.importer in IMPORTERS else read_table(path)
    except AnnotationsError as error:
        raise EvaluationError(str(error)) from error


def _by_patient(rows: pd.DataFrame, lesions: pd.DataFrame) -> npt.NDArray[np.int64]:
    if "PatientID" not in lesions:
        raise EvaluationError(f"the features have no column 'PatientID'; they have {', '.join(map(str, lesions))}")
    patients = text_of(lesions["PatientID"])
    if patients.duplicated().any():
        raise EvaluationError(
            f"patient {patients[patients.duplicated()].iloc[0]} has two lesions; the task is one each"
        )
    places: npt.NDArray[np.int64] = pd.Index(patients).get_indexer(pd.Index(text_of(rows["PatientID"])))
    return places


def _by_point(rows: pd.DataFrame, lesions: pd.DataFrame) -> npt.NDArray[np.int64]:
    wanted = ("image_path", "coordX", "coordY", "coordZ")
    if absent := [name for name in wanted if name not in lesions]:
        raise EvaluationError(
            f"the features have no column {', '.join(map(repr, absent))}; there is {', '.join(map(str, lesions))}"
        )
    points = lesions[list(wanted[1:])].to_numpy(np.float64)
    of_scan = lesions.groupby(lesions["image_path"].map(_stem)).indices
    matched = np.full(len(rows), -1)
    for number, (path, *point) in enumerate(rows[list(wanted)].itertuples(index=False)):
        places = of_scan.get(_stem(path), np.zeros(0, dtype=int))
        near = places[(np.abs(points[places] - np.array(point, dtype=np.float64)) < SAME_POINT_MM).all(axis=1)]
        if len(near) > 1:
            raise EvaluationError(f"{len(near)} lesions of the features lie at the point {point} of {path}")
        if len(near):
            matched[number] = near[0]
    return matched


def _stem(path: object) -> str:
    name = str(path).replace("\\", "/").rsplit("/", 1)[-1]
    ending = next((end for end in _ENDINGS if name.endswith(end)), "")
    return name.removesuffix(ending)
