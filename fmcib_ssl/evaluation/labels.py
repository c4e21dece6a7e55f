"""Labels from the columns of a table of lesions, and tables of labels that are joined to it."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.data.tables import read_table, text_of
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.metrics import Kind
from fmcib_ssl.types import UserError

Array = npt.NDArray[Any]

MAX_CLASSES = 50

_COMPARISONS = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


class EvaluationError(UserError, ValueError):
    """Something that cannot be evaluated as asked for; the message says what to do."""


@dataclass(frozen=True)
class Labels:
    """The label of every lesion that has one.

    Attributes:
        name: as it stands in tables, such as `texture<5`.
        kind: what is predicted.
        values: `(n,)` class numbers or values; for survival `(n, 2)`: time, and 1 where the event was seen.
        rows: which rows of the lesions' table these are.
        classes: the names of the class numbers; empty unless the labels are classes.
    """

    name: str
    kind: Kind
    values: Array
    rows: Array
    classes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """0 unless the labels are classes."""
        return len(self.classes)


def read_labels(
    lesions: pd.DataFrame,
    kind: Kind,
    *,
    label: str | None = None,
    threshold: str | None = None,
    time: str | None = None,
    event: str | None = None,
) -> Labels:
    """Labels of the rows that have one; empty cells are left out.

    Args:
        lesions: one row a lesion.
        kind: what is predicted.
        label: the column; of survival a name only.
        threshold: of binary labels: `<5` makes 1 what is below 5, and so on with `<=`, `>`, `>=`, `==`, `!=`.
        time: of survival: the column with the time to the event or to the last that is known.
        event: of survival: the column that is 1 or true where the event was seen.

    Raises:
        EvaluationError: no such column, or values that are no such labels.
    """
    if kind == "survival":
        if time is None or event is None:
            raise EvaluationError(
                "survival needs two columns: time= to the event or the last contact, and event= 0 or 1"
            )
        times, events = _numbers(lesions, time), _truths(lesions, event)
        rows = np.flatnonzero(np.isfinite(times) & np.isfinite(events))
        if (times[rows] < 0).any():
            raise EvaluationError(f"{time!r} holds times below 0; they are counted from the scan or the diagnosis")
        values = np.stack([times, events], axis=1)[rows]
        return _checked(Labels(label or time, kind, values, rows))
    if label is None:
        raise EvaluationError("label= names the column to predict")
    if threshold is not None and kind != "binary":
        raise EvaluationError(f"threshold={threshold} makes two classes; it goes with task=binary, not {kind}")
    if kind == "binary" and threshold is not None:
        sign, limit = _parse(threshold)
        numbers = _numbers(lesions, label)
        rows = np.flatnonzero(np.isfinite(numbers))
        ones = _COMPARISONS[sign](numbers[rows], limit).astype(np.int64)
        return _checked(Labels(f"{label}{threshold}", kind, ones, rows, (f"not {threshold}", threshold)))
    if kind in ("binary", "multiclass"):
        column = _column(lesions, label)
        rows = np.flatnonzero(column.notna().to_numpy())
        names, numbers = np.unique(column.iloc[rows].to_numpy(), return_inverse=True)
        if kind == "binary" and len(names) != 2:
            raise EvaluationError(
                f"{label!r} has {len(names)} different values, {_some(names)}; binary labels have two: give "
                "threshold=, such as threshold='>3', or task=multiclass"
            )
        if len(names) > MAX_CLASSES:
            raise EvaluationError(f"{label!r} has {len(names)} different values; is it task=continuous?")
        return _checked(Labels(label, kind, numbers, rows, tuple(map(str, names))))
    numbers = _numbers(lesions, label)
    rows = np.flatnonzero(np.isfinite(numbers))
    if kind == "ordinal" and (numbers[rows] % 1 != 0).any():
        raise EvaluationError(f"{label!r} holds fractions; grades are whole numbers: task=continuous?")
    return _checked(Labels(label, kind, numbers[rows], rows))


def join_labels(lesions: pd.DataFrame, table: Path, on: str = ID_COLUMN) -> tuple[pd.DataFrame, int]:
    """The lesions with the columns of another table; where both have one, that table's stands.

    Args:
        lesions: one row a lesion.
        table: CSV or Parquet.
        on: the column that both share, or `OURS:THEIRS`.

    Returns:
        The rows of the lesions, and how many of them the table does not have; their cells are empty.

    Raises:
        EvaluationError: no such column, no lesion in common, or a lesion that is in the table twice.
    """
    ours, _, theirs = on.partition(":")
    theirs = theirs or ours
    rows = pd.read_parquet(table) if table.suffix == ".parquet" else read_table(table)
    _column(lesions, ours)
    if theirs not in rows:
        raise EvaluationError(f"{table} has no column {theirs!r}; it has {', '.join(map(repr, rows))}; see labels_on=")
    rows = rows[rows[theirs].notna()]
    keys = text_of(rows[theirs])
    if (doubled := keys[keys.duplicated()]).size:
        raise EvaluationError(f"{table}: {theirs} {doubled.iloc[0]!r} is there twice ({doubled.nunique()} such values)")
    places = pd.Index(keys).get_indexer(pd.Index(text_of(lesions[ours]).fillna("")))
    if (places < 0).all():
        raise EvaluationError(
            f"no {ours} of the features is a {theirs} of {table}: {_some(lesions[ours])} against {_some(keys)}"
        )
    there = rows.reindex(np.where(places < 0, -1, rows.index.to_numpy()[places])).set_axis(lesions.index)
    new = there[[name for name in rows if name not in (theirs, ID_COLUMN)]]
    return lesions.drop(columns=[name for name in new if name in lesions]).join(new), int((places < 0).sum())


def column_text(lesions: pd.DataFrame, name: str, option: str) -> Array:
    """A column as text, which may have no empty cell.

    Raises:
        EvaluationError: no such column, or an empty cell.
    """
    column = _column(lesions, name, option)
    if column.isna().any():
        raise EvaluationError(f"{name!r} is empty for {int(column.isna().sum())} lesions that have a label")
    return text_of(column).to_numpy(dtype=object).astype(str)


def _column(lesions: pd.DataFrame, name: str, option: str = "label") -> pd.Series[Any]:
    if name not in lesions:
        raise EvaluationError(f"{option}={name}: there is no such column; there is {', '.join(map(str, lesions))}")
    return lesions[name]


def _numbers(lesions: pd.DataFrame, name: str) -> Array:
    column = _column(lesions, name)
    numbers = pd.to_numeric(column, errors="coerce")
    if (wrong := column[numbers.isna() & column.notna()]).size:
        raise EvaluationError(f"{name!r} should hold numbers; {len(wrong)} are not, such as {str(wrong.iloc[0])!r}")
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _truths(lesions: pd.DataFrame, name: str) -> Array:
    column = _column(lesions, name)
    told = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}
    text = column.astype(str).str.strip().str.lower()
    if (wrong := column[~text.isin(list(told)) & column.notna()]).size:
        raise EvaluationError(f"{name!r} should be 0 or 1, true or false; it is {wrong.iloc[0]} in {len(wrong)} rows")
    return text.map(told).to_numpy(dtype=np.float64)


def _parse(threshold: str) -> tuple[str, float]:
    match = re.fullmatch(r"\s*(<=|>=|==|!=|<|>)\s*(-?[\d.]+(?:e-?\d+)?)\s*", threshold)
    if match is None:
        raise EvaluationError(f"threshold={threshold!r} should be a comparison such as '<5' or '>=3'")
    return match[1], float(match[2])


def _checked(labels: Labels) -> Labels:
    what = labels.values[:, 1] if labels.kind == "survival" else labels.values
    if len(np.unique(what)) < 2 and not (labels.kind == "survival" and what.any()):
        raise EvaluationError(f"{labels.name!r}: {len(what)} lesions have a label, and it is the same for all of them")
    return labels


def _some(values: Any) -> str:
    shown = [repr(str(value)) for value in list(values)[:4]]
    return ", ".join(shown) + (" ..." if len(values) > 4 else "")
