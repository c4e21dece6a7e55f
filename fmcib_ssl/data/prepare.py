"""A table of lesions into a store: all cores on the scans that are still to do, and the index at the end.

A run may be killed at any moment, and the same command resumes it. The table decides which lesions the index has;
voxels are made anew only where a scan's files have changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.annotations import (
    PATH_COLUMN,
    Coordinates,
    LesionTable,
    ScanReport,
    check_annotations,
    read_annotations,
    rows_by_scan,
)
from fmcib_ssl.data.prepare_scan import ScanTask, TableScan, prepare_scan, reject, rejection_file, scan_id_of, state_of
from fmcib_ssl.data.processes import KILLED, run_jobs
from fmcib_ssl.data.store import StoreError, StoreGrid, StoreSettings
from fmcib_ssl.data.store_files import (
    NUM_IO_THREADS,
    Record,
    claim_store,
    read_record,
    sidecar_file,
    write_index,
    write_settings_file,
)
from fmcib_ssl.data.tables import REJECTED_COLUMNS, BadRowsError, OnBadRow, refuse_or_skip
from fmcib_ssl.io import digest_of, num_cores, write_atomically, write_sealed_json

logger = logging.getLogger(__name__)

_REJECTED_FILE = "rejected.csv"
#: Columns of the lesions' index that are ours; a column of the table by such a name is kept as `table_...`.
_LESION_COLUMNS = (
    "lesion_id", "scan_id", "center_z", "center_y", "center_x",
    "center_x_lps_mm", "center_y_lps_mm", "center_z_lps_mm", "row",
)  # fmt: skip
#: Noisy CTs, which compress least, and their coarse maps take so much for each voxel of the store (docs/prepare.md).
_BYTES_PER_VOXEL = 1.4
#: To decode a voxel of a scan, or to make one of the store, takes so long on a core.
_SECONDS_PER_VOXEL = 2e-8
#: Work of so many seconds this process does alone: starting others takes as long.
_ALONE_S = 5.0


@dataclass(frozen=True)
class Summary:
    """What a run of `prepare` did.

    Attributes:
        store: its folder.
        num_scans: of the table, or of the shard.
        num_made: scans read and written now; the other finished ones existed already.
        num_rejected_scans: scans that cannot be used at all.
        num_lesions: in the index; None after a shard, which writes none.
        rejected: rejected rows of the table: row, image_path, value, reason, remedy.
    """

    store: Path
    num_scans: int
    num_made: int
    num_rejected_scans: int
    num_lesions: int | None
    rejected: pd.DataFrame

    def __str__(self) -> str:
        num_finished = self.num_scans - self.num_rejected_scans
        lines = [
            f"store     {self.store}",
            f"scans     {num_finished} of {self.num_scans} finished, {self.num_made} of them now",
        ]
        if self.num_lesions is not None:
            lines.append(f"lesions   {self.num_lesions} in the index")
        if len(self.rejected):
            where = f"; all in {self.store / _REJECTED_FILE}" if self.num_lesions is not None else ""
            lines.append(f"rejected  {len(self.rejected)} rows; scans as a whole: {self.num_rejected_scans}{where}")
            lines += [f"          {n} x {remedy}" for remedy, n in self.rejected["remedy"].value_counts().items()]
        if self.num_lesions is None:
            lines.append("next      when all shards have run, the same command with merge=true instead of shard=...")
        return "\n".join(lines)


def store_for_table(
    annotations: Path,
    stores: Path,
    settings: StoreSettings,
    *,
    image_root: Path | None = None,
    path_prefix: str | None = None,
    coordinates: Coordinates = "lps",
    on_bad_row: OnBadRow = "skip",
    num_workers: int | None = None,
) -> Summary:
    """Prepare a store for a table in a folder of such stores; one that is finished already is used as it is.

    Its name follows from the places of table and scans and from the settings, so that an edited table updates its
    store. Of processes that ask at the same time the first prepares and the others wait.

    Args:
        annotations: CSV of lesions.
        stores: folder in which each table has a store of its own; made if there is none.
        settings: of the store.
        image_root: where relative paths start; the table's folder by default.
        path_prefix: beginning of the paths in the table that `image_root` replaces.
        coordinates: frame of the points.
        on_bad_row: "refuse" raises if any row of the table cannot be used; "skip" leaves those out.
        num_workers: processes; 0 works in this one; if None as many as cores, where there is work for them.

    Raises:
        AnnotationsError: a table that cannot be used, or bad rows and `on_bad_row="refuse"`.
        StoreError: the store cannot be written, or the disk is too small.
    """
    table = read_annotations(annotations, image_root, coordinates, path_prefix)
    paths = [None if path is None else os.path.abspath(path) for path in (annotations, image_root)]  # noqa: PTH100
    key = digest_of(*paths, path_prefix, coordinates, asdict(settings))[:10]
    folder = stores / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', annotations.stem)}-{key}"
    summary = prepare_store(
        table, folder, settings, image_root=image_root, num_workers=num_workers, on_bad_row=on_bad_row, for_run=True
    )
    if on_bad_row == "refuse":  # what only decoding has shown
        refuse_or_skip(summary.rejected, annotations, len(table), on_bad_row, folder / _REJECTED_FILE)
    return summary


def prepare_store(
    table: LesionTable,
    folder: Path | str,
    settings: StoreSettings | None = None,
    *,
    image_root: Path | str | None = None,
    num_workers: int | None = None,
    shard: tuple[int, int] | None = None,
    merge: bool = False,
    on_bad_row: OnBadRow = "skip",
    for_run: bool = False,
) -> Summary:
    """Bring every scan of a table into a store, or resume what an earlier run left.

    Scans that cannot be used are rejected with the reason, and looked at again by the next run. Processes are started
    afresh: a script that calls this needs its `if __name__ == "__main__":`.

    Args:
        table: what `read_annotations` gave.
        folder: of the store; made if there is none.
        settings: of the store; the defaults if None.
        image_root: what the paths of the table start from, as for `read_annotations`; the scans' names in the store
            depend on what comes below it.
        num_workers: processes; 0 works in this one; if None as many as cores, where there is work for them.
        shard: number, from 1, and total: only this part of the scans, for job arrays; then `merge` makes the index.
        merge: make the index of a store that shards have filled, after a look whether they did all.
        on_bad_row: "refuse" stops before the first scan is read if rows are bad as far as headers tell.
        for_run: a training run starts: another run that has the store is waited for, and of a finished store sizes are
            compared; else it is refused, and all of a finished store is read and compared with its check sums.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`; or nothing at all can be used.
        StoreError: the folder is no store, has other settings, is in use, or cannot be written; to merge, scans are
            missing, or have changed since.
    """
    folder, settings, num_made = Path(folder), settings or StoreSettings(), 0
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise StoreError("shard={0}/{1}: the first of {1} is 1/{1}, there is no {0}".format(*shard))
    with claim_store(folder, settings, shard, wait=for_run) as was_finished:
        scans = _scans_of(table, image_root)
        if shard is not None:
            scans = scans[shard[0] - 1 :: shard[1]]
        states = _states(folder, settings, scans, contents=was_finished and not for_run and not merge)
        unfinished = [scan for scan in scans if states[scan.scan_id] != "finished"]
        if merge:
            _refuse_unfinished(folder, scans, states)
        elif unfinished:
            write_settings_file(folder, settings, complete=False, annotations=str(table.source))
            to_read = []
            for task in _judge_rows(table, unfinished, on_bad_row, folder):
                if not task.lesions:
                    reject(folder, task.scan, task.rejected)
                elif states[task.scan.scan_id] == "rows changed":
                    file = sidecar_file(folder, task.scan.scan_id)
                    write_sealed_json(file, {**read_record(file), **task.sidecar})
                else:
                    to_read.append(task)
            if to_read:
                num_workers = _announce(folder, settings, to_read, num_workers)
                num_made = _prepare(folder, settings, to_read, len(scans), num_workers)
        sidecars = {scan.scan_id: read_record(sidecar_file(folder, scan.scan_id)) for scan in scans}
        rejected = _rejected_rows(table, folder, sidecars, whole=shard is None)
        num_lesions = None
        if shard is None:
            num_lesions = _write_index(folder, settings, table, [s for s in sidecars.values() if s], rejected)
    num_rejected_scans = sum(not sidecar for sidecar in sidecars.values())
    return Summary(folder, len(scans), num_made, num_rejected_scans, num_lesions, rejected)


def _scans_of(table: LesionTable, image_root: Path | str | None) -> list[TableScan]:
    """The scans of a table in the order of their names, on which alone shards depend."""
    root = Path(image_root) if image_root is not None else table.source.parent
    rows, scans = _records_of(table.rows), []
    for source, indices in rows_by_scan(table.scans).items():
        own = [(int(table.rows.index[index]), rows[index]) for index in indices]
        text = json.dumps([table.coordinates, *own], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        scans.append(TableScan(scan_id_of(source, root), source, tuple(indices.tolist()), digest))
    return sorted(scans, key=lambda scan: scan.scan_id)


def _states(
    folder: Path, settings: StoreSettings, scans: Sequence[TableScan], *, contents: bool = False
) -> dict[str, str]:
    """What a store has of each scan, by `scan_id`: see `state_of`."""
    with ThreadPoolExecutor(NUM_IO_THREADS) as pool:
        states = pool.map(lambda scan: state_of(folder, settings, scan, contents=contents), scans)
        shown = tqdm(states, "Checking", len(scans), unit="scan", disable=not contents)
        return dict(zip((scan.scan_id for scan in scans), shown, strict=True))


def _refuse_unfinished(folder: Path, scans: Sequence[TableScan], states: Mapping[str, str]) -> None:
    missing = [scan for scan in scans if states[scan.scan_id] not in ("finished", "rejected")]
    if missing:
        names = "".join(f"\n  {scan.source.path}: {states[scan.scan_id]}" for scan in missing[:10])
        more = f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise StoreError(
            f"{folder}: {len(missing)} of {len(scans)} scans are not finished:{names}{more}\n"
            "Run their shards again (what is finished is kept), or the command without shard and merge"
        )


def _judge_rows(table: LesionTable, scans: Sequence[TableScan], on_bad_row: OnBadRow, folder: Path) -> list[ScanTask]:
    """Tell the rows of some scans that can be used from those that cannot, as far as headers tell.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`; they are in `rejected.csv` then.
    """
    indices = [index for scan in scans for index in scan.indices]
    if on_bad_row == "refuse":
        indices += [index for index, source in enumerate(table.scans) if source is None]
    rejected_csv = folder / _REJECTED_FILE if on_bad_row == "refuse" else None
    try:
        chosen = table.select(sorted(indices))
        usable, rejected = check_annotations(chosen, on_bad_row=on_bad_row, rejected_csv=rejected_csv)
    except BadRowsError as error:
        if on_bad_row == "refuse" or error.rejected is None:
            raise
        logger.warning("%s", error)  # none of these rows can be used; the store may have others
        usable, rejected = table.select(np.zeros(len(table), dtype=bool)), error.rejected
    lesions, bad_rows = defaultdict[Any, list[Record]](list), defaultdict[Any, list[Record]](list)
    for columns, row, source, center in zip(
        _records_of(usable.rows), usable.rows.index, usable.scans, usable.centers_lps_mm.tolist(), strict=True
    ):
        lesions[source].append({"row": int(row), "center_lps_mm": center, "columns": columns})
    source_of_row = dict(zip(table.rows.index, table.scans, strict=True))
    for record in _records_of(rejected):
        bad_rows[source_of_row[record["row"]]].append(record)
    return [
        ScanTask(scan, lesions[scan.source], bad_rows[scan.source], usable.reports.get(scan.source)) for scan in scans
    ]


def _announce(folder: Path, settings: StoreSettings, tasks: Sequence[ScanTask], num_workers: int | None) -> int:
    """Say how much space and time the scans will take; gives the number of processes, if none is chosen.

    Raises:
        StoreError: the disk has not that much space.
    """
    geometries = [task.report.geometry for task in tasks if isinstance(task.report, ScanReport)]
    num_voxels = sum(math.prod(StoreGrid.of(geometry, settings.spacing_mm).shape_zyx) for geometry in geometries)
    num_bytes = num_voxels * _BYTES_PER_VOXEL
    seconds = (num_voxels + sum(math.prod(geometry.size_xyz) for geometry in geometries)) * _SECONDS_PER_VOXEL
    if num_workers is None:
        num_workers = num_cores() if seconds > _ALONE_S else 0
    minutes = seconds / max(num_workers, 1) / 60
    size = f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e8 else f"{num_bytes / 1e6:.1f} MB"
    time_ = f"about {minutes:.0f} minutes" if minutes > 1.5 else "a minute or less"
    logger.info(
        "preparing %d scans: about %s in %s, %s in %d processes if the disk keeps up",
        len(geometries), size, folder, time_, max(num_workers, 1),
    )  # fmt: skip
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise StoreError(
            f"{folder} needs about {size} for {len(geometries)} scans, and its disk has {free / 1e9:.1f} GB free: make "
            "room, choose another folder (store=DIR; of a training run paths.data=DIR), or coarser voxels (spacing_mm)"
        )
    return num_workers


def _prepare(folder: Path, settings: StoreSettings, tasks: Sequence[ScanTask], num_scans: int, num_workers: int) -> int:
    """Prepare scans, and reject those that cannot be used; gives how many were made."""
    finished: list[ScanTask] = []
    with tqdm(
        total=num_scans,
        initial=num_scans - len(tasks),
        desc="Preparing",
        unit="scan",
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 60,  # a line a minute in the log of a batch job
    ) as progress:
        for task, problem in run_jobs(partial(prepare_scan, folder, settings), tasks, num_workers, _killed):
            if problem is None:
                finished.append(task)
            else:
                _reject_scan(folder, task, *problem)
            progress.update()
    # Scans whose files were written while they, or others after them, were read.
    states = _states(folder, settings, [task.scan for task in finished])
    for task in (task for task in finished if states[task.scan.scan_id] == "its files have changed"):
        _reject_scan(
            folder, task, "its files have changed while the store was made", "run the same command again once they stay"
        )
    return len(finished)


def _killed(_task: ScanTask) -> tuple[str, str]:
    return KILLED, "prepare it on a larger machine, or with coarser voxels in another store"


def _reject_scan(folder: Path, task: ScanTask, reason: str, remedy: str) -> None:
    """Reject all rows of a scan: those that were bad by themselves, and the others for what is wrong with the scan."""
    path = str(task.scan.source.path)
    logger.warning("rejected: %s: %s", path, reason)
    values = [(lesion["row"], lesion["columns"][PATH_COLUMN], path, reason, remedy) for lesion in task.lesions]
    reject(folder, task.scan, [*task.rejected, *(dict(zip(REJECTED_COLUMNS, row, strict=True)) for row in values)])


def _rejected_rows(table: LesionTable, folder: Path, sidecars: Mapping[str, Record], *, whole: bool) -> pd.DataFrame:
    """All rejected rows, in the order of the table; those that name no scan only of a whole table."""
    records: list[Record] = []
    for scan_id, sidecar in sidecars.items():
        records += (sidecar or read_record(rejection_file(folder, scan_id)))["rejected"]
    without_scan = [index for index, source in enumerate(table.scans) if whole and source is None]
    if without_scan:
        try:
            check_annotations(table.select(without_scan))
        except BadRowsError as error:
            records += [] if error.rejected is None else _records_of(error.rejected)
    return pd.DataFrame(records, columns=list(REJECTED_COLUMNS)).sort_values("row", ignore_index=True)


def _write_index(
    folder: Path, settings: StoreSettings, table: LesionTable, sidecars: Sequence[Record], rejected: pd.DataFrame
) -> int:
    """Write the index of the finished scans and what was rejected; gives the number of lesions."""
    write_atomically(folder / _REJECTED_FILE, rejected.to_csv(index=False))
    if not sidecars:
        raise BadRowsError(f"{table.source}: no row can be used; see {folder / _REJECTED_FILE}", rejected)
    scans = pd.DataFrame([{**sidecar["scan"], "num_lesions": len(sidecar["lesions"])} for sidecar in sidecars])
    records = [lesion for sidecar in sidecars for lesion in _lesions_of(sidecar)]
    lesions = pd.DataFrame(records)
    for name in lesions.columns[lesions.isna().any()]:  # whole numbers stay whole where some are missing
        values = [record.get(name) for record in records]
        if all(value is None or type(value) is int for value in values) and lesions[name].notna().any():
            lesions[name] = pd.array(values, dtype="Int64")
    digests = write_index(folder, scans, lesions.sort_values("row", ignore_index=True))
    counts = {"num_scans": len(scans), "num_lesions": len(lesions), "num_rejected_rows": len(rejected)}
    write_settings_file(folder, settings, complete=True, annotations=str(table.source), **counts, checked=digests)
    return len(lesions)


def _lesions_of(sidecar: Record) -> list[Record]:
    """A scan's rows of the index."""
    scan = sidecar["scan"]
    grid = StoreGrid(tuple(scan["origin_lps_mm"]), tuple(scan["shape_zyx"]), sidecar["settings"]["spacing_mm"])
    rows = []
    for lesion in sidecar["lesions"]:
        center = np.array(lesion["center_lps_mm"])
        text = f"{scan['scan_id']} {' '.join(f'{value:.3f}' for value in center)}"
        lesion_id = hashlib.sha256(text.encode()).hexdigest()[:12]
        ours = (lesion_id, scan["scan_id"], *grid.to_zyx(center).tolist(), *center.tolist(), lesion["row"])
        columns = {f"table_{k}" if k in _LESION_COLUMNS else k: v for k, v in lesion["columns"].items()}
        rows.append({**dict(zip(_LESION_COLUMNS, ours, strict=True)), **columns})
    return rows


def _records_of(rows: pd.DataFrame) -> list[Record]:
    """Rows as plain values, None where there is none."""
    plain = rows.astype(object)
    return [
        {str(key): value.item() if isinstance(value, np.generic) else value for key, value in record.items()}
        for record in plain.where(plain.notna(), None).to_dict("records")
    ]
