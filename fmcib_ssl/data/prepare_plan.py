"""What there is to do: the scans of a table, what a store has of each already, and which rows can be used.

What is finished is known from the files alone: a scan's JSON file is written last. A scan that cannot be used has a
file `<scan_id>.rejected.json` instead, with its rows and the reasons.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.annotations import LesionTable, ScanReport, check_annotations
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.prepare_scan import checksum, source_files, source_listing
from fmcib_ssl.data.scans import ScanSource
from fmcib_ssl.data.store import SCANS_FOLDER, STORE_VERSION, StoreSettings, sidecar_file
from fmcib_ssl.data.store_files import add_sums, is_whole, scan_problem
from fmcib_ssl.data.tables import BadRowsError, OnBadRow
from fmcib_ssl.io import read_sealed_json, write_sealed_json

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected.csv"
#: Threads that ask the file system for times and sizes: they wait for it, they do not compute.
_NUM_IO_THREADS = 16

Record = dict[str, Any]


class TableScan(NamedTuple):
    """A scan of a table: its name in the store, where it is, places of its rows, and a digest of all that they say."""

    scan_id: str
    source: ScanSource
    places: tuple[int, ...]
    rows: str


def scan_id_of(source: ScanSource, root: Path) -> str:
    """Name of a scan in the store: its own for people, and ten digits that tell it from others of that name.

    A function of the path below `root` and of the series, so that a moved archive keeps its names.
    """
    # Not `resolve`: a link is a name that the user gave.
    path, root = (Path(os.path.abspath(p)) for p in (source.path, root))  # noqa: PTH100
    place = path.relative_to(root) if path.is_relative_to(root) else path
    name = re.sub(r"(\.(nii|img|hdr|nrrd|nhdr|mha|mhd))?(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", plain).strip("._-")[:40] or "scan"
    which = "\n".join([place.as_posix(), source.series_uid or "", *([source.affine] if source.affine else [])])
    digits = hashlib.sha256(which.encode()).hexdigest()[:10]
    return f"{readable}-{digits}"


def lesion_id_of(scan_id: str, center_lps_mm: Sequence[float] | npt.NDArray[np.float64]) -> str:
    """Name of a lesion: twelve digits of its scan and place, the same from a store and from the scans as they are."""
    place = f"{scan_id} {' '.join(f'{v:.3f}' for v in center_lps_mm)}"
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def scans_of(table: LesionTable, image_root: Path | str | None) -> list[TableScan]:
    """The scans of a table in the order of their names, on which alone shards depend."""
    root = Path(image_root) if image_root is not None else table.source.parent
    names = {source: scan_id_of(source, root) for source in set(table.scans) if source is not None}
    places: dict[str, list[int]] = {}
    for place, source in enumerate(table.scans):
        if source is not None:
            places.setdefault(names[source], []).append(place)
    rows = records_of(table.rows)
    scans = []
    for scan_id, own in sorted(places.items()):
        text = json.dumps([table.coordinates, *([int(table.rows.index[i]), rows[i]] for i in own)], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        scans.append(TableScan(scan_id, table.scan_of(own[0]), tuple(own), digest))
    return scans


def scan_states(
    folder: Path, settings: StoreSettings, scans: Sequence[TableScan], *, contents: bool = False
) -> dict[str, str]:
    """What a store has of each scan, by `scan_id`.

    "finished", "rejected", "rows changed" (the voxels can stay), "its files have changed" or "not prepared". A scan
    whose files are gone from their place stays as it is: raw archives are moved to tape.

    Args:
        folder: of the store, which is claimed.
        settings: of the store.
        scans: to look at.
        contents: read what is finished and compare its check sums; else sizes are compared.
    """
    with ThreadPoolExecutor(_NUM_IO_THREADS) as pool:
        states = pool.map(lambda scan: _state(folder, settings, scan, contents), scans)
        shown = tqdm(states, "Checking", len(scans), unit="scan", disable=not contents)
        return dict(zip((scan.scan_id for scan in scans), shown, strict=True))


def _state(folder: Path, settings: StoreSettings, scan: TableScan, contents: bool) -> str:
    file = sidecar_file(folder, scan.scan_id)
    sidecar = read_record(file)
    if not sidecar:
        return "rejected" if read_record(rejection_file(folder, scan)).get("rows") == scan.rows else "not prepared"
    known = (sidecar.get("version"), sidecar.get("settings")) == (STORE_VERSION, asdict(settings))
    if not known or not is_whole(folder, scan.scan_id, sidecar):
        return "not prepared"
    problem = None
    if "sums" not in sidecar["sizes"]:
        problem = add_sums(folder, scan.scan_id, sidecar)
    elif contents:
        problem = scan_problem(folder, scan.scan_id)
    if problem is not None:
        logger.warning("%s is damaged and made anew: %s", file.with_suffix(".b2nd"), problem)
        file.unlink()  # should this run be stopped, the next one need not look again
        return "not prepared"
    try:
        listing = source_listing(scan.source.path)
    except OSError:
        listing = sidecar["source"]["listing"]
    if listing != sidecar["source"]["listing"]:
        if checksum(source_files(scan.source)) != sidecar["source"]["sha256"]:
            return "its files have changed"
        sidecar["source"]["listing"] = listing  # copied, or touched
        write_sealed_json(file, sidecar)
    return "finished" if sidecar["rows"] == scan.rows else "rows changed"


def judge_rows(
    table: LesionTable, scans: Sequence[TableScan], on_bad_row: OnBadRow, folder: Path
) -> tuple[dict[str, list[Record]], dict[str, list[Record]], dict[str, ScanGeometry]]:
    """Tell the rows of some scans that can be used from those that cannot, as far as headers tell.

    Returns:
        By `scan_id`: lesions (`row`, `center_lps_mm`, `columns`), rejected rows, and the scans' geometries.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`; they are in `rejected.csv` then.
    """
    places = sorted(place for scan in scans for place in scan.places)
    if on_bad_row == "refuse":
        places += rows_without_scan(table)
    lesions: dict[str, list[Record]] = {}
    rejected_rows: dict[str, list[Record]] = {}
    if not places:
        return lesions, rejected_rows, {}
    try:
        usable, rejected = check_annotations(
            table.select(places),
            on_bad_row=on_bad_row,
            rejected_csv=folder / REJECTED_FILE if on_bad_row == "refuse" else None,
        )
    except BadRowsError as error:
        if on_bad_row == "refuse" or error.rejected is None:
            raise
        logger.warning("%s", error)  # of these rows none is left; the store may have others
        usable, rejected = table.select(np.zeros(len(table), dtype=bool)), error.rejected
    scan_of_row = {table.rows.index[place]: scan.scan_id for scan in scans for place in scan.places}
    for columns, row, center in zip(records_of(usable.rows), usable.rows.index, usable.centers_lps_mm, strict=True):
        lesion = {"row": int(row), "center_lps_mm": center.tolist(), "columns": columns}
        lesions.setdefault(scan_of_row[row], []).append(lesion)
    for record in records_of(rejected):
        rejected_rows.setdefault(scan_of_row[record["row"]], []).append(record)
    reports = {scan.scan_id: usable.reports.get(scan.source) for scan in scans}
    geometries = {name: report.geometry for name, report in reports.items() if isinstance(report, ScanReport)}
    return lesions, rejected_rows, geometries


def rows_without_scan(table: LesionTable) -> list[int]:
    """Places of rows that name no scan."""
    return [place for place, source in enumerate(table.scans) if source is None]


def rejection_file(folder: Path, scan: TableScan) -> Path:
    """What a store holds of a scan that cannot be used."""
    return folder / SCANS_FOLDER / f"{scan.scan_id}.rejected.json"


def reject(folder: Path, scan: TableScan, rejected: list[Record]) -> None:
    """Leave a scan out of the store, with what is wrong with its rows."""
    # Of an earlier version of its files; of a scan that is gone they may be all that is left, though damaged.
    for suffix in ("json", "cells", "sums", "b2nd") if scan.source.path.exists() else ("json",):
        (folder / SCANS_FOLDER / f"{scan.scan_id}.{suffix}").unlink(missing_ok=True)
    write_sealed_json(rejection_file(folder, scan), {"rows": scan.rows, "rejected": rejected})


def read_record(path: Path) -> Record:
    """What a JSON file of a store says; nothing if there is none that is as it was written."""
    try:
        return read_sealed_json(path)
    except (OSError, ValueError):
        return {}


def records_of(rows: pd.DataFrame) -> list[Record]:
    """Rows as plain values, None where there is none."""
    plain = rows.astype(object)
    return [
        {str(key): value.item() if isinstance(value, np.generic) else value for key, value in record.items()}
        for record in plain.where(plain.notna(), None).to_dict("records")
    ]
