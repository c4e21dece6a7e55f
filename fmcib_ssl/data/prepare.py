"""A table of lesions into a store: all cores on the scans that are still to do, and the index at the end.

A run may be killed at any moment, and the same command resumes it. The table decides which lesions the index has;
voxels are made anew only where a scan's files have changed.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.annotations import PATH_COLUMN, Coordinates, LesionTable, check_annotations, read_annotations
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.prepare_plan import (
    REJECTED_FILE,
    Record,
    TableScan,
    judge_rows,
    lesion_id_of,
    read_record,
    records_of,
    reject,
    rejection_file,
    rows_without_scan,
    scan_states,
    scans_of,
)
from fmcib_ssl.data.prepare_scan import ScanTask, prepare_scan
from fmcib_ssl.data.processes import run_jobs
from fmcib_ssl.data.store import StoreError, StoreGrid, StoreSettings, sidecar_file
from fmcib_ssl.data.store_files import claim_store, write_index, write_settings_file
from fmcib_ssl.data.tables import REJECTED_COLUMNS, BadRowsError, OnBadRow, refuse_or_skip
from fmcib_ssl.io import digest_of, num_cores, write_atomically, write_sealed_json

logger = logging.getLogger(__name__)

#: Columns of the lesions' index that are ours; a column of the table by such a name is kept as `table_...`.
LESION_COLUMNS = (
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
        shard: number and total; None if it was all scans.
        num_scans: of the table, or of the shard.
        num_made: scans read and written now; the other finished ones existed already.
        num_rejected_scans: scans that cannot be used at all.
        num_lesions: in the index; None after a shard, which writes none.
        rejected: rejected rows of the table: row, image_path, value, reason, remedy.
        num_bytes: compressed size of the scans made now.
        seconds: all this took.
    """

    store: Path
    shard: tuple[int, int] | None
    num_scans: int
    num_made: int
    num_rejected_scans: int
    num_lesions: int | None
    rejected: pd.DataFrame
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        num_finished = self.num_scans - self.num_rejected_scans
        lines = [
            f"store     {self.store}" + (", shard {}/{}".format(*self.shard) if self.shard else ""),
            f"scans     {num_finished} of {self.num_scans} finished, {self.num_made} of them now "
            f"({self.num_bytes / 1e6:.0f} MB), in {self.seconds:.0f} s",
        ]
        if self.num_lesions is not None:
            lines.append(f"lesions   {self.num_lesions} in the index")
        if len(self.rejected):
            where = f"; all in {self.store / REJECTED_FILE}" if self.num_lesions is not None else ""
            lines.append(f"rejected  {len(self.rejected)} rows; scans as a whole: {self.num_rejected_scans}{where}")
            lines += [f"          {n} x {remedy}" for remedy, n in self.rejected["remedy"].value_counts().items()]
        if self.shard:
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
    places = [None if path is None else os.path.abspath(path) for path in (annotations, image_root)]  # noqa: PTH100
    key = digest_of(*places, path_prefix, coordinates, asdict(settings))[:10]
    folder = stores / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', annotations.stem)}-{key}"
    summary = prepare_store(
        table,
        folder,
        settings,
        image_root=image_root,
        num_workers=num_workers,
        on_bad_row=on_bad_row,
        compare=False,
        wait=True,
    )
    if on_bad_row == "refuse":  # what only decoding has shown
        refuse_or_skip(summary.rejected, annotations, len(table), on_bad_row, folder / REJECTED_FILE)
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
    compare: bool = True,
    wait: bool = False,
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
        compare: if the store is finished, read all of it and compare check sums; else sizes are compared.
        wait: until another run on the store has ended.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`; or nothing at all can be used.
        StoreError: the folder is no store, has other settings, is in use, or cannot be written; to merge, scans are
            missing, or have changed since.
    """
    began, folder, settings = time.monotonic(), Path(folder), settings or StoreSettings()
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise StoreError("shard={0}/{1}: the first of {1} is 1/{1}, there is no {0}".format(*shard))
    num_made = num_bytes = 0
    with claim_store(folder, settings, shard, wait=wait) as was_finished:
        scans = scans_of(table, image_root)
        if shard is not None:
            scans = scans[shard[0] - 1 :: shard[1]]
        states = scan_states(folder, settings, scans, contents=was_finished and compare and not merge)
        unfinished = [scan for scan in scans if states[scan.scan_id] != "finished"]
        if merge:
            _refuse_unfinished(folder, scans, states)
        elif unfinished:
            write_settings_file(folder, settings, complete=False, annotations=str(table.source))
            lesions, rejected, geometries = judge_rows(table, unfinished, on_bad_row, folder)
            tasks = []
            for scan in unfinished:
                own_lesions, own_rejected = lesions.get(scan.scan_id), rejected.get(scan.scan_id, [])
                sidecar = {"rows": scan.rows, "lesions": own_lesions, "rejected": own_rejected}
                if not own_lesions:
                    reject(folder, scan, own_rejected)
                elif states[scan.scan_id] == "rows changed":
                    file = sidecar_file(folder, scan.scan_id)
                    write_sealed_json(file, {**read_record(file), **sidecar})
                else:
                    tasks.append(ScanTask(scan.scan_id, scan.source, sidecar))
            num_workers = _announce(folder, settings, [geometries[task.scan_id] for task in tasks], num_workers)
            num_made, num_bytes = _run(folder, settings, tasks, scans, num_workers)
            _reject_changed(folder, settings, tasks, scans)
        sidecars = {scan.scan_id: read_record(sidecar_file(folder, scan.scan_id)) for scan in scans}
        rejected_rows = _rejected_rows(table, scans, folder, sidecars, nameless=shard is None)
        num_lesions = None if shard is not None else _finish(folder, settings, table, sidecars, rejected_rows)
    num_rejected_scans = sum(not sidecar for sidecar in sidecars.values())
    seconds = time.monotonic() - began
    return Summary(
        folder, shard, len(scans), num_made, num_rejected_scans, num_lesions, rejected_rows, num_bytes, seconds
    )


def _refuse_unfinished(folder: Path, scans: Sequence[TableScan], states: Mapping[str, str]) -> None:
    missing = [scan for scan in scans if states[scan.scan_id] not in ("finished", "rejected")]
    if missing:
        names = "".join(f"\n  {scan.source.path}: {states[scan.scan_id]}" for scan in missing[:10])
        more = f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise StoreError(
            f"{folder}: {len(missing)} of {len(scans)} scans are not finished:{names}{more}\n"
            "Run their shards again (what is finished is kept), or the command without shard and merge"
        )


def _announce(
    folder: Path, settings: StoreSettings, geometries: Sequence[ScanGeometry], num_workers: int | None
) -> int:
    """Say how much space and time the scans will take; gives the number of processes, if none is chosen.

    Raises:
        StoreError: the disk has not that much space.
    """
    if not geometries:
        return 0
    num_voxels = sum(math.prod(StoreGrid.of(geometry, settings.spacing_mm).shape_zyx) for geometry in geometries)
    num_bytes = num_voxels * _BYTES_PER_VOXEL
    num_decoded = sum(math.prod(geometry.size_xyz) for geometry in geometries)
    seconds = (num_voxels + num_decoded) * _SECONDS_PER_VOXEL
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


def _run(
    folder: Path,
    settings: StoreSettings,
    tasks: Sequence[ScanTask],
    scans: Sequence[TableScan],
    num_workers: int,
) -> tuple[int, int]:
    """Prepare the scans of `tasks`; gives how many were made, and their size in bytes."""
    by_id = {scan.scan_id: scan for scan in scans}
    num_made = num_bytes = num_failed = 0
    with tqdm(
        total=len(scans),
        initial=len(scans) - len(tasks),
        desc="Preparing",
        unit="scan",
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 60,  # a line a minute in the log of a batch job
        disable=not tasks,
    ) as progress:
        for task, outcome in run_jobs(partial(prepare_scan, folder, settings), tasks, num_workers, _killed):
            scan = by_id[task.scan_id]
            if isinstance(outcome, int):
                num_made, num_bytes = num_made + 1, num_bytes + outcome
                rejection_file(folder, scan).unlink(missing_ok=True)
            else:
                num_failed += 1
                logger.warning("rejected: %s: %s", task.source.path, outcome[0])
                reject(folder, scan, _rejected_with_scan(task, *outcome))
            progress.set_postfix(rejected=num_failed, refresh=False)
            progress.update()
    return num_made, num_bytes


def _reject_changed(
    folder: Path, settings: StoreSettings, tasks: Sequence[ScanTask], scans: Sequence[TableScan]
) -> None:
    """Leave out scans whose files were written while they, or others after them, were read."""
    by_id = {task.scan_id: task for task in tasks}
    made = [scan for scan in scans if scan.scan_id in by_id]
    states = scan_states(folder, settings, made)
    for scan in (scan for scan in made if states[scan.scan_id] == "its files have changed"):
        reason = ("its files have changed while the store was made", "run the same command again once they stay")
        logger.warning("rejected: %s: %s", scan.source.path, reason[0])
        reject(folder, scan, _rejected_with_scan(by_id[scan.scan_id], *reason))


def _killed(_task: ScanTask) -> tuple[str, str]:
    reason = "its process was killed twice, the second time alone at work: most likely there is too little memory"
    return reason, "prepare it on a larger machine, or with coarser voxels in another store"


def _rejected_with_scan(task: ScanTask, reason: str, remedy: str) -> list[Record]:
    """All rows of a scan: those that were bad by themselves, and the others for what is wrong with the scan."""
    values = [
        (lesion["row"], lesion["columns"][PATH_COLUMN], str(task.source.path), reason, remedy)
        for lesion in task.sidecar["lesions"]
    ]
    return [*task.sidecar["rejected"], *(dict(zip(REJECTED_COLUMNS, row, strict=True)) for row in values)]


def _rejected_rows(
    table: LesionTable, scans: Sequence[TableScan], folder: Path, sidecars: dict[str, Record], *, nameless: bool
) -> pd.DataFrame:
    """All rejected rows, in the order of the table; those that name no scan only if asked for."""
    records: list[Record] = []
    for scan in scans:
        records += (sidecars[scan.scan_id] or read_record(rejection_file(folder, scan)))["rejected"]
    if nameless and (places := rows_without_scan(table)):
        try:
            check_annotations(table.select(places))
        except BadRowsError as error:
            if error.rejected is not None:
                records += records_of(error.rejected)
    return pd.DataFrame(records, columns=list(REJECTED_COLUMNS)).sort_values("row", ignore_index=True)


def _finish(
    folder: Path, settings: StoreSettings, table: LesionTable, sidecars: dict[str, Record], rejected: pd.DataFrame
) -> int:
    """Write the index and what was rejected; gives the number of lesions."""
    write_atomically(folder / REJECTED_FILE, rejected.to_csv(index=False))
    finished = [sidecar for sidecar in sidecars.values() if sidecar]
    if not finished:
        raise BadRowsError(f"{table.source}: no row can be used; see {folder / REJECTED_FILE}", rejected)
    scans = pd.DataFrame([{**sidecar["scan"], "num_lesions": len(sidecar["lesions"])} for sidecar in finished])
    lesions = _frame([lesion for sidecar in finished for lesion in _lesions_of(sidecar)])
    digests = write_index(folder, scans, lesions.sort_values("row", ignore_index=True))
    counts = {"num_scans": len(scans), "num_lesions": len(lesions), "num_rejected_rows": len(rejected)}
    write_settings_file(folder, settings, complete=True, annotations=str(table.source), **counts, checked=digests)
    return len(lesions)


def _frame(records: list[Record]) -> pd.DataFrame:
    """Records as a table, in which whole numbers stay whole where some are missing."""
    frame = pd.DataFrame(records)
    for name in frame.columns[frame.isna().any()]:
        values = [record.get(name) for record in records]
        if all(value is None or type(value) is int for value in values) and frame[name].notna().any():
            frame[name] = pd.array(values, dtype="Int64")
    return frame


def _lesions_of(sidecar: Record) -> list[Record]:
    """A scan's rows of the index."""
    scan = sidecar["scan"]
    grid = StoreGrid(tuple(scan["origin_lps_mm"]), tuple(scan["shape_zyx"]), sidecar["settings"]["spacing_mm"])
    rows = []
    for lesion in sidecar["lesions"]:
        center = np.array(lesion["center_lps_mm"])
        lesion_id = lesion_id_of(scan["scan_id"], center)
        ours = (lesion_id, scan["scan_id"], *grid.to_zyx(center).tolist(), *center.tolist(), lesion["row"])
        columns = {f"table_{k}" if k in LESION_COLUMNS else k: v for k, v in lesion["columns"].items()}
        rows.append({**dict(zip(LESION_COLUMNS, ours, strict=True)), **columns})
    return rows
