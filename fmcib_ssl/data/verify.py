"""Whether a store is as it was written: every file is read, nothing is made anew.

Reading needs neither SimpleITK nor torch.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmcib_ssl.data.coarse_map import CoarseMap
from fmcib_ssl.data.scan_file import DamagedScanError, OpenScan, ScanSums, read_regular
from fmcib_ssl.data.store import (
    CHECKED,
    LESIONS_INDEX,
    SCANS_FOLDER,
    SCANS_INDEX,
    SETTINGS_FILE,
    DamagedStoreError,
    Store,
    StoreError,
    StoreSettings,
    digest_of,
    is_whole,
    read_json,
    read_settings_file,
    sidecar_file,
    write_bytes,
    write_json,
)
from fmcib_ssl.data.store_lock import claim_store

#: Threads that read: they wait for the disk, and hashing takes a fiftieth of that.
_NUM_THREADS = 16
_NO_SUMS = "no check sums"


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        store: its folder.
        num_scans: whose files were read.
        damaged: what is wrong, by the file's path in the store.
        num_added: scans that had no check sums and have them now.
        seconds: all this took.
    """

    store: Path
    num_scans: int
    damaged: dict[str, str]
    num_added: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"store     {self.store}", f"scans     {self.num_scans} read in {self.seconds:.0f} s"]
        if self.num_added:
            lines.append(
                f"added     check sums of {self.num_added} scans, from before there were any: decoded, not compared"
            )
        if not self.damaged:
            return "\n".join([*lines, "whole     every file is as it was written"])
        lines += [f"damaged   {len(self.damaged)} files"]
        lines += [f"          {name}: {reason}" for name, reason in self.damaged.items()]
        return "\n".join([*lines, "next      the command that made the store, again: it makes these anew"])


def verify(folder: Path | str) -> Verification:
    """Read all of a store and name what is not as it was written; give older stores the check sums that they lack.

    Raises:
        StoreError: no store, one of another version, or one without check sums that cannot be written.
    """
    began, folder, damaged = time.monotonic(), Path(folder), dict[str, str]()
    try:
        about = read_settings_file(folder)
        if about is None:
            raise StoreError(f"{folder} is not a store (it has no {SETTINGS_FILE}): make one with scripts/prepare.py")
        if about["complete"]:
            _ = Store(folder).lesions
    except DamagedStoreError as error:
        about, damaged["index"] = None, str(error)
    scan_ids = sorted(
        file.name.removesuffix(".json")
        for file in (folder / SCANS_FOLDER).glob("*.json")
        if not file.name.endswith(".rejected.json")
    )
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = pool.map(lambda scan_id: _problems(folder, scan_id), scan_ids)
        problems = dict(zip(scan_ids, tqdm(found, "Reading", len(scan_ids), unit="scan"), strict=True))
    lacking = [scan_id for scan_id, problem in problems.items() if problem == {"sums": _NO_SUMS}]
    for scan_id in (scan_id for scan_id in scan_ids if scan_id not in lacking):
        damaged |= {f"{SCANS_FOLDER}/{scan_id}.{suffix}": reason for suffix, reason in problems[scan_id].items()}
    if about is not None and (lacking or (about["complete"] and CHECKED not in about and not damaged)):
        with claim_store(folder, StoreSettings(**about["settings"]), None):
            for scan_id in lacking:
                if problem := add_sums(folder, scan_id, read_json(sidecar_file(folder, scan_id))):
                    damaged[f"{SCANS_FOLDER}/{scan_id}.b2nd"] = problem
            if about["complete"] and not damaged:
                digests = {name: digest_of(folder / name) for name in (SCANS_INDEX, LESIONS_INDEX)}
                write_json(folder / SETTINGS_FILE, {**about, CHECKED: digests})
    return Verification(folder, len(scan_ids), damaged, len(lacking), time.monotonic() - began)


def _problems(folder: Path, scan_id: str) -> dict[str, str]:
    """What is wrong with the files of a scan, by suffix."""
    try:
        sidecar = read_json(sidecar_file(folder, scan_id))
        if not is_whole(folder, scan_id, sidecar):
            return {"b2nd": "one of its files is missing, or has another size than when it was written"}
        if "sums" not in sidecar["sizes"]:
            return {"sums": _NO_SUMS}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return {"json": str(error)}
    problem = scan_problem(folder, scan_id)
    return {} if problem is None else {"b2nd": problem}


def scan_problem(folder: Path, scan_id: str) -> str | None:
    """What is wrong with the voxels, the coarse map or the check sums of a scan; None if nothing is."""
    voxels, cells, sums = (folder / SCANS_FOLDER / f"{scan_id}.{suffix}" for suffix in ("b2nd", "cells", "sums"))
    try:
        ScanSums.open(sums, scan_id).check_all(read_regular(voxels), read_regular(cells))
    except (OSError, DamagedScanError) as error:
        return str(error)
    return None


def add_sums(folder: Path, scan_id: str, sidecar: dict[str, Any]) -> str | None:
    """Give a scan of an older store its check sums, once all of it can be decoded; what is wrong, if that fails.

    Raises:
        StoreError: they cannot be written.
    """
    files = [folder / SCANS_FOLDER / f"{scan_id}.{suffix}" for suffix in ("b2nd", "cells", "sums")]
    try:
        voxels, cells = (read_regular(file) for file in files[:2])
        shape = tuple(sidecar["scan"]["shape_zyx"])
        content = ScanSums.of(voxels, cells, shape).to_bytes(scan_id)
        scan, (coarse, _) = OpenScan(files[0], None), CoarseMap.open(files[1])
        scan.read([(0, n) for n in scan.shape_zyx])
        if not scan.shape_zyx == coarse.shape_zyx == shape:
            raise ValueError(f"it has {scan.shape_zyx} voxels, its map {coarse.shape_zyx}, and should have {shape}")
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        return str(error)
    write_bytes(files[2], content)
    sidecar["sizes"]["sums"] = len(content)
    write_json(sidecar_file(folder, scan_id), sidecar)
    return None
