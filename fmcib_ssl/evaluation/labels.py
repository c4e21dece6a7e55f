"""Who is labelled how, and who is trained on and tested: labels from columns, splits and folds of patients."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from fmcib_ssl.data import read_table, text_of
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, some_of
from fmcib_ssl.evaluation.metrics import Kind
from fmcib_ssl.types import Array, UserError

if TYPE_CHECKING:
    from fmcib_ssl.evaluation.readers import Readers

#: More different values than this are no classes.
_MAX_CLASSES = 50
#: Classes into which values are cut to be stratified.
_NUM_STRATA = 5
_COMPARISONS = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_SIDES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val", "tune": "val"}


class EvaluationError(UserError, ValueError):
    """Something that cannot be evaluated as asked for; the message says what to do."""


@dataclass(frozen=True)
class Labels:
    """The label of every lesion that has one.

    Attributes:
        name: in tables of results, such as `texture<5`.
        kind: decides probes and metrics.
        values: `(n,)` class numbers or values; for survival `(n, 2)`: time, and 1 where the event was seen.
        rows: which rows of the lesions' table these are.
        classes: the names of the class numbers; empty unless the labels are classes.
        readers: what made the labels of ratings, of all rows of the table; None for a label of its own column.
    """

    name: str
    kind: Kind
    values: Array
    rows: Array
    classes: tuple[str, ...] = ()
    readers: Readers | None = None

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
        kind: decides which options are needed and how cells are read.
        label: the column; of survival a name only.
        threshold: of binary labels: `<5` makes 1 what is below 5, and so on with `<=`, `>`, `>=`, `==`, `!=`.
        time: of survival: the column with the time to the event or to the last that is known.
        event: of survival: the column that is 1 or true where the event was seen.

    Raises:
        EvaluationError: no such column, or values that are no such labels.
    """
    classes: tuple[str, ...] = ()
    if kind == "survival":
        if time is None or event is None:
            raise EvaluationError(
                "survival needs two columns: time= to the event or the last contact, and event= 0 or 1"
            )
        name, values = label or time, np.stack([_numbers(lesions, time), _numbers(lesions, event, truths=True)], axis=1)
        if (values[:, 0] < 0).any():
            raise EvaluationError(f"{time!r} has negative times; count them from the scan or the diagnosis")
    elif label is None:
        raise EvaluationError("label= names the column to predict")
    elif threshold is not None and kind != "binary":
        raise EvaluationError(f"threshold={threshold} makes two classes; it goes with task=binary, not {kind}")
    elif kind == "multiclass" or (kind == "binary" and threshold is None):
        codes, uniques = pd.factorize(_column(lesions, label).astype(object), sort=True)
        name, values, classes = label, np.where(codes < 0, np.nan, codes), tuple(map(str, uniques))
        if kind == "binary" and len(classes) != 2:
            raise EvaluationError(
                f"{label!r} has {len(classes)} different values, {some_of(classes)}; binary labels have two: give "
                "threshold=, such as threshold='>3', or task=multiclass"
            )
        if len(classes) > _MAX_CLASSES:
            raise EvaluationError(f"{label!r} has {len(classes)} different values; is it task=continuous?")
    else:
        name, values = label, _numbers(lesions, label)
        if kind == "ordinal" and (values[np.isfinite(values)] % 1 != 0).any():
            raise EvaluationError(f"{label!r} holds fractions; grades are whole numbers: task=continuous?")
        if threshold is not None:
            values = passes(values, threshold)
            name, classes = f"{label}{threshold}", (f"not {threshold}", threshold)
    rows = np.flatnonzero(np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    values = values[rows].astype(np.int64) if classes else values[rows]
    outcomes = values[:, 1] if kind == "survival" else values
    if len(np.unique(outcomes)) < 2 and not (kind == "survival" and outcomes.any()):
        raise EvaluationError(f"{name!r}: {len(outcomes)} lesions have a label, and it is the same for all of them")
    return Labels(name, kind, values, rows, classes)


def passes(values: Array, threshold: str) -> Array:
    """1 where a value meets a comparison such as `<5`, 0 where not, NaN where there is none.

    Raises:
        EvaluationError: the threshold is no comparison.
    """
    match = re.fullmatch(r"\s*(<=|>=|==|!=|<|>)\s*(-?[\d.]+(?:e-?\d+)?)\s*", threshold)
    if match is None:
        raise EvaluationError(f"threshold={threshold!r} should be a comparison such as '<5' or '>=3'")
    return np.where(np.isfinite(values), _COMPARISONS[match[1]](values, float(match[2])), np.nan)


def join_labels(lesions: pd.DataFrame, table: Path, on: str = ID_COLUMN) -> tuple[pd.DataFrame, int]:
    """The lesions with the columns of another table; where both have one, that table's stands.

    Args:
        lesions: one row a lesion.
        table: CSV or Parquet.
        on: the column that both share, or `OURS:THEIRS`.

    Returns:
        The rows of the lesions, and how many of them the table does not have; their cells are empty.

    Raises:
        EvaluationError: no such column, no lesion in common, or a duplicate in the table.
    """
    ours, _, theirs = on.partition(":")
    theirs = theirs or ours
    rows = pd.read_parquet(table) if table.suffix == ".parquet" else read_table(table)
    own = text_of(_column(lesions, ours)).fillna("")
    if theirs not in rows:
        raise EvaluationError(f"{table} has no column {theirs!r}; it has {', '.join(map(repr, rows))}; see labels_on=")
    rows = rows[rows[theirs].notna()]
    rows.index = pd.Index(text_of(rows[theirs]))
    if rows.index.has_duplicates:
        doubled = rows.index[rows.index.duplicated()]
        raise EvaluationError(f"{table}: duplicate {theirs} {doubled[0]!r} ({doubled.nunique()} such values)")
    absent = ~own.isin(rows.index)
    if absent.all():
        raise EvaluationError(
            f"no {ours} of the features is a {theirs} of {table}: {some_of(own.tolist())} against {some_of(rows.index)}"
        )
    new = rows.drop(columns=[theirs, ID_COLUMN], errors="ignore").reindex(own).set_axis(lesions.index)
    return lesions.drop(columns=[name for name in new if name in lesions]).join(new), int(absent.sum())


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
        raise EvaluationError(f"{option}={name}: no such column; the columns are {', '.join(map(str, lesions))}")
    return lesions[name]


def _numbers(lesions: pd.DataFrame, name: str, *, truths: bool = False) -> Array:
    column, allowed = _column(lesions, name), "numbers"
    numbers = pd.to_numeric(column, errors="coerce")
    if truths:
        allowed, words = "0 or 1, true or false", column.astype(str).str.strip().str.lower()
        numbers = numbers.fillna(words.map({"true": 1.0, "false": 0.0})).where(lambda n: n.isin((0, 1)))
    if (wrong := column[numbers.isna() & column.notna()]).size:
        raise EvaluationError(f"{name!r} should hold {allowed}; {len(wrong)} do not, such as {str(wrong.iloc[0])!r}")
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


@dataclass(frozen=True, eq=False)
class Split:
    """One training and one testing: row numbers.

    Attributes:
        name: such as "0" for the first fold.
        train: rows that are fitted on.
        test: rows that are scored.
        val: rows by which a probe's setting is chosen; None: folds of the training patients.
    """

    name: str
    train: Array
    test: Array
    val: Array | None = None


def strata(kind: Kind, labels: Array) -> Array:
    """A class number for every row to stratify by: the class, a fifth of the values, or whether the event was seen."""
    if kind == "survival":
        return labels[:, 1].astype(np.int64)
    if kind in ("binary", "multiclass"):
        return np.unique(labels, return_inverse=True)[1]
    return np.searchsorted(np.quantile(labels, np.linspace(0, 1, _NUM_STRATA + 1)[1:-1]), labels)


def grouped_folds(kind: Kind, labels: Array, patients: Array, num_folds: int, seed: int) -> list[tuple[Array, Array]]:
    """Row numbers to fit and to check, no patient on both sides, classes in equal shares.

    There are fewer folds than asked for where a class has fewer patients than that; fifths of grades or values
    need not be in every fold.

    Raises:
        ValueError: a class has fewer than two patients.
    """
    classes = strata(kind, labels)
    per_class = [len(np.unique(patients[classes == k])) for k in np.unique(classes)]
    fewest = min(per_class) if kind in ("binary", "multiclass", "survival") else len(np.unique(patients))
    if len(per_class) < 2 or fewest < 2:
        raise ValueError(
            f"the training rows have {len(per_class)} class(es), the rarest with {fewest} patient(s); two patients of "
            "two classes are needed"
        )
    splitter = StratifiedGroupKFold(min(num_folds, fewest), shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros((len(labels), 1)), classes, patients))


def cross_validation(
    kind: Kind, labels: Array, patients: Array, *, num_folds: int, seed: int = 0, num_repeats: int = 1
) -> list[Split]:
    """Folds of patients; with repeats other ones each time."""
    return [
        Split(str(k) if num_repeats == 1 else f"{repeat}.{k}", train, test)
        for repeat in range(num_repeats)
        for k, (train, test) in enumerate(grouped_folds(kind, labels, patients, num_folds, seed + repeat))
    ]


def given_split(sides: Array) -> Split:
    """The split that a column names: train, test, and optionally val (or tune, valid, validation).

    Raises:
        ValueError: another name, or no row to train or to test on.
    """
    names = np.array([_SIDES.get(str(side).strip().lower(), "") for side in sides])
    if (names == "").any():
        raise ValueError(f"a split names 'train', 'val' and 'test', not {sorted({str(s) for s in sides[names == '']})}")
    train, test, val = (np.flatnonzero(names == name) for name in ("train", "test", "val"))
    if not len(train) or not len(test):
        raise ValueError(f"the split has {len(train)} rows to train and {len(test)} to test on")
    return Split("split", train, test, val if len(val) else None)


def shared_patients(split: Split, patients: Array) -> Array:
    """Patients that stand on more than one side."""
    sides = [np.unique(patients[rows]) for rows in (split.train, split.val, split.test) if rows is not None]
    names, counts = np.unique(np.concatenate(sides), return_counts=True)
    return names[counts > 1]


def without_shared(split: Split, patients: Array) -> Split:
    """The same test rows; what is trained and chosen by loses their patients, and the training those of the choice."""
    apart = ~np.isin(patients, patients[split.test])
    train, val = split.train[apart[split.train]], split.val
    if val is not None:
        val = val[apart[val]]
        train = train[~np.isin(patients[train], patients[val])]
    return replace(split, train=train, val=val if val is not None and len(val) else None)


def nested_share(kind: Kind, labels: Array, patients: Array, rows: Array, *, fraction: float, seed: int = 0) -> Array:
    """Training rows of a share of the training patients; of two shares the smaller is part of the larger.

    Patients of each class are put in a random order and the orders are merged so that every beginning holds the classes
    in about equal shares. A patient is counted with the rarest class that it has.

    Args:
        kind: says what is a class to `strata`.
        labels: one a row of the lesions' table.
        patients: one a row of the lesions' table.
        rows: the training rows.
        fraction: of their patients, above 0 and at most 1.
        seed: 0 or more; the order of the patients follows from it.
    """
    if fraction >= 1:
        return rows
    classes = strata(kind, labels)[rows]
    names, member = np.unique(patients[rows], return_inverse=True)
    rarest = np.full(len(names), -1)
    for number in np.argsort(-np.bincount(classes), kind="stable"):
        rarest[np.unique(member[classes == number])] = number
    rng = np.random.default_rng(seed)
    order = np.empty(len(names))
    for number in np.unique(rarest):
        of_class = rng.permutation(np.flatnonzero(rarest == number))
        order[of_class] = (np.arange(len(of_class)) + rng.random(len(of_class))) / len(of_class)
    chosen = np.argsort(order, kind="stable")[: max(1, round(fraction * len(names)))]
    return rows[np.isin(member, chosen)]
