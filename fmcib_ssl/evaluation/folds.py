"""Who is trained on and who is tested: folds of patients, given splits, and nested shares of the labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from fmcib_ssl.evaluation.metrics import Kind

Array = npt.NDArray[Any]

#: Classes into which values are cut to be stratified.
NUM_STRATA = 5


@dataclass(frozen=True)
class Part:
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
    cuts = np.quantile(labels, np.linspace(0, 1, NUM_STRATA + 1)[1:-1])
    return np.searchsorted(cuts, labels)


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
            "two classes are the least"
        )
    splitter = StratifiedGroupKFold(min(num_folds, fewest), shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros((len(labels), 1)), classes, patients))


def cross_validation(
    kind: Kind, labels: Array, patients: Array, *, num_folds: int, seed: int = 0, num_repeats: int = 1
) -> list[Part]:
    """Folds of patients; with repeats other ones each time."""
    return [
        Part(str(k) if num_repeats == 1 else f"{repeat}.{k}", train, test)
        for repeat in range(num_repeats)
        for k, (train, test) in enumerate(grouped_folds(kind, labels, patients, num_folds, seed + repeat))
    ]


def given_split(sides: Array) -> Part:
    """The split that a column names: train, test, and optionally val (or tune, valid, validation).

    Raises:
        ValueError: another name, or no row to train or to test on.
    """
    names = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val", "tune": "val"}
    told = np.array([names.get(str(side).strip().lower(), "") for side in sides])
    if (told == "").any():
        raise ValueError(f"a split names 'train', 'val' and 'test', not {sorted({str(s) for s in sides[told == '']})}")
    rows = {name: np.flatnonzero(told == name) for name in ("train", "val", "test")}
    if not len(rows["train"]) or not len(rows["test"]):
        raise ValueError(f"the split has {len(rows['train'])} rows to train and {len(rows['test'])} to test on")
    return Part("split", rows["train"], rows["test"], rows["val"] if len(rows["val"]) else None)


def shared_patients(part: Part, patients: Array) -> Array:
    """Patients that stand on more than one side."""
    sides = [np.unique(patients[rows]) for rows in (part.train, part.val, part.test) if rows is not None]
    names, counts = np.unique(np.concatenate(sides), return_counts=True)
    return names[counts > 1]


def without_shared(part: Part, patients: Array) -> Part:
    """The same test rows; what is trained and chosen by loses their patients, and the training those of the choice."""
    val = part.val
    if val is not None:
        val = val[~np.isin(patients[val], patients[part.test])]
    train = part.train[~np.isin(patients[part.train], patients[part.test])]
    if val is not None:
        train = train[~np.isin(patients[train], patients[val])]
    return replace(part, train=train, val=val if val is not None and len(val) else None)


def nested_share(kind: Kind, labels: Array, patients: Array, rows: Array, *, fraction: float, seed: int = 0) -> Array:
    """Training rows of a share of the training patients; of two shares the smaller is part of the larger.

    Patients of each class are put in a random order and the orders are merged so that every beginning holds the classes
    in about equal shares. A patient is counted with the rarest class that it has.

    Args:
        kind: of the labels.
        labels: of all rows.
        patients: of all rows.
        rows: the training rows.
        fraction: of their patients, above 0 and at most 1.
        seed: of the order.
    """
    if fraction >= 1:
        return rows
    classes = strata(kind, labels)[rows]
    frequency = np.bincount(classes)
    names, member = np.unique(patients[rows], return_inverse=True)
    rarest = np.full(len(names), -1)
    for number in np.argsort(-frequency, kind="stable"):
        rarest[np.unique(member[classes == number])] = number
    rng = np.random.default_rng(seed)
    place = np.empty(len(names))
    for number in np.unique(rarest):
        of_class = rng.permutation(np.flatnonzero(rarest == number))
        place[of_class] = (np.arange(len(of_class)) + rng.random(len(of_class))) / len(of_class)
    taken = np.argsort(place, kind="stable")[: max(1, round(fraction * len(names)))]
    return rows[np.isin(member, taken)]
