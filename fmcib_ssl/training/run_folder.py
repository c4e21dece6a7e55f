"""The folder of a run knows its state: whose it is, how often it was started, whether it is finished.

`run.json` is written by the main process only, and always whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import socket
import string
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from fmcib_ssl.whole_file import remove_leftovers, write_whole

STATE_FILE, CONFIG_FILE = "run.json", "config.yaml"
CHECKPOINT_NAME = re.compile(r"step-(\d+)(-epoch-(\d+))?\.ckpt")

#: A run that is killed may take a moment to let go.
LOCK_PATIENCE_S = 10.0

#: What to do for another run with the same settings, in a message.
ANEW = "run=new (without hydra.run.dir) starts afresh"


class RunFolderError(ValueError):
    """The run folder cannot be used for this run; the message says why and what to do."""


class RunFolder:
    """The state of a run, kept in its folder.

    Args:
        path: the folder; it is made if there is none.
        main_process: whether this one writes; the others only read what an earlier start has left.

    Raises:
        RunFolderError: another process trains in it, it cannot be written, or its state is damaged.
    """

    def __init__(self, path: Path, *, main_process: bool = True) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._main_process = main_process
        self._lock: IO[str] | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            if main_process:
                self._lock = _only_one(path)
                for own in (path, self.checkpoints):
                    remove_leftovers(own)
            self.state = self._read() or self._new()
            if main_process:
                self._write()
        except OSError as error:
            raise RunFolderError(f"{path}: the run folder cannot be used: {error.strerror or error}") from error

    @property
    def run_id(self) -> str:
        """Eight letters and digits, the same through all restarts; also W&B's id."""
        return str(self.state["run_id"])

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `finish` was called with, if the run was trained to its end."""
        finished: dict[str, Any] | None = self.state["finished"]
        return finished

    def begin(self, **start: Any) -> None:
        """Note a start, with whatever is worth knowing about it."""
        self.state["starts"].append({"time": _now(), "host": socket.gethostname(), **start})
        self.state["finished"] = None
        self._write()

    def note(self, **facts: Any) -> None:
        """Note what later starts have to know."""
        self.state.update(facts)
        self._write()

    def finish(self, **results: Any) -> None:
        """Note that the run was trained to its end."""
        self.state["finished"] = {"time": _now(), **results}
        self._write()

    def note_requeue(self, job: str) -> int:
        """Note that a job is about to be put back into its queue.

        Returns:
            How many times in a row it was before, with as much saved as now.
        """
        noted = self.state.setdefault("requeues", [])
        saved = self.num_saved()
        idle = itertools.takewhile(lambda one: (one["job"], one["saved"]) == (job, saved), reversed(noted))
        num_idle = len(list(idle))
        noted.append({"time": _now(), "job": job, "saved": saved})
        self._write()
        return num_idle

    def num_saved(self) -> int:
        """What a restart need not do again: optimizer steps, or parts of a fine-tuning."""
        names = (CHECKPOINT_NAME.fullmatch(file.name) for file in self.checkpoints.glob("step-*.ckpt"))
        return max((int(name[1]) for name in names if name), default=len(list(self.path.glob("*/predictions.parquet"))))

    def hold_to(self, data_checksum: str, *, trained: bool) -> None:
        """Note the lesions of the run, or refuse others.

        Args:
            data_checksum: of the files that list the lesions.
            trained: whether something was learned from those that are noted.

        Raises:
            RunFolderError: they are others than it learned from.
        """
        known = self.state.get("data_checksum", data_checksum)
        if trained and known != data_checksum:
            raise RunFolderError(
                f"{self.path} was trained on other lesions: the files that list them have changed since (checksum "
                f"{known[:12]}, now {data_checksum[:12]}). Resume it with the lesions it began with; {ANEW}"
            )
        self.state["data_checksum"] = data_checksum
        self._write()

    def release(self) -> None:
        """Let others train in this folder; the end of the process does so too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read(self) -> dict[str, Any] | None:
        file = self.path / STATE_FILE
        try:
            state = json.loads(file.read_text())
            if not isinstance(state["run_id"], str) or not isinstance(state["starts"], list):
                raise TypeError("run_id or starts")
            state.setdefault("finished", None)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{file} is damaged ({error!r}): restore it; {ANEW}") from error
        return dict(state)

    def _new(self) -> dict[str, Any]:
        letters = string.ascii_lowercase + string.digits
        return {"run_id": "".join(secrets.choice(letters) for _ in range(8)), "starts": [], "finished": None}

    def _write(self) -> None:
        if self._main_process:
            write_whole(self.path / STATE_FILE, json.dumps(self.state, indent=2, default=str) + "\n")


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a run folder's `config.yaml`; None if there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    file = folder / CONFIG_FILE
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RunFolderError(
            f"{file} is damaged ({reason}), so the run's settings cannot be compared: restore it, or remove it if the "
            f"settings are the same; {ANEW}"
        ) from error
    return settings


def checksum(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _only_one(folder: Path) -> IO[str]:
    """Hold the folder for this process; the kernel lets go when it ends, and its children do not inherit it."""
    file = (folder / ".lock").open("a+")
    patience = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return file  # a file system without locks
            if time.monotonic() > patience:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise RunFolderError(
                    f"{folder}: another process trains in this folder ({holder}): wait for it or stop it; {ANEW}"
                ) from error
            time.sleep(0.2)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
