"""Files that are written whole or not at all, digests of values and files, and the cores of this process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file under another name, flush it to the disk, then rename it; its folder is made if there is none.

    If the block ends with an error, or the disk is full, what was there before stays and nothing else is left. A
    process that is killed meanwhile leaves `.NAME.*.tmp`, which `remove_leftovers` takes away.

    Args:
        path: of the file; one that is there is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # several machines may write the same one
    try:
        # Never writable by everybody, whatever the umask.
        with os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o664), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says it
            unfinished.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system can
        _sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes as `atomic_write` does.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed left half written; only for who knows that nobody else writes there.

    Raises:
        OSError: a file cannot be removed.
    """
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(*values: object) -> str:
    """SHA-256 over plain values; numbers of NumPy's count as Python's."""
    text = json.dumps(values, sort_keys=True, default=lambda value: getattr(value, "tolist", value.__str__)())
    return hashlib.sha256(text.encode()).hexdigest()


def checksum_of(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def num_cores() -> int:
    """Cores that this process may use: a batch system gives a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
