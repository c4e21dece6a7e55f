"""The table of lesions: read it, and find every row that cannot be used before training starts.

A row is a lesion: `image_path, coordX, coordY, coordZ` (mm, or voxel indices), optionally `series_uid` and `modality`;
further columns are kept. A row whose `cropped` is true names a file that holds one lesion and little else: it may be
smaller than a patch, and without a point its centre is taken.
Rows are numbered as in the file, 1 being the first below the header.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry, ras_to_lps
from fmcib_ssl.data.nifti_scans import Affine
from fmcib_ssl.data.scans import ScanSource, read_header, read_scan
from fmcib_ssl.data.tables import (
    REJECTED_COLUMNS,
    AnnotationsError,
    BadRowsError,
    OnBadRow,
    ScanError,
    read_table,
    refuse_or_skip,
    require_columns,
)
from fmcib_ssl.types import Preprocessing

__all__ = [
    "AnnotationsError",
    "BadRowsError",
    "CheckedAnnotations",
    "LesionTable",
    "OnBadRow",
    "check_annotations",
    "read_annotations",
    "resolve_path",
    "scan_source",
]

Coordinates = Literal["lps", "ras", "voxel"]

PATH_COLUMN = "image_path"
COORDINATE_COLUMNS = ("coordX", "coordY", "coordZ")
SERIES_COLUMN = "series_uid"
MODALITY_COLUMN = "modality"
AFFINE_COLUMN = "affine"
MASK_COLUMN = "mask_path"
CROPPED_COLUMN = "cropped"


@dataclass(frozen=True, eq=False)
class LesionTable:
    """Lesions, and what is annotated in their scans.

    Attributes:
        source: the CSV file.
        rows: its columns as they are; the index is the row number in the file.
        scans: for each row its scan; None where the row names none.
        centers_lps_mm: `(lesions, 3)`, x, y, z; NaN where the table has no number. What only the scan's header can
            tell (voxel indices, the middle of a cropped file) is NaN until `check_annotations` has read it.
        coordinates: the frame of `coordX, coordY, coordZ` in `rows`.
        annotated_lps_mm: for each scan *all* known points of the file, also those of rows that were set aside or
            belong to another split: what must not be taken for background.
        annotated_indices: the same for points that wait for `check_annotations`: `(points, 3)`, i, j, k; NaN is the
            middle of the file.
    """

    source: Path
    rows: pd.DataFrame
    scans: tuple[ScanSource | None, ...]
    centers_lps_mm: npt.NDArray[np.float64]
    coordinates: Coordinates
    annotated_lps_mm: dict[ScanSource, npt.NDArray[np.float64]]
    annotated_indices: dict[ScanSource, npt.NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def scan_of(self, index: int) -> ScanSource:
        """The scan of a lesion, by its place in this table."""
        if (scan := self.scans[index]) is None:
            raise BadRowsError(f"{self.source}: row {self.rows.index[index]} names no scan; use check_annotations")
        return scan

    def select(self, keep: npt.ArrayLike) -> LesionTable:
        """The lesions at these places (or of a Boolean mask), with all that is annotated in their scans."""
        places = np.arange(len(self))[np.asarray(keep)]
        return replace(
            self,
            rows=self.rows.iloc[places],
            scans=tuple(self.scans[i] for i in places),
            centers_lps_mm=self.centers_lps_mm[places],
        )


class CheckedAnnotations(NamedTuple):
    """What `check_annotations` found."""

    usable: LesionTable
    rejected: pd.DataFrame  # row, image_path, value, reason, remedy


def read_annotations(
    path: Path | str,
    image_root: Path | str | None = None,
    coordinates: Coordinates = "lps",
    path_prefix: str | None = None,
) -> LesionTable:
    """Read a CSV of lesions. Its rows are not judged here; see `check_annotations`.

    Separated by commas, semicolons or tabs; with or without a byte-order mark; blanks round names are dropped.

    Args:
        path: the CSV file.
        image_root: where relative paths start; the folder of the CSV file by default.
        coordinates: the frame of the points: millimetres in "lps" (DICOM, SimpleITK) or "ras" (nibabel, 3D Slicer's
            panel), or "voxel": indices i, j, k from 0 of the file's own array as SimpleITK and nibabel have it, i
            running fastest; in a DICOM series column, row, slice, the slices in the order of their normal.
        path_prefix: beginning of the paths in the table, to be replaced by `image_root`, for tables made elsewhere.

    Raises:
        AnnotationsError: no file, no text, no rows, rows of unequal length, a column missing, or an `affine` that is
            neither sform nor qform.
    """
    path = Path(path)
    if coordinates not in get_args(Coordinates):
        allowed = ", ".join(map(repr, get_args(Coordinates)))
        raise AnnotationsError(f"coordinates={coordinates!r} is not one of {allowed}")
    rows = read_table(path, text=(PATH_COLUMN, SERIES_COLUMN))
    required = (PATH_COLUMN,) if CROPPED_COLUMN in rows else (PATH_COLUMN, *COORDINATE_COLUMNS)
    hint = f". For points from {MASK_COLUMN}: python scripts/import_annotations.py source=masks"
    require_columns(path, rows, required, hint if MASK_COLUMN in rows else "")
    rows = rows.assign(**{column: np.nan for column in COORDINATE_COLUMNS if column not in rows})
    root = Path(image_root) if image_root is not None else path.parent
    scans = tuple(_scan_sources(rows, root, path_prefix))
    values = _values(rows)
    waiting = values.takes_middle | (values.known & (coordinates == "voxel"))
    centers = ras_to_lps(values.numbers) if coordinates == "ras" else values.numbers.copy()
    if coordinates == "voxel":
        centers[:] = np.nan
    return LesionTable(
        path,
        rows,
        scans,
        centers,
        coordinates,
        annotated_lps_mm=_by_scan(scans, centers, values.known & ~waiting),
        annotated_indices=_by_scan(scans, values.numbers, waiting),
    )


def check_annotations(
    table: LesionTable,
    preprocessing: Preprocessing,
    *,
    on_bad_row: OnBadRow = "refuse",
    check: Literal["headers", "full"] = "headers",
    allow_short_scans: bool = False,
    rejected_csv: Path | str | None = None,
    num_threads: int | None = None,
) -> CheckedAnnotations:
    """Look at every row and every scan, and list all that cannot be used at once.

    Points that need the scan's header (voxel indices, the middle of cropped files) become LPS mm here.

    Args:
        table: what `read_annotations` gave.
        preprocessing: the patch that will be cut.
        on_bad_row: "refuse" raises if there is any bad row; "skip" goes on without them.
        check: "headers" reads the header of each scan once; "full" decodes each scan once and also finds damaged data.
        allow_short_scans: accept a scan that is shorter than the patch along some axis; the rest is padding.
        rejected_csv: where to write the rejected rows, if there are any.
        num_threads: scans read at a time.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`, or no row that can be used.
    """
    outcomes = _inspect_scans(table, check, num_threads)
    values = _values(table.rows)
    table = _with_points_from_headers(table, values, outcomes)
    problems: list[dict[str, object]] = []
    keep = np.ones(len(table), dtype=bool)
    seen: dict[tuple[ScanSource | None, tuple[float, ...]], int] = {}
    for i, (number, scan) in enumerate(zip(table.rows.index, table.scans, strict=True)):
        found = _row_problem(table, i, values, outcomes, None if allow_short_scans else preprocessing)
        key = (scan, tuple(table.centers_lps_mm[i].round(3).tolist()))
        if found is None and (earlier := seen.setdefault(key, number)) != number:
            found = _Problem(
                _coordinates_text(table, i), f"the same scan and point as row {earlier}", "delete one of them"
            )
        if found is not None:
            keep[i] = False
            image_path = str(table.rows[PATH_COLUMN].iloc[i])
            problems.append({"row": number, "image_path": image_path, **found._asdict()})
    rejected = pd.DataFrame(problems, columns=list(REJECTED_COLUMNS))
    refuse_or_skip(rejected, table.source, len(table), on_bad_row, rejected_csv)
    return CheckedAnnotations(table.select(keep), rejected)


class _Problem(NamedTuple):
    value: str
    reason: str
    remedy: str


def _row_problem(
    table: LesionTable,
    i: int,
    values: _Values,
    outcomes: dict[ScanSource, ScanGeometry | ScanError],
    must_hold: Preprocessing | None,
) -> _Problem | None:
    """The first thing that is wrong with a row; `must_hold` is the patch that must fit into the scan."""
    scan, center = table.scans[i], table.centers_lps_mm[i]
    if scan is None:
        return _Problem("", f"{PATH_COLUMN} is empty", f"fill in {PATH_COLUMN}")
    for column, number in zip(COORDINATE_COLUMNS, values.numbers[i], strict=True):
        if np.isnan(number) and not values.takes_middle[i]:
            value = table.rows[column].iloc[i]
            what = "is missing" if pd.isna(value) else "is not a finite number"
            unit = "voxels" if table.coordinates == "voxel" else "millimetres"
            return _Problem(f"{column}={value}", what, f"give coordinates in {unit}, with a decimal point")
    geometry = outcomes[scan]
    if isinstance(geometry, ScanError):
        remedy = geometry.remedy or "repair or leave out the scan"
        if not os.path.exists(scan.path):  # noqa: PTH110  (False for what is no path; `Path.exists` raises)
            remedy = "correct the path, or set image_root (and path_prefix for a table made elsewhere)"
        return _Problem(geometry.path, geometry.reason, remedy)
    if not geometry.contains(center):
        return _outside(table, i, values.numbers[i], geometry)
    if must_hold is not None and not values.cropped[i]:
        patch = PatchGrid((0, 0, 0), must_hold.patch_size_zyx, must_hold.spacing_mm)
        lowest, highest = geometry.bounds_lps_mm()
        for axis, has, needs in zip("xyz", highest - lowest, patch.extent_mm_xyz, strict=True):
            if has < needs - 1e-3:
                return _Problem(
                    f"{has:.1f} mm along {axis}",
                    f"the scan is {has:.1f} mm long along {axis}, the patch {needs:.1f} mm",
                    f"allow_short_scans=true pads with {must_hold.padding_hu} HU; or take a smaller patch",
                )
    return None


def _outside(table: LesionTable, i: int, numbers: npt.NDArray[np.float64], geometry: ScanGeometry) -> _Problem:
    center = table.centers_lps_mm[i]
    if table.coordinates == "voxel":
        size = " x ".join(map(str, geometry.size_xyz))
        remedy = "correct the indices: i, j, k from 0, i along the file's fastest axis"
        if geometry.contains(geometry.to_lps_mm(numbers[::-1])):
            remedy = "swap coordX and coordZ: the indices look like k, j, i"
        return _Problem(_coordinates_text(table, i), f"no voxel of the scan, which has {size}", remedy)
    lowest, highest = (", ".join(f"{v:.1f}" for v in bound) for bound in geometry.bounds_lps_mm())
    reason = (
        f"the point is {geometry.distance_outside_mm(center):.1f} mm outside the scan, which reaches "
        f"from ({lowest}) to ({highest}) LPS mm"
    )
    if geometry.contains(ras_to_lps(center)):
        other = "ras" if table.coordinates == "lps" else "lps"
        return _Problem(
            _coordinates_text(table, i),
            f"{reason}; with x and y negated it is inside: looks like {other.upper()}",
            f"coordinates={other}",
        )
    if (numbers == numbers.round()).all() and geometry.contains(geometry.to_lps_mm(numbers)):
        return _Problem(
            _coordinates_text(table, i), f"{reason}; there is a voxel of these indices", "if so: coordinates=voxel"
        )
    return _Problem(_coordinates_text(table, i), reason, "correct the point; it must be in mm, not in voxels")


def _with_points_from_headers(
    table: LesionTable, values: _Values, outcomes: dict[ScanSource, ScanGeometry | ScanError]
) -> LesionTable:
    """The table with LPS points also where only the scan's geometry gives them."""

    def placed(scan: ScanSource | None, index_xyz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        geometry = None if scan is None else outcomes.get(scan)
        if not isinstance(geometry, ScanGeometry):
            return np.full_like(index_xyz, np.nan)
        middle = (np.array(geometry.size_xyz) - 1) / 2
        return geometry.to_lps_mm(np.where(np.isnan(index_xyz), middle, index_xyz))

    centers = table.centers_lps_mm.copy()
    waiting = values.takes_middle | (values.known & (table.coordinates == "voxel"))
    for i in np.flatnonzero(waiting):
        centers[i] = placed(table.scans[i], values.numbers[i])
    annotated = dict(table.annotated_lps_mm)
    for scan, index_xyz in table.annotated_indices.items():
        if isinstance(outcomes.get(scan), ScanGeometry):
            annotated[scan] = np.concatenate([annotated.get(scan, np.empty((0, 3))), placed(scan, index_xyz)])
    return replace(table, centers_lps_mm=centers, annotated_lps_mm=annotated, annotated_indices={})


def _by_scan(
    scans: Sequence[ScanSource | None], points: npt.NDArray[np.float64], keep: npt.NDArray[np.bool_]
) -> dict[ScanSource, npt.NDArray[np.float64]]:
    found: dict[ScanSource, list[npt.NDArray[np.float64]]] = {}
    for i in np.flatnonzero(keep).tolist():
        if (scan := scans[i]) is not None:
            found.setdefault(scan, []).append(points[i])
    return {scan: np.stack(rows) for scan, rows in found.items()}


class _Values(NamedTuple):
    """What the table says of each row's point, as arrays."""

    numbers: npt.NDArray[np.float64]  # (rows, 3), as they stand in the table; NaN for what is no finite number
    known: npt.NDArray[np.bool_]  # three numbers
    cropped: npt.NDArray[np.bool_]
    takes_middle: npt.NDArray[np.bool_]  # cropped, and no point given


def _values(rows: pd.DataFrame) -> _Values:
    columns = [pd.to_numeric(rows[column], errors="coerce") for column in COORDINATE_COLUMNS]
    numbers = np.stack(columns, axis=1).astype(np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    cropped = np.zeros(len(rows), dtype=bool)
    if CROPPED_COLUMN in rows:
        text = rows[CROPPED_COLUMN].astype(str).str.strip().str.lower()
        cropped = text.isin(("true", "yes", "1", "1.0")).to_numpy(bool)
    blank = rows[list(COORDINATE_COLUMNS)].isna().all(axis=1).to_numpy(bool)
    return _Values(numbers, np.asarray(np.isfinite(numbers).all(axis=1)), cropped, cropped & blank)


def _coordinates_text(table: LesionTable, i: int) -> str:
    return ", ".join(f"{column}={table.rows[column].iloc[i]}" for column in COORDINATE_COLUMNS)


def _inspect_scans(
    table: LesionTable, check: Literal["headers", "full"], num_threads: int | None
) -> dict[ScanSource, ScanGeometry | ScanError]:
    """Geometry of each distinct scan, or why it has none; each is opened once."""

    def inspect(scan: ScanSource) -> ScanGeometry | ScanError:
        try:
            return read_scan(*scan).geometry if check == "full" else read_header(*scan)
        except ScanError as error:
            return error

    scans = sorted({scan for scan in table.scans if scan is not None}, key=str)
    # Headers wait for the disk; decoding fills cores and memory.
    num_cores = os.cpu_count() or 1
    num_threads = num_threads or (min(num_cores, 4) if check == "full" else min(4 * num_cores, 32))
    with ThreadPoolExecutor(num_threads) as pool:
        outcomes = tqdm(
            pool.map(inspect, scans), total=len(scans), desc=f"Checking scans ({check})", unit="scan", disable=None
        )
        return dict(zip(scans, outcomes, strict=True))


def resolve_path(text: Any, root: Path, path_prefix: str | None = None) -> Path | None:
    """Where a path of a table leads: from `root` if it is relative, or if it starts with `path_prefix`.

    Args:
        text: the cell; None for an empty one.
        root: where relative paths start.
        path_prefix: beginning that `root` replaces.
    """
    if pd.isna(text) or not (relative := str(text).strip()):
        return None
    if path_prefix is not None and relative.startswith(path_prefix):
        relative = relative.removeprefix(path_prefix).lstrip("/\\")
    return root / relative


def scan_source(path: Path, row: Mapping[Any, Any]) -> ScanSource:
    """The scan of a row at a path, read as the row's other columns say.

    Raises:
        AnnotationsError: an `affine` that is neither sform nor qform.
    """
    uid, affine = row.get(SERIES_COLUMN), row.get(AFFINE_COLUMN)
    any_modality = str(row.get(MODALITY_COLUMN)).strip().lower() == "any"
    chosen = "" if pd.isna(affine) else str(affine).strip().lower()
    if chosen not in ("", *get_args(Affine)):
        raise AnnotationsError(
            f"column {AFFINE_COLUMN!r} has {affine!r} for {path}; sform, qform or nothing is allowed"
        )
    series_uid = None if pd.isna(uid) else str(uid).strip()
    return ScanSource(path, series_uid, any_modality, cast(Affine, chosen) if chosen else None)


def _scan_sources(rows: pd.DataFrame, root: Path, path_prefix: str | None) -> list[ScanSource | None]:
    columns = [column for column in (PATH_COLUMN, SERIES_COLUMN, MODALITY_COLUMN, AFFINE_COLUMN) if column in rows]
    records = rows[columns].to_dict("records")
    paths = [resolve_path(row[PATH_COLUMN], root, path_prefix) for row in records]
    scans = [None if path is None else scan_source(path, row) for path, row in zip(paths, records, strict=True)]
    waived = {scan[:2] for scan in scans if scan and scan.any_modality}  # one row says so for all of its scan
    return [scan and scan._replace(any_modality=scan[:2] in waived) for scan in scans]
