"""The table of lesions: read it, and find every row that cannot be used before training starts.

A row is a lesion: `image_path, coordX, coordY, coordZ` (mm), optionally `series_uid`; further columns are kept.
Rows are numbered as in the file, 1 being the first below the header.
"""

from __future__ import annotations

import csv
import difflib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry, ras_to_lps
from fmcib_ssl.data.scans import ScanError, ScanSource, read_header, read_scan
from fmcib_ssl.types import Preprocessing

logger = logging.getLogger(__name__)

Coordinates = Literal["lps", "ras"]
OnBadRow = Literal["refuse", "skip"]

PATH_COLUMN = "image_path"
COORDINATE_COLUMNS = ("coordX", "coordY", "coordZ")
SERIES_COLUMN = "series_uid"
#: Rows that an error message shows; the file has them all.
NUM_ROWS_SHOWN = 20


class AnnotationsError(ValueError):
    """The table as a whole cannot be used."""


class BadRowsError(AnnotationsError):
    """Rows that cannot be used; `rejected` has them all: row, image_path, value, reason, remedy."""

    def __init__(self, message: str, rejected: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.rejected = rejected


@dataclass(frozen=True, eq=False)
class LesionTable:
    """Lesions, and what is annotated in their scans.

    Attributes:
        source: the CSV file.
        rows: its columns as they are; the index is the row number in the file.
        scans: for each row its scan; None where the row names none.
        centers_lps_mm: `(lesions, 3)`, x, y, z; NaN where the table has no number.
        coordinates: the frame of `coordX, coordY, coordZ` in `rows`.
        annotated_lps_mm: for each scan *all* known points of the file, also those of rows that were set aside or
            belong to another split: what must not be taken for background.
    """

    source: Path
    rows: pd.DataFrame
    scans: tuple[ScanSource | None, ...]
    centers_lps_mm: npt.NDArray[np.float64]
    coordinates: Coordinates
    annotated_lps_mm: dict[ScanSource, npt.NDArray[np.float64]]

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
        coordinates: the frame of the points, millimetres in LPS (DICOM, SimpleITK) or RAS (NIfTI, 3D Slicer's panel).
        path_prefix: beginning of the paths in the table, to be replaced by `image_root`, for tables made elsewhere.

    Raises:
        AnnotationsError: no file, no text, no rows, rows of unequal length, or a column missing.
    """
    path = Path(path)
    if coordinates not in ("lps", "ras"):
        raise AnnotationsError(f"coordinates={coordinates!r} is not one of 'lps', 'ras'")
    rows = _read_csv(path)
    root = Path(image_root) if image_root is not None else path.parent
    scans = tuple(_scan_sources(rows, root, path_prefix))
    numbers = [pd.to_numeric(rows[column], errors="coerce") for column in COORDINATE_COLUMNS]
    centers = np.stack(numbers, axis=1).astype(np.float64)
    centers[~np.isfinite(centers)] = np.nan
    if coordinates == "ras":
        centers = ras_to_lps(centers)
    known: dict[ScanSource, list[npt.NDArray[np.float64]]] = {}
    for scan, center in zip(scans, centers, strict=True):
        if scan is not None and np.isfinite(center).all():
            known.setdefault(scan, []).append(center)
    annotated = {scan: np.stack(points) for scan, points in known.items()}
    return LesionTable(path, rows, scans, centers, coordinates, annotated)


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
    problems: list[dict[str, object]] = []
    keep = np.ones(len(table), dtype=bool)
    seen: dict[tuple[ScanSource | None, tuple[float, ...]], int] = {}
    for i, (number, scan) in enumerate(zip(table.rows.index, table.scans, strict=True)):
        found = _row_problem(table, i, outcomes, preprocessing, allow_short_scans)
        key = (scan, tuple(table.centers_lps_mm[i].round(3).tolist()))
        if found is None and (earlier := seen.setdefault(key, number)) != number:
            found = _Problem(
                _coordinates_text(table, i), f"the same scan and point as row {earlier}", "delete one of them"
            )
        if found is not None:
            keep[i] = False
            image_path = str(table.rows[PATH_COLUMN].iloc[i])
            problems.append({"row": number, "image_path": image_path, **found._asdict()})
    rejected = pd.DataFrame(problems, columns=["row", "image_path", "value", "reason", "remedy"])
    if len(rejected):
        if rejected_csv is not None:
            rejected.to_csv(rejected_csv, index=False)
        message = _message(table, rejected, rejected_csv)
        if on_bad_row == "refuse":
            raise BadRowsError(f"{message}\nOr go on without these rows: on_bad_row=skip.", rejected)
        if not keep.any():
            raise BadRowsError(f"{message}\nNo row is left.", rejected)
        logger.warning("%s\nGoing on with the other %d rows.", message, keep.sum())
    return CheckedAnnotations(table.select(keep), rejected)


class _Problem(NamedTuple):
    value: str
    reason: str
    remedy: str


def _row_problem(
    table: LesionTable,
    i: int,
    outcomes: dict[ScanSource, ScanGeometry | ScanError],
    preprocessing: Preprocessing,
    allow_short_scans: bool,
) -> _Problem | None:
    """The first thing that is wrong with a row."""
    scan, center = table.scans[i], table.centers_lps_mm[i]
    if scan is None:
        return _Problem("", f"{PATH_COLUMN} is empty", f"fill in {PATH_COLUMN}")
    for column, number in zip(COORDINATE_COLUMNS, center, strict=True):
        if np.isnan(number):
            value = table.rows[column].iloc[i]
            what = "is missing" if pd.isna(value) else "is not a finite number"
            return _Problem(f"{column}={value}", what, "give coordinates in millimetres, with a decimal point")
    geometry = outcomes[scan]
    if isinstance(geometry, ScanError):
        remedy = "repair or leave out the scan"
        if not scan.path.exists():
            remedy = "correct the path, or set image_root (and path_prefix for a table made elsewhere)"
        return _Problem(geometry.path, geometry.reason, remedy)
    if not geometry.contains(center):
        return _outside(table, i, geometry)
    if not allow_short_scans:
        patch = PatchGrid((0, 0, 0), preprocessing.patch_size_zyx, preprocessing.spacing_mm)
        lowest, highest = geometry.bounds_lps_mm()
        for axis, has, needs in zip("xyz", highest - lowest, patch.extent_mm_xyz, strict=True):
            if has < needs - 1e-3:
                return _Problem(
                    f"{has:.1f} mm along {axis}",
                    f"the scan is {has:.1f} mm long along {axis}, the patch {needs:.1f} mm",
                    f"allow_short_scans=true pads with {preprocessing.padding_hu} HU; or take a smaller patch",
                )
    return None


def _outside(table: LesionTable, i: int, geometry: ScanGeometry) -> _Problem:
    center = table.centers_lps_mm[i]
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
    return _Problem(_coordinates_text(table, i), reason, "correct the point; it must be in mm, not in voxels")


def _coordinates_text(table: LesionTable, i: int) -> str:
    return ", ".join(f"{column}={table.rows[column].iloc[i]}" for column in COORDINATE_COLUMNS)


def _inspect_scans(
    table: LesionTable, check: Literal["headers", "full"], num_threads: int | None
) -> dict[ScanSource, ScanGeometry | ScanError]:
    """Geometry of each distinct scan, or why it has none; each is opened once."""

    def inspect(scan: ScanSource) -> ScanGeometry | ScanError:
        try:
            return read_scan(*scan, verify=True).geometry if check == "full" else read_header(*scan)
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


def _message(table: LesionTable, rejected: pd.DataFrame, rejected_csv: Path | str | None) -> str:
    shown = rejected.head(NUM_ROWS_SHOWN)
    lines = [
        f"{table.source}: {len(rejected)} of {len(table)} rows cannot be used (row 1 is the first below the header)"
    ]
    for row, image_path, value, reason, _ in shown.astype(str).to_numpy().tolist():
        shown_value = f"{value}: " if value not in ("", image_path) else ""
        lines.append(f"  row {row}: {image_path}: {shown_value}{reason}")
    if len(rejected) > len(shown):
        where = f"; all are in {rejected_csv}" if rejected_csv is not None else ""
        lines.append(f"  ... and {len(rejected) - len(shown)} more{where}")
    lines += ["What to do:", *(f"  {remedy} ({n} rows)" for remedy, n in rejected["remedy"].value_counts().items())]
    return "\n".join(lines)


def _scan_sources(rows: pd.DataFrame, root: Path, path_prefix: str | None) -> Iterator[ScanSource | None]:
    uids = rows[SERIES_COLUMN] if SERIES_COLUMN in rows else [None] * len(rows)
    for text, uid in zip(rows[PATH_COLUMN], uids, strict=True):
        if pd.isna(text) or not str(text).strip():
            yield None
            continue
        relative = str(text).strip()
        if path_prefix is not None and relative.startswith(path_prefix):
            relative = relative.removeprefix(path_prefix).lstrip("/\\")
        yield ScanSource(root / relative, None if uid is None or pd.isna(uid) else str(uid).strip())


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header_line = file.readline()
            separator = max(",;\t", key=header_line.count)
            names = next(csv.reader([header_line], delimiter=separator), [])
            header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)]
            lengths = [len(row) for row in csv.reader(file, delimiter=separator)]
    except OSError as error:
        raise AnnotationsError(f"{path}: cannot be opened: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationsError(f"{path}: is not a CSV file in UTF-8 ({error}); save it as one") from error
    _require_columns(path, header)
    for row, length in enumerate(lengths, start=1):
        if length not in (0, len(header)):
            raise AnnotationsError(
                f"{path}: row {row} (row 1 is the first below the header) has {length} fields, the header has "
                f"{len(header)}; put values that hold a {separator!r} in double quotes"
            )
    rows = pd.read_csv(
        path,
        sep=separator,
        encoding="utf-8-sig",
        header=0,
        names=header,
        index_col=False,
        skip_blank_lines=False,
        dtype={name: str for name in (PATH_COLUMN, SERIES_COLUMN) if name in header},
    )
    rows.index = pd.RangeIndex(1, len(rows) + 1, name="row")
    rows = rows.dropna(how="all")  # blank lines: they count, so that row + 1 is the line in the file
    if rows.empty:
        raise AnnotationsError(f"{path}: has a header and no rows")
    return rows


def _require_columns(path: Path, header: list[str]) -> None:
    by_lower = {name.lower(): name for name in header}
    missing = []
    for name in (PATH_COLUMN, *COORDINATE_COLUMNS):
        if name not in header:
            close = difflib.get_close_matches(name.lower(), by_lower, 1)
            missing.append(f"{name!r} (rename {by_lower[close[0]]!r}?)" if close else repr(name))
    if missing:
        raise AnnotationsError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(repr, header))}")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise AnnotationsError(f"{path}: has these columns twice: {', '.join(map(repr, doubled))}")
