"""The table of lesions: read it, and find every row that cannot be used before training starts.

A row is a lesion: `image_path, coordX, coordY, coordZ` (mm, or voxel indices), optionally `series_uid` and `modality`;
further columns are kept. A row whose `cropped` is true names a file that holds one lesion and little else: without a
point its centre is taken.
Rows are numbered as in the file, 1 being the first below the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.dicom_files import is_dicom, series_at
from fmcib_ssl.data.geometry import FloatArray, ScanGeometry, ras_to_lps
from fmcib_ssl.data.image_files import Affine
from fmcib_ssl.data.processes import KILLED, run_jobs
from fmcib_ssl.data.scans import HuSummary, ScanSource, read_header, read_scan, source_listing
from fmcib_ssl.data.tables import (
    REJECTED_COLUMNS,
    AnnotationsError,
    BadRowsError,
    OnBadRow,
    read_table,
    refuse_or_skip,
    require_columns,
)
from fmcib_ssl.io import digest_of, num_cores
from fmcib_ssl.types import ScanError

Coordinates = Literal["lps", "ras", "voxel"]
#: How much of a scan is read to find out whether it can be used.
_Check = Literal["headers", "full"]
#: Value, reason and remedy of a row that cannot be used.
_Problem = tuple[str, str, str]

PATH_COLUMN = "image_path"
COORDINATE_COLUMNS = ("coordX", "coordY", "coordZ")
SERIES_COLUMN = "series_uid"
_MODALITY_COLUMN = "modality"
_AFFINE_COLUMN = "affine"
MASK_COLUMN = "mask_path"
CROPPED_COLUMN = "cropped"
#: Up to this many scans are read in this process: starting others takes as long.
_NUM_ALONE = {"headers": 200, "full": 2}
#: Of what makes a scan usable: to be raised when that changes, so that reports in a cache are not used any more.
_RULES = 1


@dataclass(frozen=True)
class ScanReport:
    """A scan that can be used: its geometry, and a summary of its values if it was decoded."""

    geometry: ScanGeometry
    values: HuSummary | None = None


@dataclass(frozen=True, eq=False)
class LesionTable:
    """Lesions, and the scans that they are in.

    Attributes:
        source: the CSV file.
        rows: its columns as they are; the index is the row number in the file.
        scans: for each row its scan; None where the row names none.
        centers_lps_mm: `(lesions, 3)`, x, y, z; NaN where the table has no number. Points that need the
            scan's header (voxel indices, the middle of a cropped file) are NaN until `check_annotations` has read it.
        coordinates: the frame of `coordX, coordY, coordZ` in `rows`.
        reports: by scan, from `check_annotations`: its geometry, or why it cannot be used.
    """

    source: Path
    rows: pd.DataFrame
    scans: tuple[ScanSource | None, ...]
    centers_lps_mm: FloatArray
    coordinates: Coordinates
    reports: Mapping[ScanSource, ScanReport | ScanError] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def scan_of(self, index: int) -> ScanSource:
        """The scan of a lesion, by its position in this table."""
        if (scan := self.scans[index]) is None:
            raise BadRowsError(f"{self.source}: row {self.rows.index[index]} names no scan; use check_annotations")
        return scan

    def select(self, keep: npt.ArrayLike) -> LesionTable:
        """The lesions at these positions, or of a Boolean mask."""
        kept = np.arange(len(self))[np.asarray(keep)]
        scans = tuple(self.scans[i] for i in kept)
        return replace(self, rows=self.rows.iloc[kept], scans=scans, centers_lps_mm=self.centers_lps_mm[kept])


def read_annotations(
    path: Path | str,
    image_root: Path | str | None = None,
    coordinates: Coordinates = "lps",
    path_prefix: str | None = None,
) -> LesionTable:
    """Read a CSV of lesions. Rows are not checked here; see `check_annotations`.

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
    hint = f". For points from {MASK_COLUMN}: fmcib-ssl import-annotations source=masks"
    require_columns(path, rows, required, hint if MASK_COLUMN in rows else "")
    rows = rows.assign(**{column: np.nan for column in COORDINATE_COLUMNS if column not in rows})
    rows = rows.astype({column: float for column in COORDINATE_COLUMNS if rows[column].dtype == "Int64"})
    root = Path(image_root) if image_root is not None else path.parent
    scans = tuple(_scan_sources(rows, root, path_prefix))
    numbers, _ = _points_of(rows)
    if coordinates == "voxel":
        numbers[:] = np.nan
    return LesionTable(path, rows, scans, ras_to_lps(numbers) if coordinates == "ras" else numbers, coordinates)


def check_annotations(
    table: LesionTable,
    *,
    on_bad_row: OnBadRow = "refuse",
    check: _Check = "headers",
    rejected_csv: Path | str | None = None,
    num_workers: int | None = 0,
    cache: Path | None = None,
) -> tuple[LesionTable, pd.DataFrame]:
    """Check every row and every scan, and list all rows that cannot be used together.

    Points that need the scan's header (voxel indices, the middle of cropped files) become LPS mm here.

    Args:
        table: what `read_annotations` gave.
        on_bad_row: "refuse" raises if there is any bad row; "skip" continues without them.
        check: "headers" reads the header of each scan once; "full" decodes each scan once and also finds damaged data.
        rejected_csv: where to write the rejected rows, if there are any.
        num_workers: processes that read scans; 0 reads in this one, None takes all cores where there is work for them.
            A script that asks for processes needs its `if __name__ == "__main__":`.
        cache: JSON lines, one appended as soon as a scan is found usable. A later call does not read that scan again
            unless its files' names, sizes or times, or `check`, have changed. Rejected scans are read again.

    Returns:
        The rows that can be used, and the rejected ones: row, image_path, value, reason, remedy.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`, or no row that can be used.
    """
    reports = inspect_scans({scan for scan in table.scans if scan is not None}, check, num_workers, cache)
    centers, problems = _judged(table, reports)
    table = replace(table, reports=reports, centers_lps_mm=centers)
    first_of: dict[object, int] = {}
    points = (centers.round(3) + 0.0).tolist()  # no minus before a zero
    for i in (i for i in range(len(table)) if i not in problems):
        if (first := first_of.setdefault((table.scans[i], *points[i]), i)) != i:
            reason = f"duplicate lesion: the same scan and point as row {table.rows.index[first]}"
            problems[i] = (_coordinates_text(table, i), reason, "delete one of them")
    paths, numbers = table.rows[PATH_COLUMN].astype(str).tolist(), table.rows.index.tolist()
    records = [(numbers[i], paths[i], *problem) for i, problem in sorted(problems.items())]
    rejected = pd.DataFrame(records, columns=list(REJECTED_COLUMNS))
    refuse_or_skip(rejected, table.source, len(table), on_bad_row, rejected_csv)
    return table.select([i not in problems for i in range(len(table))]), rejected


def inspect_scans(
    scans: Collection[ScanSource], check: _Check, num_workers: int | None = 0, cache: Path | None = None
) -> dict[ScanSource, ScanReport | ScanError]:
    """The geometry of each scan, or why it cannot be used; see `check_annotations`."""
    digests = {scan: _digest(scan, check) for scan in scans} if cache else {}
    reports: dict[ScanSource, ScanReport | ScanError] = {**_cached(cache, digests)} if cache else {}
    todo, num_cached = sorted(set(scans) - reports.keys(), key=str), len(reports)
    if num_workers is None:
        num_workers = num_cores() if len(todo) > _NUM_ALONE[check] else 0
    jobs = run_jobs(partial(_inspect, check), todo, num_workers, _killed)
    progress = tqdm(jobs, f"Checking scans ({check})", len(scans), initial=num_cached, unit="scan", disable=None)
    for scan, report in progress:
        reports[scan] = report
        if cache and digests[scan] and isinstance(report, ScanReport):
            entry = {"path": str(scan.path), "digest": digests[scan], **asdict(report)}
            with cache.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(entry)}")  # on a line of its own, whatever an interrupt left of the last
    return reports


def _digest(scan: ScanSource, check: _Check) -> str:
    """Digest of all that a report depends on, without reading the scan; "" if its files cannot be listed."""
    try:
        return digest_of(_RULES, check, str(scan), source_listing(scan.path))
    except (OSError, ValueError):
        return ""


def _cached(cache: Path, digests: Mapping[ScanSource, str]) -> dict[ScanSource, ScanReport]:
    """Reports of an earlier check, complete or interrupted, on scans that have not changed since."""
    scan_of = {digest: scan for scan, digest in digests.items() if digest}
    reports = {}
    for line in cache.read_text(encoding="utf-8", errors="replace").splitlines() if cache.is_file() else []:
        try:
            entry = json.loads(line)
            scan = scan_of.get(entry["digest"])
        except (ValueError, KeyError):  # torn by an interrupt, or of an earlier version
            continue
        if scan:
            values = HuSummary(*entry["values"]) if entry["values"] else None
            reports[scan] = ScanReport(ScanGeometry.of(*entry["geometry"].values()), values)
    return reports


def _inspect(check: _Check, scan: ScanSource) -> ScanReport | ScanError:
    try:
        if check == "headers":
            return ScanReport(read_header(*scan))
        decoded = read_scan(*scan)
        return ScanReport(decoded.geometry, decoded.summary)
    except ScanError as error:
        return error


def _killed(scan: ScanSource) -> ScanError:
    return ScanError(scan.path, KILLED, "read it on a larger machine, or leave it out")


def _judged(
    table: LesionTable, reports: Mapping[ScanSource, ScanReport | ScanError]
) -> tuple[FloatArray, dict[int, _Problem]]:
    """The lesions' LPS points, including those that need the scan's header, and the first problem of each bad row."""
    numbers, takes_middle = _points_of(table.rows)
    has_point = takes_middle | np.isfinite(numbers).all(axis=1)
    by_header = takes_middle | (has_point & (table.coordinates == "voxel"))
    centers, problems = table.centers_lps_mm.copy(), dict[int, _Problem]()
    for i, scan in enumerate(table.scans):
        if scan is None:
            problems[i] = ("", f"{PATH_COLUMN} is empty", f"fill in {PATH_COLUMN}")
        elif not has_point[i]:
            column = COORDINATE_COLUMNS[int(np.isnan(numbers[i]).argmax())]
            value, unit = table.rows[column].iloc[i], "voxels" if table.coordinates == "voxel" else "millimetres"
            reason = "is missing" if pd.isna(value) else "is not a finite number"
            problems[i] = (f"{column}={value}", reason, f"give coordinates in {unit}, with a decimal point")
    for scan, own in rows_by_scan(table.scans).items():
        report = reports[scan]
        if isinstance(report, ScanError):
            remedy = report.remedy or "repair or leave out the scan"
            if not os.path.exists(scan.path):  # noqa: PTH110  (False for what is no path; `Path.exists` raises)
                remedy = "correct the path, or set image_root (and path_prefix for a table made elsewhere)"
            for i in own.tolist():
                problems.setdefault(i, (report.path, report.reason, remedy))
            continue
        indexed, middle = own[by_header[own]], (np.array(report.geometry.size_xyz) - 1) / 2
        index_xyz = np.where(takes_middle[indexed, None], middle, numbers[indexed])
        centers[indexed] = report.geometry.to_lps_mm(index_xyz)
        for i in own[has_point[own] & ~report.geometry.contains(centers[own])].tolist():
            problems[i] = _outside(table, i, centers[i], numbers[i], report.geometry)
    return centers, problems


def _outside(table: LesionTable, i: int, center: FloatArray, numbers: FloatArray, geometry: ScanGeometry) -> _Problem:
    value = _coordinates_text(table, i)
    if table.coordinates == "voxel":
        size = " x ".join(map(str, geometry.size_xyz))
        remedy = "correct the indices: i, j, k from 0, i along the file's fastest axis"
        if geometry.contains(geometry.to_lps_mm(numbers[::-1])):
            remedy = "swap coordX and coordZ: the indices look like k, j, i"
        return (value, f"no voxel of the scan, which has {size}", remedy)
    lowest, highest = (", ".join(f"{v:.1f}" for v in bound) for bound in geometry.bounds_lps_mm())
    distance_mm = geometry.distance_outside_mm(center)
    reason = f"the point is {distance_mm:.1f} mm outside the scan, which reaches from ({lowest}) to ({highest}) LPS mm"
    if geometry.contains(ras_to_lps(center)):
        other = "ras" if table.coordinates == "lps" else "lps"
        reason += f"; with x and y negated it is inside: looks like {other.upper()}"
        return (value, reason, f"coordinates={other}")
    if (numbers == numbers.round()).all() and geometry.contains(geometry.to_lps_mm(numbers)):
        return (value, f"{reason}; there is a voxel of these indices", "if so: coordinates=voxel")
    return (value, reason, "correct the point; it must be in mm, not in voxels")


def rows_by_scan(scans: Sequence[ScanSource | None]) -> dict[ScanSource, npt.NDArray[np.int64]]:
    """Positions of the rows of each scan."""
    rows: dict[ScanSource, list[int]] = {}
    for i, scan in enumerate(scans):
        if scan is not None:
            rows.setdefault(scan, []).append(i)
    return {scan: np.array(own) for scan, own in rows.items()}


def _points_of(rows: pd.DataFrame) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Points `(rows, 3)` of the table, NaN if not a finite number; and which rows take the middle of their file."""
    columns = [pd.to_numeric(rows[column], errors="coerce").astype(float) for column in COORDINATE_COLUMNS]
    numbers = np.stack(columns, axis=1).astype(np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    blank = rows[list(COORDINATE_COLUMNS)].isna().all(axis=1).to_numpy(bool)
    if CROPPED_COLUMN not in rows:
        return numbers, np.zeros(len(rows), dtype=bool)
    cropped = rows[CROPPED_COLUMN].astype(str).str.strip().str.lower().isin(("true", "yes", "1", "1.0"))
    return numbers, blank & cropped.to_numpy(bool)


def _coordinates_text(table: LesionTable, i: int) -> str:
    return ", ".join(f"{column}={table.rows[column].iloc[i]}" for column in COORDINATE_COLUMNS)


def resolve_path(text: Any, root: Path, path_prefix: str | None = None) -> Path | None:
    """The path that a cell of a table names, None for an empty cell.

    Args:
        text: the cell.
        root: where relative paths start.
        path_prefix: beginning that `root` replaces.
    """
    if pd.isna(text) or not (relative := str(text).strip()):
        return None
    if path_prefix is not None and relative.startswith(path_prefix):
        relative = relative.removeprefix(path_prefix).lstrip("/\\")
    relative = relative.replace("\0", "?")  # not allowed in paths
    if "\\" in relative and not os.path.exists(root / relative):  # noqa: PTH110  (False for what is no path)
        relative = relative.replace("\\", "/")  # a table made on Windows
    return root / relative


def scan_source(path: Path, row: Mapping[Any, Any]) -> ScanSource:
    """The scan of a row at a path, read as the row's other columns say.

    Raises:
        AnnotationsError: an `affine` that is neither sform nor qform.
    """
    uid, affine = row.get(SERIES_COLUMN), row.get(_AFFINE_COLUMN)
    any_modality = str(row.get(_MODALITY_COLUMN)).strip().lower() == "any"
    chosen = "" if pd.isna(affine) else str(affine).strip().lower()
    if chosen not in ("", *get_args(Affine)):
        allowed = "sform, qform or nothing is allowed"
        raise AnnotationsError(f"column {_AFFINE_COLUMN!r} has {affine!r} for {path}; {allowed}")
    series_uid = None if pd.isna(uid) else str(uid).strip()
    return ScanSource(path, series_uid, any_modality, cast(Affine, chosen) if chosen else None)


def _scan_sources(rows: pd.DataFrame, root: Path, path_prefix: str | None) -> list[ScanSource | None]:
    columns = [column for column in (PATH_COLUMN, SERIES_COLUMN, _MODALITY_COLUMN, _AFFINE_COLUMN) if column in rows]
    keys = list(zip(*(rows[column].tolist() for column in columns), strict=True))
    scans: dict[tuple[Any, ...], ScanSource | None] = {}
    for key in dict.fromkeys(keys):  # many rows name the same scan
        row = dict(zip(columns, key, strict=True))
        path = resolve_path(row[PATH_COLUMN], root, path_prefix)
        scans[key] = None if path is None else scan_source(path, row)
    one_source = _one_source_each({scan for scan in scans.values() if scan})
    return [(scan := scans[key]) and one_source[scan] for key in keys]


def _one_source_each(sources: set[ScanSource]) -> dict[ScanSource, ScanSource]:
    """A scan is its resolved path and its series: one source for all rows that name it, also by links or `..`.

    What one row states (series, any modality, affine) holds for all rows of the scan.

    Raises:
        AnnotationsError: rows of one scan that name different affines.
    """
    by_file: dict[str, list[ScanSource]] = {}
    for source in sorted(sources, key=str):
        by_file.setdefault(os.path.realpath(source.path), []).append(source)
    one_source: dict[ScanSource, ScanSource] = {}
    for names in by_file.values():
        differ = len({source.series_uid for source in names}) > 1
        series = {source: _series_of(source) if differ else source.series_uid for source in names}
        for uid in set(series.values()):
            same = [source for source in names if series[source] == uid]
            affines: list[Affine] = sorted({source.affine for source in same if source.affine})
            if len(affines) > 1:
                raise AnnotationsError(f"column 'affine': rows of {same[0].path} say {affines[0]}, others {affines[1]}")
            series_uid = next((source.series_uid for source in same if source.series_uid), None)
            any_modality = any(source.any_modality for source in same)
            one = ScanSource(same[0].path, series_uid, any_modality, affines[0] if affines else None)
            one_source |= dict.fromkeys(same, one)
    return one_source


def _series_of(source: ScanSource) -> str | None:
    """Its series, or the one that would be read if the row names none; None for a file without series."""
    try:
        if not (source.path.is_dir() or is_dicom(source.path)):
            return None
        return source.series_uid or series_at(source.path, None, source.any_modality)[0].series_uid
    except (ScanError, OSError):  # reported when the scan is checked
        return ""
