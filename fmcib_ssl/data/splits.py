"""Split lesions by patient: the same share of every label, of scans and of lesions on every side, no patient on two.

Which patient goes where is a function of the seed and of the patients' labels, not of the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.data.annotations import PATH_COLUMN
from fmcib_ssl.data.geometry import FloatArray
from fmcib_ssl.data.tables import AnnotationsError, text_of

#: A numeric label of more values than this is stratified by its quartiles.
_MAX_CLASSES = 10
#: Rounds in which each patient may move to a better side; a few are enough.
_MAX_ROUNDS = 50


def assign_splits(
    rows: pd.DataFrame,
    shares: Mapping[str, float],
    group: str = "PatientID",
    labels: Sequence[str] = (),
    seed: int = 0,
) -> pd.Series[str]:
    """Name a side for every lesion.

    What is counted: patients, lesions, scans, and lesions of each class of each label. Patients are taken in a random
    order, those first that bring the largest part of anything, and each goes to the side whose counts it brings nearest
    to its share, and again until none moves.

    Args:
        rows: one row a lesion.
        shares: the sides and how much of the data each gets, `{"train": 0.7, "val": 0.15, "test": 0.15}`; any positive
            numbers, their sum is made 1.
        group: the column that says which rows must stay together.
        labels: columns to stratify by; an empty cell is a class of its own, and a numeric column of more than
            ten values is cut at its quartiles.
        seed: not negative.

    Returns:
        A side for each row, with the index of `rows`.

    Raises:
        AnnotationsError: rows without a patient, one scan under two patients, fewer patients than
            sides, a side that would be empty.
    """
    if not shares or min(shares.values()) <= 0:
        raise AnnotationsError(f"shares {dict(shares)}: each must be above 0")
    groups = _groups(rows, group)
    names, member = np.unique(groups.to_numpy(dtype=str), return_inverse=True)
    if len(names) < len(shares):
        raise AnnotationsError(f"{len(names)} values of {group!r} cannot fill {len(shares)} sides: {', '.join(shares)}")
    counts = _counts(rows, member, len(names), labels)
    share = np.array(list(shares.values()), dtype=np.float64)
    side = _assign(counts, share / share.sum(), np.random.default_rng(seed))
    result = pd.Series(np.array(list(shares))[side[member]], index=rows.index, dtype=str)
    if empty := [name for name in shares if name not in set(result)]:
        reason = f"its share is too small for {len(names)} values of {group!r}"
        raise AnnotationsError(f"{empty[0]!r} would be empty: {reason}")
    return result


def assign_folds(
    rows: pd.DataFrame, num_folds: int, group: str = "PatientID", labels: Sequence[str] = (), seed: int = 0
) -> pd.Series[int]:
    """Number a fold, 0 to `num_folds - 1`, for every lesion; see `assign_splits`.

    Raises:
        AnnotationsError: as `assign_splits`, and for fewer than two folds.
    """
    if num_folds < 2:
        raise AnnotationsError(f"num_folds={num_folds} must be 2 or more")
    return assign_splits(rows, {str(i): 1.0 for i in range(num_folds)}, group, labels, seed).astype(int)


def describe_splits(
    rows: pd.DataFrame, sides: pd.Series[str] | pd.Series[int], group: str = "PatientID", labels: Sequence[str] = ()
) -> pd.DataFrame:
    """Of each side: patients, scans, lesions, and for each class of each label its share of the lesions."""
    by_side = rows.assign(**{"": sides}).groupby("", sort=False)
    parts = {"patients": by_side[group].nunique(), "lesions": by_side.size()}
    if PATH_COLUMN in rows:
        parts["scans"] = by_side[PATH_COLUMN].nunique()
    for label in labels:
        shares = pd.crosstab(sides, _classes(rows[label]), normalize="index")
        parts |= {f"{label}={name}": shares[name] for name in shares}
    return pd.DataFrame(parts).rename_axis("side")


def _groups(rows: pd.DataFrame, group: str) -> pd.Series[str]:
    """The patient of each row as text; refuses rows without one, and scans with several."""
    groups = text_of(rows[group]).fillna("").str.strip()
    empty = rows.index[groups == ""]
    if len(empty):
        unnamed = f"{len(empty)} rows have no {group!r}, the first is row {empty[0]}"
        raise AnnotationsError(f"{unnamed}; fill it in, or keep scans together with group={PATH_COLUMN}")
    if PATH_COLUMN in rows:
        num_groups = groups.groupby(rows[PATH_COLUMN]).nunique()
        if (num_groups > 1).any():
            scan = num_groups.index[num_groups > 1][0]
            patients = ", ".join(groups[rows[PATH_COLUMN] == scan].unique())
            raise AnnotationsError(f"{scan} is listed under several values of {group!r}: {patients}")
    return groups


def _classes(column: pd.Series[str] | pd.Series[float]) -> pd.Series[str]:
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    if numbers.nunique() > _MAX_CLASSES and (numbers.notna() == column.notna()).all():
        return pd.qcut(numbers, 4, duplicates="drop").astype(str).where(column.notna(), "")
    return text_of(column).fillna("")


def _counts(rows: pd.DataFrame, member: npt.NDArray[np.intp], num_groups: int, labels: Sequence[str]) -> FloatArray:
    """Each patient's fraction of the totals: `(patients, things counted)`."""
    counts = [np.ones(num_groups), np.bincount(member, minlength=num_groups)]
    if PATH_COLUMN in rows:
        scans = pd.Series(rows[PATH_COLUMN].to_numpy()).groupby(member).nunique()
        counts.append(scans.to_numpy(dtype=float))
    for label in labels:
        codes, classes = pd.factorize(_classes(rows[label]), sort=True)
        counts += [np.bincount(member[codes == i], minlength=num_groups) for i in range(len(classes))]
    table: FloatArray = np.stack(counts, axis=1).astype(np.float64)
    table /= table.sum(axis=0)
    return table


def _assign(counts: FloatArray, shares: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """A side for each patient: the one whose squared distance to its share falls most, until none moves."""
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order].max(axis=1), kind="stable")]
    missing = np.repeat(shares[:, None], counts.shape[1], axis=1)
    side = np.full(len(counts), -1)
    for _ in range(_MAX_ROUNDS):
        before = side.copy()
        for i in order:
            if side[i] >= 0:
                missing[side[i]] += counts[i]
            change = ((missing - counts[i]) ** 2 - missing**2).sum(axis=1)
            side[i] = int(np.argmin(change))
            missing[side[i]] -= counts[i]
        if (side == before).all():
            break
    return side
