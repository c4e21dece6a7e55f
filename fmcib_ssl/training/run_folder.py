"""The folder of a run: what it is called, whose it is, how often it was started, whether it is finished.

The same command is the same run. The main process alone writes the folder's state, every file whole or not at all, and
no start is noted before it has passed all checks. Every process asks for the folder's name before torch is imported.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import secrets
import socket
import string
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fmcib_ssl.io import Held, Lock, digest_of, read_json, read_yaml, remove_leftovers, write_atomically
from fmcib_ssl.training.settings import RENAMED_KEYS, ConfigError, Settings, upgraded
from fmcib_ssl.types import UserError, first_target

STATE_FILE, _CONFIG_FILE, _ENVIRONMENT_FILE = "run.json", "config.yaml", "environment.json"
_LOCK_FILE = ".lock"
#: A killed run may take a moment to release its lock.
_LOCK_PATIENCE_S = 10.0
CHECKPOINT_NAME = re.compile(r"step-(\d+)(-epoch-(\d+))?\.ckpt")
#: What to do for another run with the same settings, in a message.
ANEW = "run=new (without hydra.run.dir) starts afresh"

#: What may be in the folder of a run that has not begun yet: locks, logs, and what a run writes before.
_BEFORE_THE_START = re.compile(
    r"\.lock|\.claim|.*\.(log|out|err)|\.submitit|\.hydra|rejected\.csv"
    r"|\.(run\.json|rejected\.csv)\.[0-9a-f]{8}\.tmp"
)


class _State(BaseModel):
    """What `run.json` has to be to be used; it may say more."""

    run_id: str
    starts: list[dict[str, Any]]
    finished: dict[str, Any] | None = None
    data_checksum: str | None = None


class RunFolderError(UserError, ValueError):
    """The run folder cannot be used for this run; the message says why and what to do."""


class RunFolder:
    """The state of a run, kept in its folder.

    Args:
        path: the folder; created if needed.
        main_process: whether this one writes; the others only read what an earlier start has left.

    Raises:
        RunFolderError: it holds something else, another process trains in it, it cannot be written, or its state is
            damaged or lost.
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
                self._lock = Lock(path / _LOCK_FILE, _LOCK_PATIENCE_S)
                for own in (path, self.checkpoints):
                    remove_leftovers(own)
            known = read_state(path)
            if known is None and any(self.checkpoints.glob("step-*.ckpt")):
                raise RunFolderError(f"{path} has checkpoints and no {STATE_FILE}: restore that file; {ANEW}")
        except Held as error:
            raise RunFolderError(
                f"{path}: another process trains in this folder ({error}): wait for it or stop it; {ANEW}"
            ) from error
        except OSError as error:
            raise RunFolderError(f"{path}: the run folder cannot be used: {error.strerror or error}") from error
        except RunFolderError:
            self.release()
            raise
        new_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        self.state: dict[str, Any] = known or {"run_id": new_id, "starts": [], "finished": None}

    @property
    def run_id(self) -> str:
        """Eight letters and digits, the same through all restarts; also W&B's id."""
        return str(self.state["run_id"])

    def begin(self, settings: Mapping[str, Any], environment: Mapping[str, Any], **start: Any) -> None:
        """Record a start that has passed all checks, with its settings and environment."""
        commit = (environment.get("git") or {}).get("commit")
        about = {"commit": commit, "job": os.environ.get("SLURM_JOB_ID"), **start}
        self.state["starts"].append({"time": _now(), "host": socket.gethostname(), **about})
        self.state["finished"] = None
        self._write_state()
        self._write(_CONFIG_FILE, yaml.safe_dump(dict(settings), sort_keys=False))
        self._write(_ENVIRONMENT_FILE, json.dumps(environment, indent=2, default=str) + "\n")

    def note(self, **facts: Any) -> None:
        """Note what later starts have to know."""
        self.state.update(facts)
        self._write_state()

    def finish(self, **results: Any) -> None:
        """Note that the run was trained to its end."""
        self.state["finished"] = {"time": _now(), **results}
        self._write_state()

    def check_settings(self, now: Mapping[str, Any]) -> list[str]:
        """What is set otherwise than when the run was begun; arguments and errors as of `check_same_run`."""
        before = saved_settings(self.path)
        return [] if before is None else check_same_run(before, now, self.path)

    def check_lesions(self, checksum: str, *of_earlier_versions: str) -> None:
        """Refuse other lesions than those that the run has learned from.

        Raises:
            RunFolderError: they are others.
        """
        known: str | None = self.state.get("data_checksum")
        if known is not None and known not in (checksum, *of_earlier_versions):
            raise RunFolderError(
                f"{self.path} was trained on other lesions, labels or weights: they have changed since (checksum "
                f"{known[:12]}, now {checksum[:12]}). Resume it with those it began with; {ANEW}"
            )

    def release(self) -> None:
        """Let others train in this folder; the end of the process does so too."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write_state(self) -> None:
        if self.main_process:
            self._write(STATE_FILE, json.dumps(self.state, indent=2, default=str) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise RunFolderError(f"{self.path / name} cannot be written: {error.strerror or error}") from error


def num_saved(folder: Path) -> int:
    """What a restart need not do again: optimizer steps, or parts of a fine-tuning."""
    names = (CHECKPOINT_NAME.fullmatch(file.name) for file in folder.glob("checkpoints/step-*.ckpt"))
    return max((int(name[1]) for name in names if name), default=len(list(folder.glob("*/predictions.parquet"))))


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
        raise RunFolderError(f"{file} is damaged ({reason}): restore it; {ANEW}") from error
    return {"finished": None, **state}


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
            f"{folder} is not the folder of a run and not empty (it has {', '.join(foreign[:3])}{more}): choose another"
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
            f"{file} is damaged ({reason}): restore it, or remove it if the settings are the same; {ANEW}"
        ) from error
    return upgraded(settings)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


# The same run.

#: Where data lie on a machine, and how they are read.
DATA_ACCESS = ("data.store", "data.annotations", "data.image_root", "data.path_prefix", "data.phantom.folder")
#: Settings that a run may be resumed with changed: where and how fast it runs, where its data lie, what is watched.
_FREE_SETTINGS = (
    "name", "contact_sheet_rows", "identifiers", "hardware.", "logger", "callbacks", "paths.", "export.",
    "trainer.log_every_n_steps", "trainer.enable_", "trainer.profiler", *DATA_ACCESS,
)  # fmt: skip
#: Settings that earlier versions had not, with what they did: a run of theirs is the same run.
_EARLIER = {
    "data.padding": "constant",
    "encoder.rate": 1.0,
    "encoder.weights": None,
    "export.keep_head": False,
    "head.weights": None,
    "identifiers": "show",
    "loss.gather_distributed": True,
    "loss.same_patient": "keep",
    "optimizer.one_group": False,
}
#: Settings that earlier versions had, with their defaults where folders of runs were called after them.
_GONE = {"data.check": "headers", "data.allow_short_scans": False, "data.cache_scans": None}
#: These may only grow.
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
#: Files and folders: the same however they are typed.
_PLACES = ("data.store", "data.annotations", "encoder.weights", "finetune.weights", "head.weights")


def settings_digest(settings: Mapping[str, Any], keyed: Collection[str] = ()) -> str:
    """Eight digits that follow from what may not change in a run, and from the place of its data.

    Args:
        settings: plain values; relative paths start from the current folder.
        keyed: further settings that count, such as lengths of training that a sweep compares.
    """
    fixed = {
        key: _plain(value)
        for key, value in flat_settings(settings).items()
        if key in (*_PLACES, *keyed) or not (_is_free(key) or key in LENGTHS)
    }
    # A run of an earlier version is in a folder that is called after what parts had as names then.
    fixed |= {old: fixed.pop(new) for old, new in RENAMED_KEYS.items() if new in fixed}
    fixed |= {key: value for key, value in _GONE.items() if value is not None}
    fixed |= {key: first_target(value) for key, value in fixed.items() if key.endswith("_target_")}
    if fixed.get("method._target_") == "fmcib_ssl.methods.MinedContrast":
        fixed["method.gather"] = "all"  # a key that it had
    return digest_of(fixed)[:8]


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Compare the settings that a folder was trained with to those of now.

    Args:
        before: plain values of the folder's `config.yaml`.
        now: plain values of this start.
        folder: named in the message.

    Returns:
        Differences that are allowed, one line each.

    Raises:
        RunFolderError: naming what differs and may not.
    """
    old, new = flat_settings(before), flat_settings(now)
    allowed: list[str] = []
    refused: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key, "not set"), new.get(key, "not set")
        if was != is_now:
            free = _is_free(key) or (key in LENGTHS and _at_least(is_now, was))
            (allowed if free else refused).append(f"{key}: {was} before, {is_now} now")
    if refused:
        raise RunFolderError(
            f"{folder} holds a run with other settings:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nTo resume it give the settings it had; {ANEW}. "
            "Only hardware, logger, callbacks, paths and a longer training may differ"
        )
    return allowed


def _is_free(key: str) -> bool:
    return key.startswith(_FREE_SETTINGS)


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, without `run`, which selects a folder and does not describe the run in it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = RENAMED_KEYS.get(f"{prefix}{key}", f"{prefix}{key}")
        if isinstance(value, Mapping) and value:
            flat.update(flat_settings(value, f"{name}."))
        elif name != "run" and name not in _GONE and (name, value) not in _EARLIER.items():
            flat[name] = str(Path(value).resolve()) if name in _PLACES and isinstance(value, str) else value
    return flat


def _plain(value: Any) -> Any:
    """1.0 as 1, which it is equal to."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at_least(length: object, before: object) -> bool:
    """Whether one length of training is no shorter than another; none at all is the longest."""
    steps, steps_before = (math.inf if value in (None, -1) else value for value in (length, before))
    return isinstance(steps, int | float) and isinstance(steps_before, int | float) and steps >= steps_before


def run_key(
    settings: Settings, folder: Path, keyed: Collection[str] = (), environ: Mapping[str, str] = os.environ
) -> str:
    """The last part of the run folder's path.

    `KEY`, eight digits of what may not change in the run. `run=new` adds the job, or the time of the start; from then
    on the same command without it means the run that was started last, and a Slurm job the one that it began.

    Args:
        settings: of the run; its own folder may be anything.
        folder: that holds the run folders.
        keyed: further settings that the digest depends on.
        environ: of this process.

    Raises:
        ConfigError: `run=new` under torchrun without an id: its processes could not agree.
    """
    key = settings_digest(settings.model_dump(mode="json"), keyed)
    job = _job_name(environ)
    if settings.run == "new":
        return f"{key}-{job or _launch_name(environ)}"
    if job is not None and (folder / job / STATE_FILE).is_file():
        return job  # begun by a version that called folders by their job
    known = [folder / key, *sorted(folder.glob(f"{key}-*"))]
    return max(known, key=functools.partial(_last_start, job=environ.get("SLURM_JOB_ID"))).name


def _last_start(run: Path, *, job: str | None) -> tuple[bool, float]:
    """Whether a job has started a run before, and when it was started last."""
    try:
        starts = read_json(run / STATE_FILE)["starts"]
        own = job is not None and any(start.get("job") == job for start in starts)
        return own, datetime.fromisoformat(starts[-1]["time"]).timestamp()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none yet, or damaged
        return False, 0.0


def started_by_slurm(environ: Mapping[str, str]) -> bool:
    """Whether this is a batch job of Slurm; in an interactive one Lightning starts the processes itself."""
    return "SLURM_JOB_ID" in environ and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """Id of the Slurm job; of a job array that of this task."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _job_name(environ: Mapping[str, str]) -> str | None:
    """What a restart has in common with the start before; None where nothing is known."""
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":
        return f"torchrun-{run_id}"
    if not started_by_slurm(environ) or "TORCHELASTIC_RUN_ID" in environ:
        return None
    return f"slurm-{slurm_job(environ)}"


def _launch_name(environ: Mapping[str, str]) -> str:
    """What all processes of a launch have in common where no job names it."""
    if "TORCHELASTIC_RUN_ID" in environ:
        raise ConfigError(
            "run=new under torchrun needs an id: torchrun --rdzv-id=NAME, or hydra.run.dir=DIR for run=new"
        )
    return _start_time()


@functools.cache  # what follows in a process is the same folder
def _start_time() -> str:
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
