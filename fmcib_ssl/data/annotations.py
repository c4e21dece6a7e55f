"""The table of lesions: read it, and find every row that cannot be used before training starts.

A row is a lesion: `image_path, coordX, coordY, coordZ` (mm, or voxel indices), optionally `series_uid` and `modality`;
further columns are kept. A row whose `cropped` is true names a file that holds one lesion and little else: without a
point its centre is taken.
Rows are numbered as in the file, 1 being the first below the header.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.dicom_files import is_dicom, series_at
from fmcib_ssl.data.geometry import FloatArray, ScanGeometry, ras_to_lps
from fmcib_ssl.data.image_files import Affine
from fmcib_ssl.data.prepare_scan import source_listing
from fmcib_ssl.data.processes import run_jobs
from fmcib_ssl.data.scans import HuSummary, ScanSource, read_header, read_scan
from fmcib_ssl.data.tables import (
    REJECTED_COLUMNS,
    AnnotationsError,
    BadRowsError,
    OnBadRow,
    read_table,
    refuse_or_skip,
    require_columns,
)
from fmcib_ssl.io import num_cores
from fmcib_ssl.types import ScanError

Coordinates = Literal["lps", "ras", "voxel"]

PATH_COLUMN = "image_path"
COORDINATE_COLUMNS = ("coordX", "coordY", "coordZ")
SERIES_COLUMN = "series_uid"
_MODALITY_COLUMN = "modality"
_AFFINE_COLUMN = "affine"
MASK_COLUMN = "mask_path"
CROPPED_COLUMN = "cropped"


@dataclass(frozen=True, eq=False)
class LesionTable:
    """Lesions, and the scans that they are in.

    Attributes:
        source: the CSV file.
        rows: its columns as they are; the index is the row number in the file.
        scans: for each row its scan; None where the row names none.
        centers_lps_mm: `(lesions, 3)`, x, y, z; NaN where the table has no number. What only the scan's header can
            tell (voxel indices, the middle of a cropped file) is NaN until `check_annotations` has read it.
        coordinates: the frame of `coordX, coordY, coordZ` in `rows`.
        reports: what `check_annotations` found of each scan.
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
        """The scan of a lesion, by its place in this table."""
        if (scan := self.scans[index]) is None:
            raise BadRowsError(f"{self.source}: row {self.rows.index[index]} names no scan; use check_annotations")
        return scan

    def select(self, keep: npt.ArrayLike) -> LesionTable:
        """The lesions at these places, or of a Boolean mask."""
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
    check: Check = "headers",
    rejected_csv: Path | str | None = None,
    num_workers: int | None = 0,
    cache: Path | None = None,
) -> CheckedAnnotations:
    """Look at every row and every scan, and list all that cannot be used at once.

    Points that need the scan's header (voxel indices, the middle of cropped files) become LPS mm here.

    Args:
        table: what `read_annotations` gave.
        on_bad_row: "refuse" raises if there is any bad row; "skip" goes on without them.
        check: "headers" reads the header of each scan once; "full" decodes each scan once and also finds damaged data.
        rejected_csv: where to write the rejected rows, if there are any.
        num_workers: processes that read scans, if there is work for more than seconds; None is all cores. A script that
            asks for them needs its `if __name__ == "__main__":`.
        cache: file that keeps what was found of each scan, so that a later run reads only what has changed.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`, or no row that can be used.
    """
    reports = inspect_scans({s for s in table.scans if s is not None}, check, num_workers=num_workers, cache=cache)
    centers, problems = _judged(table, reports)
    table = replace(table, reports=reports, centers_lps_mm=centers)
    first_of: dict[object, int] = {}
    points = (centers.round(3) + 0.0).tolist()  # no minus before a zero
    for i in (i for i in range(len(table)) if i not in problems):
        if (first := first_of.setdefault((table.scans[i], *points[i]), i)) != i:
            reason = f"the same scan and point as row {table.rows.index[first]}"
            problems[i] = _Problem(_coordinates_text(table, i), reason, "delete one of them")
    paths, numbers = table.rows[PATH_COLUMN].astype(str).tolist(), table.rows.index.tolist()
    records = [(numbers[i], paths[i], *problem) for i, problem in sorted(problems.items())]
    rejected = pd.DataFrame(records, columns=list(REJECTED_COLUMNS))
    refuse_or_skip(rejected, table.source, len(table), on_bad_row, rejected_csv)
    keep = np.ones(len(table), dtype=bool)
    keep[list(problems)] = False
    return CheckedAnnotations(table.select(keep), rejected)


class _Problem(NamedTuple):
    value: str
    reason: str
    remedy: str


def _judged(
    table: LesionTable, reports: Mapping[ScanSource, ScanReport | ScanError]
) -> tuple[FloatArray, dict[int, _Problem]]:
    """The lesions' LPS points, also where only the scan's header gives them, and what is wrong with which row first."""
    numbers, takes_middle = _points_of(table.rows)
    has_point = takes_middle | np.isfinite(numbers).all(axis=1)
    by_header = takes_middle | (has_point & (table.coordinates == "voxel"))
    centers, problems = table.centers_lps_mm.copy(), {}
    for i in (i for i, scan in enumerate(table.scans) if scan is None):
        problems[i] = _Problem("", f"{PATH_COLUMN} is empty", f"fill in {PATH_COLUMN}")
    for i in np.flatnonzero(~has_point).tolist():
        column = COORDINATE_COLUMNS[int(np.isnan(numbers[i]).argmax())]
        value, unit = table.rows[column].iloc[i], "voxels" if table.coordinates == "voxel" else "millimetres"
        reason, remedy = "is not a finite number", f"give coordinates in {unit}, with a decimal point"
        problem = _Problem(f"{column}={value}", "is missing" if pd.isna(value) else reason, remedy)
        problems.setdefault(i, problem)
    for scan, own in places_by_scan(table.scans).items():
        report = reports[scan]
        if isinstance(report, ScanError):
            remedy = report.remedy or "repair or leave out the scan"
            if not os.path.exists(scan.path):  # noqa: PTH110  (False for what is no path; `Path.exists` raises)
                remedy = "correct the path, or set image_root (and path_prefix for a table made elsewhere)"
            for i in own.tolist():
                problems.setdefault(i, _Problem(report.path, report.reason, remedy))
            continue
        waiting, middle = own[by_header[own]], (np.array(report.geometry.size_xyz) - 1) / 2
        index_xyz = np.where(takes_middle[waiting, None], middle, numbers[waiting])
        centers[waiting] = report.geometry.to_lps_mm(index_xyz)
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
        return _Problem(value, f"no voxel of the scan, which has {size}", remedy)
    lowest, highest = (", ".join(f"{v:.1f}" for v in bound) for bound in geometry.bounds_lps_mm())
    distance_mm = geometry.distance_outside_mm(center)
    reason = f"the point is {distance_mm:.1f} mm outside the scan, which reaches from ({lowest}) to ({highest}) LPS mm"
    if geometry.contains(ras_to_lps(center)):
        other = "ras" if table.coordinates == "lps" else "lps"
        reason += f"; with x and y negated it is inside: looks like {other.upper()}"
        return _Problem(value, reason, f"coordinates={other}")
    if (numbers == numbers.round()).all() and geometry.contains(geometry.to_lps_mm(numbers)):
        return _Problem(value, f"{reason}; there is a voxel of these indices", "if so: coordinates=voxel")
    return _Problem(value, reason, "correct the point; it must be in mm, not in voxels")


def places_by_scan(scans: Sequence[ScanSource | None]) -> dict[ScanSource, npt.NDArray[np.int64]]:
    """Places of the rows of each scan."""
    places: dict[ScanSource, list[int]] = {}
    for i, scan in enumerate(scans):
        if scan is not None:
            places.setdefault(scan, []).append(i)
    return {scan: np.array(own) for scan, own in places.items()}


def _points_of(rows: pd.DataFrame) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Points `(rows, 3)` as they stand in the table, NaN for no finite number; which rows take their file's middle."""
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
    """A scan is its resolved path and its series: one source for all rows that name it, by a link or `..` or however.

    What one row says of it (its series, any modality, which affine) holds for all.

    Raises:
        AnnotationsError: rows of one scan that name different affines.
    """
    by_file: dict[str, list[ScanSource]] = {}
    for source in sorted(sources, key=str):
        by_file.setdefault(_resolved(source.path), []).append(source)
    one_name: dict[ScanSource, ScanSource] = {}
    for named in by_file.values():
        scans: dict[str | None, list[ScanSource]] = {}
        has_names = len({source.series_uid for source in named}) > 1
        for source in named:
            scans.setdefault(_series_of(source) if has_names else source.series_uid, []).append(source)
        for same in scans.values():
            affines: list[Affine] = sorted({source.affine for source in same if source.affine})
            if len(affines) > 1:
                raise AnnotationsError(f"column 'affine': rows of {same[0].path} say {affines[0]}, others {affines[1]}")
            one = ScanSource(
                same[0].path,
                next((source.series_uid for source in same if source.series_uid), None),
                any(source.any_modality for source in same),
                affines[0] if affines else None,
            )
            one_name |= dict.fromkeys(same, one)
    return one_name


def _series_of(source: ScanSource) -> str | None:
    """Its series, where a row names none the one that would be read; None for a file that has none."""
    try:
        if not (source.path.is_dir() or is_dicom(source.path)):
            return None
        if source.series_uid is None:
            return series_at(source.path, None, source.any_modality)[0].series_uid
    except (ScanError, OSError, ValueError):  # said when the scan is checked
        return ""
    return source.series_uid


def _resolved(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # what is no path at all; said when the scan is checked
        return str(path)


Check = Literal["headers", "full"]

#: Of what is refused: results kept under another number are not used.
_RULES = 1
#: So long this process works alone, seconds: starting others takes as long.
_ALONE_S = 2.0
#: Scans that a process takes at a time.
_CHUNK_SCANS = {"headers": 32, "full": 4}


@dataclass(frozen=True)
class ScanReport:
    """A scan that can be used, as far as was looked: where it lies, and what its values are if it was decoded."""

    geometry: ScanGeometry
    values: HuSummary | None = None


Result = ScanReport | ScanError


def inspect_scans(
    sources: Collection[ScanSource], check: Check, *, num_workers: int | None = 0, cache: Path | None = None
) -> dict[ScanSource, Result]:
    """What each scan is, or why it cannot be used.

    Args:
        sources: of the scans.
        check: "headers", or "full" to decode each scan.
        num_workers: processes, if there is more work than for seconds; 0 stays in this one, None is all cores. With
            processes a script needs its `if __name__ == "__main__":`.
        cache: file of results, to which new ones are added at once; a scan whose files have not changed is not read
            again.
    """
    todo = sorted(set(sources), key=str)
    listings = {source: _listing(source) for source in todo} if cache else {}
    results = _read_cache(cache, listings, check) if cache else {}
    todo = [source for source in todo if source not in results]
    chunks = [todo[i : i + _CHUNK_SCANS[check]] for i in range(0, len(todo), _CHUNK_SCANS[check])]
    num_workers = num_cores() if num_workers is None else num_workers
    with tqdm(total=len(todo), desc=f"Checking scans ({check})", disable=None, unit="scan") as progress:
        for source, result in _inspected(check, chunks, num_workers):
            results[source] = result
            progress.update()
            if cache and listings[source]:
                _add_to_cache(cache, source, check, listings[source], result)
    return results


def _inspected(
    check: Check, chunks: Sequence[Sequence[ScanSource]], num_workers: int
) -> Iterator[tuple[ScanSource, Result]]:
    """Each scan with its result, in the order in which they are done."""
    began, alone = time.monotonic(), 0
    while alone < len(chunks) and (num_workers < 2 or time.monotonic() - began < _ALONE_S):
        yield from zip(chunks[alone], _inspect_chunk(check, chunks[alone]) or (), strict=True)
        alone += 1
    again: list[ScanSource] = []
    for chunk, results in run_jobs(partial(_inspect_chunk, check), chunks[alone:], num_workers, lambda _: None):
        if results is not None:
            yield from zip(chunk, results, strict=True)
        elif len(chunk) > 1:  # one of them killed its process
            again += chunk
        else:
            reason = "the process that read it was killed twice: most likely there is too little memory"
            yield chunk[0], ScanError(chunk[0].path, reason, "read it on a larger machine, or leave it out")
    if again:
        yield from _inspected(check, [[source] for source in again], num_workers)


def _inspect_chunk(check: Check, sources: Sequence[ScanSource]) -> list[Result] | None:
    return [_inspect(check, source) for source in sources]


def _inspect(check: Check, source: ScanSource) -> Result:
    try:
        if check == "headers":
            return ScanReport(read_header(*source))
        scan = read_scan(*source)
        return ScanReport(scan.geometry, scan.summary)
    except ScanError as error:
        return error


def _listing(source: ScanSource) -> str:
    """What the scan's files look like, or nothing if they cannot be looked at."""
    try:
        return f"{_RULES} {source_listing(source.path)}"
    except (OSError, ValueError):
        return ""


def _read_cache(cache: Path, listings: dict[ScanSource, str], check: Check) -> dict[ScanSource, Result]:
    """Results of scans whose files have not changed since, and that were read as far as they are to be."""
    known: dict[ScanSource, Result] = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else []:
        try:
            entry = json.loads(line)
            path, *how = entry["source"]
            source = ScanSource(Path(path), *how)
            if listings.get(source) != entry["listing"] or not (entry["error"] or check in ("headers", entry["check"])):
                continue
            if entry["error"]:
                known[source] = ScanError(*entry["error"])
            else:
                values = HuSummary(**entry["values"]) if entry["values"] else None
                known[source] = ScanReport(ScanGeometry.of(*entry["geometry"].values()), values)
        except (ValueError, KeyError, TypeError):  # cut off by an interrupt, or of another version
            continue
    return known


def _add_to_cache(cache: Path, source: ScanSource, check: Check, listing: str, result: Result) -> None:
    entry: dict[str, Any] = {"source": [str(source.path), *source[1:]], "check": check, "listing": listing}
    if isinstance(result, ScanError):
        entry["error"] = [result.path, result.reason, result.remedy]
    else:
        entry |= {"error": None, **dataclasses.asdict(result)}
    with cache.open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(entry)}")  # after whatever an interrupt has left
