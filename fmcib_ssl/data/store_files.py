"""The files of a store: who may write them, how they are written, and whether they are as they were written.

Needs neither SimpleITK nor torch.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int16
from tqdm import tqdm

from fmcib_ssl.data.mining import CoarseMap
from fmcib_ssl.data.scan_file import DamagedScanError, OpenScan, ScanSums, encode_voxels
from fmcib_ssl.data.store import (
    LESIONS_INDEX,
    SCANS_FOLDER,
    SCANS_INDEX,
    SETTINGS_FILE,
    STORE_VERSION,
    DamagedStoreError,
    Store,
    StoreError,
    StoreSettings,
    read_settings_file,
    sidecar_file,
)
from fmcib_ssl.io import (
    Held,
    Lock,
    read_regular,
    read_sealed_json,
    remove_leftovers,
    write_atomically,
    write_sealed_json,
)

logger = logging.getLogger(__name__)

#: Threads that read: they wait for the disk, and hashing takes a fiftieth of that.
_NUM_THREADS = 16
#: A run that is killed may take a moment to let go, and so may shards that look whether a whole run is on.
PATIENCE_S = 5.0


@contextmanager
def claim_store(
    folder: Path, settings: StoreSettings, shard: tuple[int, int] | None, *, wait: bool = False
) -> Iterator[bool]:
    """Hold a store for writing; it is made if there is none. Yields whether it was finished before, or is damaged.

    Shards lock a file each, a run on all scans another one, and each looks for the other's after its own is locked.

    Args:
        folder: of the store.
        settings: that it has, or gets.
        shard: number and total; None claims the store as a whole.
        wait: until another run that has the store has ended.

    Raises:
        StoreError: another run has it; it has other settings; the folder is something else, which is left as it is; or
            it cannot be written, now or in the block.
    """
    own = folder / (".lock" if shard is None else f".lock-{shard[0]}-of-{shard[1]}")
    with ExitStack() as stack:
        try:
            _agree_on_settings(folder, settings)  # before anything is made or removed there
            (folder / SCANS_FOLDER).mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(Lock(own, PATIENCE_S))
            except Held as error:
                if not wait:
                    raise
                logger.info("another run prepares %s (%s): waiting for it", folder, error)
                stack.enter_context(Lock(own, math.inf))
            for other in [folder / ".lock"] if shard else sorted(folder.glob(".lock-*")):
                Lock(other, PATIENCE_S).release()
            if shard is None:
                remove_leftovers(folder)
                remove_leftovers(folder / SCANS_FOLDER)
            was_finished = _agree_on_settings(folder, settings)
            if was_finished is None:
                write_settings_file(folder, settings, complete=False)
            yield bool(was_finished)
        except Held as error:
            raise StoreError(
                f"{folder} is being written by another run ({error}): wait for it or stop it. "
                "Two may write one store only as different shards of one table (shard=1/2, shard=2/2)"
            ) from error
        except OSError as error:
            raise _cannot_write(folder, error) from error


def _agree_on_settings(folder: Path, settings: StoreSettings) -> bool | None:
    """Whether a store with these settings is finished or damaged; None where there is nothing yet.

    Raises:
        StoreError: the folder is something else, or a store with other settings.
    """
    try:
        about = read_settings_file(folder)
    except DamagedStoreError:
        about = _described_by_scans(folder)  # the same command mends it
        if about is None:
            raise
    if about is None:
        ours = (".lock", ".claim", f".{SETTINGS_FILE}.")  # the last: a shard is just writing it
        files = list(folder.iterdir()) if folder.exists() else []
        empty = [path for path in files if path.name == SCANS_FOLDER and path.is_dir() and not any(path.iterdir())]
        foreign = [path.name for path in files if not path.name.startswith(ours) and path not in empty]
        if foreign:
            raise StoreError(
                f"{folder} is not a store and not empty (it has {sorted(foreign)[0]!r}): choose another store=DIR"
            )
        return None
    differences = [
        f"{key}={existing} there, {value} asked for"
        for key, value in asdict(settings).items()
        if (existing := about["settings"].get(key)) != value
    ]
    if differences:
        raise StoreError(
            f"{folder} was made with other settings ({'; '.join(differences)}): "
            "ask for the same, or choose another store=DIR"
        )
    return bool(about["complete"])


def _described_by_scans(folder: Path) -> dict[str, Any] | None:
    """What a damaged `store.json` must have said, by the settings of a scan that is whole."""
    for file in sorted((folder / SCANS_FOLDER).glob("*.json")):
        try:
            return {"settings": dict(read_sealed_json(file)["settings"]), "complete": True}
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def write_settings_file(folder: Path, settings: StoreSettings, *, complete: bool, **about: object) -> None:
    """Write `store.json`; `about` is for people who look at it, and `checked` what `write_index` gave."""
    write_sealed_json(
        folder / SETTINGS_FILE,
        {"version": STORE_VERSION, "complete": complete, "settings": asdict(settings), **about},
    )


def write_scan(
    folder: Path,
    scan_id: str,
    hu_zyx: Int16[np.ndarray, "z y x"],
    coarse_map: CoarseMap,
    sidecar: Mapping[str, object],
) -> int:
    """Write a scan's four files, the JSON last, each whole or not at all; gives the compressed size in bytes.

    Raises:
        StoreError: the folder cannot be written.
    """
    contents = {"b2nd": encode_voxels(hu_zyx), "cells": coarse_map.to_bytes()}
    contents["sums"] = ScanSums.of(contents["b2nd"], contents["cells"], hu_zyx.shape).to_bytes(scan_id)
    sizes = {suffix: len(content) for suffix, content in contents.items()}
    sidecar_json = sidecar_file(folder, scan_id)
    try:
        sidecar_json.unlink(missing_ok=True)  # of an earlier version: what follows is not its voxels
        for suffix, content in contents.items():
            write_atomically(sidecar_json.with_name(f"{scan_id}.{suffix}"), content)
        write_sealed_json(sidecar_json, {**sidecar, "sizes": sizes})
    except OSError as error:
        raise _cannot_write(sidecar_json, error) from error
    return sum(sizes.values())


def is_whole(folder: Path, scan_id: str, sidecar: Mapping[str, Any]) -> bool:
    """Whether a scan's files are there, as large as its JSON file says."""
    files = {folder / SCANS_FOLDER / f"{scan_id}.{suffix}": size for suffix, size in sidecar["sizes"].items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def write_index(folder: Path, scans: pd.DataFrame, lesions: pd.DataFrame) -> dict[str, str]:
    """Write the two index files, each whole or not at all; gives their digests, for `store.json`."""
    digests = {}
    for name, frame in ((SCANS_INDEX, scans), (LESIONS_INDEX, lesions)):
        content = frame.to_parquet(index=False)
        write_atomically(folder / name, content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def _cannot_write(path: Path, error: OSError) -> StoreError:
    """What is wrong with a folder that cannot be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room" if full else "make it writable, or choose another store=DIR"
    return StoreError(f"{path} cannot be written: {error.strerror}; {remedy}, then run the same command again")


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        store: its folder.
        num_scans: whose files were read.
        damaged: what is wrong, by the file's path in the store.
        num_without_sums: scans that an earlier version wrote without check sums, of which only sizes are known.
        seconds: all this took.
    """

    store: Path
    num_scans: int
    damaged: dict[str, str]
    num_without_sums: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"store     {self.store}", f"scans     {self.num_scans} read in {self.seconds:.0f} s"]
        if self.num_without_sums:
            lines.append(
                f"unknown   {self.num_without_sums} scans of an earlier version have no check sums; the command that "
                "made the store, again, decodes them and adds these"
            )
        if not self.damaged:
            return "\n".join([*lines, "whole     every file is as it was written"])
        lines += [f"damaged   {len(self.damaged)} files"]
        lines += [f"          {name}: {reason}" for name, reason in self.damaged.items()]
        return "\n".join([*lines, "next      the command that made the store, again: it makes these anew"])


def verify(folder: Path | str) -> Verification:
    """Read all of a store and name what is not as it was written; nothing is changed.

    Raises:
        StoreError: no store, or one of another version.
    """
    began, folder, damaged = time.monotonic(), Path(folder), dict[str, str]()
    try:
        about = read_settings_file(folder)
        if about is None:
            raise StoreError(f"{folder} is not a store (it has no {SETTINGS_FILE}): make one with scripts/prepare.py")
        if about["complete"]:
            _ = Store(folder).lesions
    except DamagedStoreError as error:
        damaged["index"] = str(error)
    scans = folder / SCANS_FOLDER
    scan_ids = sorted(file.stem for file in scans.glob("*.json") if not file.name.endswith(".rejected.json"))
    num_without_sums = 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results = pool.map(lambda scan_id: _problem(folder, scan_id), scan_ids)
        for scan_id, (suffix, problem) in zip(
            scan_ids, tqdm(results, "Reading", len(scan_ids), unit="scan"), strict=True
        ):
            num_without_sums += suffix == "sums"
            if problem:
                damaged[f"{SCANS_FOLDER}/{scan_id}.{suffix}"] = problem
    return Verification(folder, len(scan_ids), damaged, num_without_sums, time.monotonic() - began)


def _problem(folder: Path, scan_id: str) -> tuple[str, str | None]:
    """What is wrong with the files of a scan, and the suffix of one; of `sums` they are none."""
    try:
        sidecar = read_sealed_json(sidecar_file(folder, scan_id))
        if not is_whole(folder, scan_id, sidecar):
            return "b2nd", "one of its files is missing, or has another size than when it was written"
        if "sums" not in sidecar["sizes"]:
            return "sums", None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return "json", str(error)
    return "b2nd", scan_problem(folder, scan_id)


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
    write_atomically(files[2], content)
    sidecar["sizes"]["sums"] = len(content)
    write_sealed_json(sidecar_file(folder, scan_id), sidecar)
    return None
