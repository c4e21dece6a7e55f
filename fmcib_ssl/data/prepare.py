"""A table of lesions into a store: all cores on the scans that are still to do, and the index at the end.

A run may be killed at any moment, and the same command goes on where it stopped. The table decides which lesions the
index has; voxels are made anew only where a scan's files have changed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.data.annotations import PATH_COLUMN, BadRowsError, LesionTable, OnBadRow, check_annotations
from fmcib_ssl.data.jobs import run_jobs
from fmcib_ssl.data.prepare_plan import (
    REJECTED_FILE,
    Record,
    TableScan,
    aside_file,
    judge_rows,
    lesion_id_of,
    nameless_rows,
    read_record,
    records_of,
    scan_states,
    scans_of,
    set_aside,
)
from fmcib_ssl.data.prepare_scan import Outcome, ScanTask, prepare_scan
from fmcib_ssl.data.store import (
    StoreError,
    StoreGrid,
    StoreSettings,
    remove_file,
    sidecar_file,
    write_bytes,
    write_index,
    write_json,
    write_settings_file,
)
from fmcib_ssl.data.store_lock import claim_store
from fmcib_ssl.data.tables import REJECTED_COLUMNS
from fmcib_ssl.io import num_cores
from fmcib_ssl.types import Preprocessing

logger = logging.getLogger(__name__)

#: Columns of the lesions' index that are ours; a column of the table by such a name is kept as `table_...`.
LESION_COLUMNS = (
    "lesion_id", "scan_id", "center_z", "center_y", "center_x",
    "center_x_lps_mm", "center_y_lps_mm", "center_z_lps_mm", "row",
)  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """Part `number` of `total` of the scans, counted from 1."""

    number: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise StoreError(f"shard={self}: the first of {self.total} is 1/{self.total}, there is no {self.number}")

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


@dataclass(frozen=True)
class Summary:
    """What a run of `prepare` did.

    Attributes:
        store: its folder.
        shard: None if it was all scans.
        num_scans: of the table, or of the shard.
        num_made: scans read and written now; the other finished ones were there already.
        num_set_aside: scans that the store has not, because they cannot be used.
        num_lesions: in the index; None after a shard, which writes none.
        rejected: rows of the table that the store has not: row, image_path, value, reason, remedy.
        num_bytes: compressed size of the scans made now.
        seconds: all this took.
    """

    store: Path
    shard: Shard | None
    num_scans: int
    num_made: int
    num_set_aside: int
    num_lesions: int | None
    rejected: pd.DataFrame
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        num_finished = self.num_scans - self.num_set_aside
        lines = [
            f"store     {self.store}" + (f", shard {self.shard}" if self.shard else ""),
            f"scans     {num_finished} of {self.num_scans} finished, {self.num_made} of them now "
            f"({self.num_bytes / 1e6:.0f} MB), in {self.seconds:.0f} s",
        ]
        if self.num_lesions is not None:
            lines.append(f"lesions   {self.num_lesions} in the index")
        if len(self.rejected):
            where = f"; all in {self.store / REJECTED_FILE}" if self.num_lesions is not None else ""
            lines.append(
                f"rejected  {len(self.rejected)} rows; scans set aside as a whole: {self.num_set_aside}{where}"
            )
            lines += [f"          {n} x {remedy}" for remedy, n in self.rejected["remedy"].value_counts().items()]
        if self.shard:
            lines.append("next      when all shards have run, the same command with merge=true instead of shard=...")
        return "\n".join(lines)


def prepare(
    table: LesionTable,
    folder: Path | str,
    settings: StoreSettings | None = None,
    *,
    image_root: Path | str | None = None,
    num_workers: int | None = None,
    shard: Shard | None = None,
    on_bad_row: OnBadRow = "skip",
) -> Summary:
    """Bring every scan of a table into a store, or go on with what an earlier run left.

    Scans that cannot be used are set aside with the reason, and looked at again by the next run. Processes are started
    afresh: a script that calls this needs its `if __name__ == "__main__":`.

    Args:
        table: what `read_annotations` gave.
        folder: of the store; made if it is not there.
        settings: of the store; the defaults if None.
        image_root: what the paths of the table start from, as for `read_annotations`; the scans' names in the store
            depend on what comes below it.
        num_workers: processes; as many as cores if None; 0 does it in this one.
        shard: only this part of the scans, for job arrays; then `merge` makes the index.
        on_bad_row: "refuse" stops before the first scan is read if rows are bad as far as headers tell.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`; or nothing at all can be used.
        StoreError: the folder is no store, has other settings, is in use, or cannot be written.
    """
    began, folder, settings = time.monotonic(), Path(folder), settings or StoreSettings()
    with claim_store(folder, settings, None if shard is None else (shard.number, shard.total)) as was_finished:
        scans = scans_of(table, image_root)
        if shard is not None:
            scans = scans[shard.number - 1 :: shard.total]
        states = scan_states(folder, settings, scans, contents=was_finished)
        unfinished = [scan for scan in scans if states[scan.scan_id] != "finished"]
        if unfinished:
            write_settings_file(folder, settings, complete=False, annotations=str(table.source))
        judged = judge_rows(table, unfinished, on_bad_row, folder)
        tasks = []
        for scan in unfinished:
            lesions, rejected = judged.lesions.get(scan.scan_id), judged.rejected.get(scan.scan_id, [])
            sidecar = {"rows": scan.rows, "lesions": lesions, "rejected": rejected}
            if not lesions:
                set_aside(folder, scan, rejected)
            elif states[scan.scan_id] == "rows changed":
                file = sidecar_file(folder, scan.scan_id)
                write_json(file, {**read_record(file), **sidecar})
            else:
                tasks.append(ScanTask(scan.scan_id, scan.source, sidecar))
        num_made, num_bytes = _run(folder, settings, tasks, scans, num_workers)
        _reject_changed(folder, settings, tasks, scans)
        sidecars = {scan.scan_id: read_record(sidecar_file(folder, scan.scan_id)) for scan in scans}
        rejected_rows = _rejected_rows(table, scans, folder, sidecars, nameless=shard is None)
        num_lesions = None if shard is not None else _finish(folder, settings, table, sidecars, rejected_rows)
    num_aside = sum(not sidecar for sidecar in sidecars.values())
    seconds = time.monotonic() - began
    return Summary(folder, shard, len(scans), num_made, num_aside, num_lesions, rejected_rows, num_bytes, seconds)


def merge(
    table: LesionTable,
    folder: Path | str,
    settings: StoreSettings | None = None,
    *,
    image_root: Path | str | None = None,
) -> Summary:
    """Make the index of a store that shards have filled, after a look whether they did all.

    Raises:
        BadRowsError: nothing at all can be used.
        StoreError: scans are missing, or have changed since; or as for `prepare`.
    """
    began, folder, settings = time.monotonic(), Path(folder), settings or StoreSettings()
    with claim_store(folder, settings, None):
        scans = scans_of(table, image_root)
        states = scan_states(folder, settings, scans)
        missing = [scan for scan in scans if states[scan.scan_id] not in ("finished", "set aside")]
        if missing:
            names = "".join(f"\n  {scan.source.path}: {states[scan.scan_id]}" for scan in missing[:10])
            more = f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise StoreError(
                f"{folder}: {len(missing)} of {len(scans)} scans are not finished:{names}{more}\n"
                "Run their shards again (what is finished is kept), or the command without shard and merge"
            )
        sidecars = {scan.scan_id: read_record(sidecar_file(folder, scan.scan_id)) for scan in scans}
        rejected_rows = _rejected_rows(table, scans, folder, sidecars, nameless=True)
        num_lesions = _finish(folder, settings, table, sidecars, rejected_rows)
    num_aside = sum(not sidecar for sidecar in sidecars.values())
    return Summary(folder, None, len(scans), 0, num_aside, num_lesions, rejected_rows, 0, time.monotonic() - began)


def _run(
    folder: Path,
    settings: StoreSettings,
    tasks: Sequence[ScanTask],
    scans: Sequence[TableScan],
    num_workers: int | None,
) -> tuple[int, int]:
    """Prepare the scans of `tasks`; gives how many were made, and their size in bytes."""
    by_id = {scan.scan_id: scan for scan in scans}
    num_made = num_bytes = num_failed = 0
    results = run_jobs(
        partial(prepare_scan, folder, settings), tasks, num_cores() if num_workers is None else num_workers, _killed
    )
    with tqdm(
        total=len(scans),
        initial=len(scans) - len(tasks),
        desc="Preparing",
        unit="scan",
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 60,  # a line a minute in the log of a batch job
        disable=not tasks,
    ) as progress:
        for task, outcome in results:
            scan = by_id[task.scan_id]
            if outcome.problem is None:
                num_made, num_bytes = num_made + 1, num_bytes + outcome.num_bytes
                remove_file(aside_file(folder, scan))
            else:
                num_failed += 1
                logger.warning("set aside: %s: %s", task.source.path, outcome.problem[0])
                set_aside(folder, scan, _rejected_with_scan(task, *outcome.problem))
            progress.set_postfix(set_aside=num_failed, refresh=False)
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
        set_aside(folder, scan, _rejected_with_scan(by_id[scan.scan_id], *reason))


def _killed(_task: ScanTask) -> Outcome:
    reason = "its process was killed twice, the second time alone at work: most likely there is too little memory"
    return Outcome(problem=(reason, "prepare it on a larger machine, or with coarser voxels in another store"))


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
    """All rows that the store has not, in the order of the table; of those that name no scan only if asked for."""
    records: list[Record] = []
    for scan in scans:
        records += (sidecars[scan.scan_id] or read_record(aside_file(folder, scan)))["rejected"]
    if nameless and (places := nameless_rows(table)):
        try:
            check_annotations(table.select(places), Preprocessing())
        except BadRowsError as error:
            if error.rejected is not None:
                records += records_of(error.rejected)
    return pd.DataFrame(records, columns=list(REJECTED_COLUMNS)).sort_values("row", ignore_index=True)


def _finish(
    folder: Path, settings: StoreSettings, table: LesionTable, sidecars: dict[str, Record], rejected: pd.DataFrame
) -> int:
    """Write the index and what was rejected; gives the number of lesions."""
    write_bytes(folder / REJECTED_FILE, rejected.to_csv(index=False).encode("utf-8"))
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
