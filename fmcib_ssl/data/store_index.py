"""What the index of a store must be: names, places and sizes that do not contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

_CENTER = ("center_z", "center_y", "center_x")
#: What rounding may make of a point on the edge of a scan, voxels, and of a point in mm.
_ROUNDING = 0.01
_FARTHEST_VOXEL = 1e6


def is_name(scan_id: str) -> bool:
    """Whether a text may be the name of a scan; one that leads out of the store may not."""
    return bool(scan_id) and scan_id == Path(scan_id).name and scan_id not in (".", "..") and "\0" not in scan_id


def problem_of_scans(scans: pd.DataFrame) -> str | None:
    """What keeps a table from being one of a store's scans, in words."""
    return next(_problems_of_scans(scans), None)


def problem_of_lesions(lesions: pd.DataFrame, scans: pd.DataFrame, spacing_mm: float) -> str | None:
    """What keeps a table from being one of lesions in these scans, in words.

    Args:
        lesions: columns that are not there are not missed here.
        scans: by `scan_id`.
        spacing_mm: edge of the store's voxels.
    """
    return next(_problems_of_lesions(lesions, scans, spacing_mm), None)


def _problems_of_scans(scans: pd.DataFrame) -> Iterator[str]:
    if absent := {"scan_id", "shape_zyx", "origin_lps_mm"} - set(scans):
        yield f"it has no column {', '.join(sorted(absent))}"
        return
    names = scans["scan_id"]
    if not all(isinstance(name, str) and is_name(name) for name in names):
        yield "a scan_id is no name of a scan"
        return
    if names.duplicated().any():
        yield f"duplicate scan_id {names[names.duplicated()].iloc[0]}"
    for column, kinds in (("shape_zyx", "iu"), ("origin_lps_mm", "iuf")):
        values = [np.asarray(value) for value in scans[column]]
        if any(v.shape != (3,) or v.dtype.kind not in kinds or not (np.abs(v) < _FARTHEST_VOXEL).all() for v in values):
            yield f"{column} is not three numbers in every row"
        elif column == "shape_zyx" and any(value.min() < 1 for value in values):
            yield "a scan has no voxels"


def _problems_of_lesions(lesions: pd.DataFrame, scans: pd.DataFrame, spacing_mm: float) -> Iterator[str]:
    for name in (name for name in _CENTER if name in lesions):
        bad = ~(pd.to_numeric(lesions[name], errors="coerce").abs() < _FARTHEST_VOXEL)  # NaN is not below it either
        if bad.any():
            yield f"{name} is {lesions[name][bad].iloc[0]} in {int(bad.sum())} rows, first in the {bad.argmax() + 1}."
            return
    for name in (name for name in ("lesion_id", "row") if name in lesions):
        if (twice := lesions[name].duplicated()).any():
            yield f"duplicate {name} {lesions[name][twice].iloc[0]}"
    if not {"scan_id", *_CENTER} <= set(lesions) or len(lesions) == 0:
        return
    numbers = scans.index.get_indexer(pd.Index(lesions["scan_id"]))
    if (numbers < 0).any():
        yield f"{str(lesions['scan_id'][numbers < 0].iloc[0])[:200]!r} is none of the store's scans"
        return
    centers = lesions[list(_CENTER)].to_numpy(dtype=np.float64)
    shapes = np.stack(scans["shape_zyx"].tolist())[numbers]
    outside = ((centers < -0.5 - _ROUNDING) | (centers > shapes - 0.5 + _ROUNDING)).any(axis=1)
    if outside.any():
        first = int(outside.argmax())
        yield (
            f"{int(outside.sum())} lesions lie outside their scans, the first in row {first + 1} of the index, at "
            f"{centers[first].tolist()} of {shapes[first].tolist()} voxels"
        )
    in_mm = [f"{name}_lps_mm" for name in _CENTER]
    if set(in_mm) <= set(lesions):
        origins = np.stack(scans["origin_lps_mm"].tolist())[numbers, ::-1]
        points = lesions[in_mm].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
        moved = ~(np.abs(centers * spacing_mm + origins - points) < _ROUNDING).all(axis=1)
        if moved.any():
            yield (
                f"of {int(moved.sum())} lesions voxel and point in mm differ, at {spacing_mm:g} mm a voxel, "
                f"the first in row {moved.argmax() + 1} of the index"
            )
