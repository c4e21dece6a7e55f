"""The folder of a run knows its state: whose it is, how often it was started, whether it is finished.

The main process alone writes it, every file whole or not at all, and no start is noted before it has passed all checks.
"""

from __future__ import annotations

import itertools
import re
import secrets
import socket
import string
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fmcib_ssl.io import Held, Lock, read_json, read_yaml, remove_leftovers, write_atomically, write_json
from fmcib_ssl.training.settings import upgraded
from fmcib_ssl.types import UserError

STATE_FILE, _CONFIG_FILE, _ENVIRONMENT_FILE = "run.json", "config.yaml", "environment.json"
_LOCK_FILE = ".lock"
#: A run that is killed may take a moment to let go.
LOCK_PATIENCE_S = 10.0
CHECKPOINT_NAME = re.compile(r"step-(\d+)(-epoch-(\d+))?\.ckpt")
#: What to do for another run with the same settings, in a message.
ANEW = "run=new (without hydra.run.dir) starts afresh"

#: What may be in the folder of a run that has not begun yet: locks, logs, and what a run writes before.
_BEFORE_THE_START = re.compile(
    r"\.lock|\.claim|.*\.(log|out|err)|\.submitit|\.hydra|rejected\.csv"
    r"|\.(run\.json|rejected\.csv)\.[0-9a-f]{8}\.tmp"
)
#: Of the state, what a checkpoint keeps a copy of.
_KEPT_IN_CHECKPOINTS = ("run_id", "data_checksum", "auto_batch")


class _Requeue(BaseModel):
    job: str
    saved: int


class _State(BaseModel):
    """What `run.json` has to be to be used; it may say more."""

    run_id: str
    starts: list[dict[str, Any]]
    finished: dict[str, Any] | None = None
    data_checksum: str | None = None
    requeues: list[_Requeue] = []
    auto_batch: dict[str, int] = {}


class RunFolderError(UserError, ValueError):
    """The run folder cannot be used for this run; the message says why and what to do."""


class RunFolder:
    """The state of a run, kept in its folder.

    Args:
        path: the folder; it is made if there is none.
        main_process: whether this one writes; the others only read what an earlier start has left.

    Raises:
        RunFolderError: it holds something else, another process trains in it, it cannot be written, or its state is
            damaged.
    """

    def __init__(self, path: Path, *, main_process: bool = True) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.main_process = main_process
        self._lock: Lock | None = None
        try:
            if main_process:
                refuse_foreign(path)
                path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(path / _LOCK_FILE, LOCK_PATIENCE_S)
                for own in (path, self.checkpoints):
                    remove_leftovers(own)
            known = read_state(path)
        except Held as error:
            raise RunFolderError(
                f"{path}: another process trains in this folder ({error}): wait for it or stop it; {ANEW}"
            ) from error
        except OSError as error:
            raise RunFolderError(f"{path}: the run folder cannot be used: {error.strerror or error}") from error
        except RunFolderError:
            self.release()
            raise
        #: Whether the state is lost while checkpoints are there; nothing is written before `restore`.
        self.is_lost = known is None and any(self.checkpoints.glob("step-*.ckpt"))
        self.state: dict[str, Any] = known or {"run_id": _new_id(), "starts": [], "finished": None}

    @property
    def run_id(self) -> str:
        """Eight letters and digits, the same through all restarts; also W&B's id."""
        return str(self.state["run_id"])

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `finish` was called with, if the run was trained to its end."""
        finished: dict[str, Any] | None = self.state["finished"]
        return finished

    def begin(self, settings: Mapping[str, Any], environment: Mapping[str, Any], **start: Any) -> None:
        """Note a start that nothing refuses any more, with its settings and whatever is worth knowing about it."""
        self.state["starts"].append({"time": _now(), "host": socket.gethostname(), **start})
        self.state["finished"] = None
        self._write()
        with self._writing(_CONFIG_FILE) as file:
            write_atomically(file, yaml.safe_dump(dict(settings), sort_keys=False))
        with self._writing(_ENVIRONMENT_FILE) as file:
            write_json(file, environment)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint has kept of a state that is lost."""
        self.state.update(state)
        self.is_lost = False

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

    def check_lesions(self, checksums: Collection[str]) -> None:
        """Refuse other lesions than those that the run has learned from.

        Args:
            checksums: of the lesions, by this version and by earlier ones.

        Raises:
            RunFolderError: they are others.
        """
        known = self.state.get("data_checksum")
        if known is not None and known not in checksums:
            raise RunFolderError(
                f"{self.path} was trained on other lesions, labels or weights: they have changed since (checksum "
                f"{known[:12]}, now {next(iter(checksums))[:12]}). Resume it with those it began with; {ANEW}"
            )

    def release(self) -> None:
        """Let others train in this folder; the end of the process does so too."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write(self) -> None:
        if self.main_process and not self.is_lost:
            with self._writing(STATE_FILE) as file:
                write_json(file, self.state)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        try:
            yield self.path / name
        except OSError as error:
            raise RunFolderError(f"{self.path / name} cannot be written: {error.strerror or error}") from error


def read_state(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; None if there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    file = folder / STATE_FILE
    try:
        state: dict[str, Any] = read_json(file)
        _State.model_validate(state, strict=True)
    except FileNotFoundError:
        return None
    except ValueError as error:
        reason = str(error.__cause__ or error)
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise RunFolderError(
            f"{file} is damaged ({reason}): restore it, or remove it, since checkpoints keep what is needed; {ANEW}"
        ) from error
    return {"finished": None, **state}


def kept_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint has to keep of the run's state, in case that is lost."""
    return {key: value for key, value in (read_state(folder) or {}).items() if key in _KEPT_IN_CHECKPOINTS}


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds something else than a run, without touching it.

    Raises:
        RunFolderError: saying what it holds.
        OSError: it cannot be read.
    """
    if not folder.is_dir() or (folder / STATE_FILE).exists() or any(folder.glob("checkpoints/step-*.ckpt")):
        return
    if (folder / _CONFIG_FILE).is_file() and (folder / _ENVIRONMENT_FILE).is_file():
        return  # a fine-tuning whose state is lost
    foreign = sorted(path.name for path in folder.iterdir() if not _BEFORE_THE_START.fullmatch(path.name))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise RunFolderError(
            f"{folder} is not the folder of a run and not empty (it has {', '.join(foreign[:3])}{more}): choose "
            "another hydra.run.dir=DIR, or leave it out"
        )


def saved_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a run folder's `config.yaml`, with today's names; None if there is none.

    Raises:
        RunFolderError: it is damaged.
    """
    file = folder / _CONFIG_FILE
    try:
        settings: Any = read_yaml(file)
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except FileNotFoundError:
        return None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise RunFolderError(
            f"{file} is damaged ({reason}), so the run's settings cannot be compared: restore it, or remove it if the "
            f"settings are the same; {ANEW}"
        ) from error
    return upgraded(settings)


def _new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
