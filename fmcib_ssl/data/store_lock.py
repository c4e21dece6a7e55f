"""Who may write a store: one run at a time, or shards beside each other."""

from __future__ import annotations

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
from fmcib_ssl.io import Held, Lock, remove_leftovers

#: A run that is killed may take a moment to let go, and so may shards that look whether a whole run is on.
PATIENCE_S = 5.0


@contextmanager
def claim_store(
    folder: Path, settings: StoreSettings, shard: tuple[int, int] | None, patience_s: float | None = None
) -> Iterator[bool]:
    """Hold a store for writing; it is made if there is none. Yields whether it was finished before, or is damaged.

    Shards lock a file each, a run on all scans another one, and each looks for the other's after its own is locked.

    Args:
        folder: of the store.
        settings: that it has, or gets.
        shard: number and total; None claims the store as a whole.
        patience_s: so long another run is waited for; by default some seconds.

    Raises:
        StoreError: another run has it; it has other settings; the folder is something else, which is left as it is; or
            it cannot be written.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    own = ".lock" if shard is None else f".lock-{shard[0]}-of-{shard[1]}"
    with ExitStack() as stack:
        try:
            _agree_on_settings(folder, settings)  # before anything is made or removed there
            (folder / SCANS_FOLDER).mkdir(parents=True, exist_ok=True)
            stack.enter_context(Lock(folder / own, patience_s))
            for other in [folder / ".lock"] if shard else sorted(folder.glob(".lock-*")):
                Lock(other, patience_s).release()
            if shard is None:
                remove_leftovers(folder)
                remove_leftovers(folder / SCANS_FOLDER)
            finished = _agree_on_settings(folder, settings)
        except Held as error:
            raise StoreError(
                f"{folder} is being written by another run ({error}): wait for it or stop it. "
                "Two may write one store only as different shards of one table (shard=1/2, shard=2/2)"
            ) from error
        except OSError as error:
            raise StoreError(cannot_write(folder, error)) from error
        if finished is None:
            write_settings_file(folder, settings, complete=False)
        yield bool(finished)


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
        ours = (".lock", ".claim", f".{SETTINGS_FILE}.")  # the last: a shard is just writing it
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
