"""Labels of patients, who may have several lesions: their features are pooled before a probe, or by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd

from fmcib_ssl.evaluation.evaluate import Candidates
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.labels import EvaluationError, shared_patients
from fmcib_ssl.evaluation.probes import Inputs, Protocol
from fmcib_ssl.types import Array

Pooling = Literal["mean", "max", "attention"]


def by_patient(
    protocol: Protocol, lesions: pd.DataFrame, candidates: Candidates, pooling: Pooling
) -> tuple[Protocol, pd.DataFrame, Candidates]:
    """The same evaluation with a row a patient; of the size the largest lesion counts, of raw voxels the mean.

    Args:
        protocol: of lesions; all of a patient have one label, and are on one side of each split.
        lesions: one row a lesion, in the order of the protocol.
        candidates: features of these lesions.
        pooling: with `attention` features become `(patients, lesions, dim)`, NaN where a patient has fewer lesions.

    Returns:
        Protocol, table and features; the table has each patient's first lesion, with the patient as `lesion_id`.

    Raises:
        EvaluationError: lesions of a patient with different labels, or on two sides.
    """
    names, first, member = np.unique(protocol.patients, return_index=True, return_inverse=True)
    labels = protocol.labels
    if labels.readers is not None:
        raise EvaluationError("readers= rate lesions; patients= takes a label that all lesions of a patient share")
    differs = (labels.values != labels.values[first][member]).reshape(len(member), -1).any(axis=1)
    if differs.any():
        raise EvaluationError(
            f"{labels.name!r} differs between lesions of patient {str(names[member[differs][0]])!r} and "
            f"{len(np.unique(member[differs])) - 1} others: patients={pooling} takes labels of patients"
        )
    for split in protocol.splits:
        if len(shared := shared_patients(split, protocol.patients)):
            raise EvaluationError(
                f"patient {str(shared[0])!r} is on two sides of the split: patients={pooling} cannot be"
            )
    splits = [
        replace(s, train=np.unique(member[s.train]), test=np.unique(member[s.test]),
                val=None if s.val is None else np.unique(member[s.val]))
        for s in protocol.splits
    ]  # fmt: skip
    order = np.argsort(member, kind="stable")
    starts = np.searchsorted(member[order], np.arange(len(names)))
    place = np.empty_like(member)
    place[order] = np.arange(len(member)) - starts[member[order]]
    inputs = [_pooled(one, pooling, member, place) for one in candidates.inputs]
    pooled = replace(labels, values=labels.values[first], rows=labels.rows[first])
    table = lesions.iloc[first].reset_index(drop=True).assign(**{ID_COLUMN: names.astype(str)})
    return replace(protocol, labels=pooled, patients=names, splits=splits), table, replace(candidates, inputs=inputs)


def _pooled(inputs: Inputs, pooling: Pooling, member: Array, place: Array) -> Inputs:
    bags = np.full((member.max() + 1, place.max() + 1, inputs.x.shape[1]), np.nan)
    bags[member, place] = inputs.x
    if inputs.linear_only:
        return replace(inputs, x=np.nanmax(bags, axis=1))
    if inputs.num_components is not None:  # their columns are a basis of the patches' span: no maximum of voxels
        return replace(inputs, x=np.nanmean(bags, axis=1))
    if pooling == "attention":
        return replace(inputs, x=bags)
    x = (np.nanmean if pooling == "mean" else np.nanmax)(bags, axis=1)
    if inputs.num_beside:
        x[:, -inputs.num_beside :] = np.nanmax(bags[:, :, -inputs.num_beside :], axis=1)
    return replace(inputs, x=x)
