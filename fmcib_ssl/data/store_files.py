"""The files of a store: who may write them, how they are written, and whether they are as they were written.

Needs neither SimpleITK nor torch.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int16
from tqdm import tqdm

from fmcib_ssl.data.mining import CoarseMap
from fmcib_ssl.data.scan_file import OpenScan, ScanSums, encode_voxels
from fmcib_ssl.data.store import (
    CHECKED,
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

#: What is known of a scan, or of a row of the table.
Record = dict[str, Any]
#: Threads that read: they wait for the disk, and hashing takes a fiftieth of that.
NUM_IO_THREADS = 16
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
    if not (folder / SETTINGS_FILE).exists():
        ours = (".lock", ".claim", f".{SETTINGS_FILE}.")  # the last: a shard is just writing it
        for path in sorted(folder.iterdir()) if folder.exists() else []:
            is_empty = path.name == SCANS_FOLDER and path.is_dir() and not any(path.iterdir())
            if not path.name.startswith(ours) and not is_empty:
                raise StoreError(
                    f"{folder} is not a store and not empty (it has {path.name!r}): choose another store=DIR"
                )
        return None
    try:
        about = read_settings_file(folder)
        existing, was_finished = asdict(about["settings"]), about["complete"]
    except DamagedStoreError:  # the same command mends it; what it said, a scan that is whole says too
        sidecars = (read_record(file) for file in sorted((folder / SCANS_FOLDER).glob("*.json")))
        existing, was_finished = next((sidecar["settings"] for sidecar in sidecars if "settings" in sidecar), {}), True
        if not existing:
            raise
    differences = [
        f"{key}={existing.get(key)}, not {value}"
        for key, value in asdict(settings).items()
        if existing.get(key) != value
    ]
    if differences:
        raise StoreError(
            f"{folder} was made with other settings ({'; '.join(differences)}): use the same, or choose another "
            "store=DIR"
        )
    return bool(was_finished)


def write_settings_file(folder: Path, settings: StoreSettings, *, complete: bool, **about: object) -> None:
    """Write `store.json`; `about` is for people who look at it, and `checked` what `write_index` gave."""
    write_sealed_json(
        folder / SETTINGS_FILE,
        {"version": STORE_VERSION, "complete": complete, "settings": asdict(settings), **about},
    )


def sidecar_file(folder: Path, scan_id: str) -> Path:
    """The JSON file of a scan."""
    return folder / SCANS_FOLDER / f"{scan_id}.json"


def read_record(path: Path) -> Record:
    """What a JSON file of a store says; nothing if there is none that is as it was written."""
    try:
        return read_sealed_json(path)
    except (OSError, ValueError):
        return {}


def write_scan(
    folder: Path,
    scan_id: str,
    hu_zyx: Int16[np.ndarray, "z y x"],
    coarse_map: CoarseMap,
    sidecar: Mapping[str, object],
) -> None:
    """Write a scan's four files, the JSON last, each whole or not at all.

    Raises:
        StoreError: the folder cannot be written.
    """
    z, y, x = hu_zyx.shape
    contents = {"b2nd": encode_voxels(hu_zyx), "cells": coarse_map.to_bytes()}
    contents["sums"] = ScanSums.of(contents["b2nd"], contents["cells"], (z, y, x)).to_bytes(scan_id)
    sizes = {suffix: len(content) for suffix, content in contents.items()}
    file = sidecar_file(folder, scan_id)
    try:
        file.unlink(missing_ok=True)  # of an earlier version: what follows is not its voxels
        for suffix, content in contents.items():
            write_atomically(file.with_name(f"{scan_id}.{suffix}"), content)
        write_sealed_json(file, {**sidecar, "sizes": sizes})
    except OSError as error:
        raise _cannot_write(file, error) from error


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


def verify(folder: Path | str) -> tuple[int, dict[str, str]]:
    """Read all of a store; nothing is changed.

    Returns:
        The number of scans, and what is damaged: how, by the name of the scan or of the index.

    Raises:
        StoreError: no store, or one of another version.
    """
    folder, damaged = Path(folder), dict[str, str]()
    try:
        about = read_settings_file(folder)
        if about["complete"]:
            _ = Store(folder).lesions
            if CHECKED not in about:
                damaged[SETTINGS_FILE] = "it is of an earlier version, and its scans have no check sums"
    except DamagedStoreError as error:
        damaged["index"] = str(error)
    files = sorted((folder / SCANS_FOLDER).glob("*.json"))
    scan_ids = [file.stem for file in files if not file.name.endswith(".rejected.json")]
    with ThreadPoolExecutor(NUM_IO_THREADS) as pool:
        problems = pool.map(lambda scan_id: scan_problem(folder, scan_id), scan_ids)
        for scan_id, problem in zip(scan_ids, tqdm(problems, "Reading", len(scan_ids), unit="scan"), strict=True):
            if problem:
                damaged[f"{SCANS_FOLDER}/{scan_id}"] = problem
    return len(scan_ids), damaged


def scan_problem(folder: Path, scan_id: str, *, contents: bool = True) -> str | None:
    """What is damaged of the files of a scan; None if nothing is.

    Args:
        folder: of the store.
        scan_id: name of the scan.
        contents: read them and compare check sums, if there are any; else sizes are compared.
    """
    file = sidecar_file(folder, scan_id)
    try:
        sizes = read_sealed_json(file)["sizes"]
        for suffix, size in sizes.items():
            if (actual := file.with_suffix(f".{suffix}").stat().st_size) != size:
                return f"{scan_id}.{suffix} has {actual} bytes, not {size}"
        if contents and "sums" in sizes:
            sums = ScanSums.open(file.with_suffix(".sums"), scan_id)
            OpenScan(file.with_suffix(".b2nd"), sums).check()
            sums.check_coarse_map(read_regular(file.with_suffix(".cells")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        return str(error)
    return None


def add_sums(folder: Path, scan_id: str, sidecar: Record) -> str | None:
    """Write a scan of an older store anew, with check sums; what is wrong, if it cannot be decoded.

    Raises:
        StoreError: it cannot be written.
    """
    file = sidecar_file(folder, scan_id)
    try:
        scan, (coarse_map, _) = OpenScan(file.with_suffix(".b2nd"), None), CoarseMap.open(file.with_suffix(".cells"))
        hu = scan.read([(0, n) for n in scan.shape_zyx])
        if not scan.shape_zyx == coarse_map.shape_zyx == tuple(sidecar["scan"]["shape_zyx"]):
            raise ValueError(f"it has {scan.shape_zyx} voxels, its coarse map {coarse_map.shape_zyx}")
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        return str(error)
    write_scan(folder, scan_id, hu, coarse_map, sidecar)
    return None
