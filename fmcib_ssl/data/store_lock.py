"""Who may write a store: one run at a time, or shards beside each other."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fmcib_ssl.data.store import (
    SCANS_FOLDER,
    SETTINGS_FILE,
    DamagedStoreError,
    StoreError,
    StoreSettings,
    cannot_write,
    read_json,
    read_settings_file,
    write_settings_file,
)
from fmcib_ssl.io import remove_leftovers

logger = logging.getLogger(__name__)


@contextmanager
def claim_store(folder: Path, settings: StoreSettings, shard: tuple[int, int] | None) -> Iterator[bool]:
    """Hold a store for writing; it is made if there is none. Yields whether it was finished before, or is damaged.

    The locks are the kernel's: they end with the process, however it ends.

    Args:
        folder: of the store.
        settings: that it has, or gets.
        shard: number and total; None claims the store as a whole.

    Raises:
        StoreError: another run has it; it has other settings; the folder is something else, which is left as it is; or
            it cannot be written.
    """
    with ExitStack() as locks:
        try:
            _agree_on_settings(folder, settings)  # before anything is made or removed there
            (folder / SCANS_FOLDER).mkdir(parents=True, exist_ok=True)
            _lock(folder, "", locks, shared=shard is not None)
            if shard is None:
                remove_leftovers(folder)
                remove_leftovers(folder / SCANS_FOLDER)
            else:
                _lock(folder, f"-{shard[0]}-of-{shard[1]}", locks, shared=False)
            finished = _agree_on_settings(folder, settings)
        except OSError as error:
            raise StoreError(cannot_write(folder, error)) from error
        if finished is None:
            write_settings_file(folder, settings, complete=False)
        yield bool(finished)


def _lock(folder: Path, suffix: str, locks: ExitStack, *, shared: bool) -> None:
    try:
        import fcntl  # noqa: PLC0415
    except ImportError:  # Windows
        logger.warning("%s: no locks on this system; see to it that no other run writes there", folder)
        return
    file = locks.enter_context((folder / f".lock{suffix}").open("a+"))
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        raise StoreError(
            f"{folder} is being written by another run ({holder or 'a shard'}): wait for it or stop it. "
            "Two may write one store only as different shards of one table (shard=1/2, shard=2/2)"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        logger.warning("%s: this file system knows no locks; see to it that no other run writes there", folder)
    if not shared:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _agree_on_settings(folder: Path, settings: StoreSettings) -> bool | None:
    """Whether a store with these settings is finished or damaged; None where there is nothing yet.

    Raises:
        StoreError: the folder is something else, or a store with other settings.
    """
    try:
        found = read_settings_file(folder)
    except DamagedStoreError:
        found = _described_by_scans(folder)  # the same command mends it
        if found is None:
            raise
    if found is None:
        ours = (".lock", f".{SETTINGS_FILE}.")  # the last: a shard is just writing it
        there = list(folder.iterdir()) if folder.exists() else []
        empty = [path for path in there if path.name == SCANS_FOLDER and path.is_dir() and not any(path.iterdir())]
        foreign = [path.name for path in there if not path.name.startswith(ours) and path not in empty]
        if foreign:
            raise StoreError(
                f"{folder} is not a store and not empty (it has {sorted(foreign)[0]!r}): choose another store=DIR"
            )
        return None
    differences = [
        f"{key}={there} there, {asked} asked for"
        for key, asked in asdict(settings).items()
        if (there := found["settings"].get(key)) != asked
    ]
    if differences:
        raise StoreError(
            f"{folder} was made with other settings ({'; '.join(differences)}): "
            "ask for the same, or choose another store=DIR"
        )
    return bool(found["complete"])


def _described_by_scans(folder: Path) -> dict[str, Any] | None:
    """What a damaged `store.json` must have said, by the settings of a scan that is whole."""
    for file in sorted((folder / SCANS_FOLDER).glob("*.json")):
        try:
            return {"settings": dict(read_json(file)["settings"]), "complete": True}
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None
