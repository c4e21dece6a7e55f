"""What makes two runs the same: the settings that may not change, a digest of them, and the run folder's name.

Every process asks before torch is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fmcib_ssl.io import digest_of, read_json
from fmcib_ssl.training.cluster import started_by_slurm
from fmcib_ssl.training.run_folder import ANEW, STATE_FILE, RunFolderError, saved_settings
from fmcib_ssl.training.settings import RENAMED_KEYS, ConfigError, Settings
from fmcib_ssl.types import first_target

#: Where data lie on a machine, and how they are read.
DATA_ACCESS = (
    "data.store",
    "data.annotations",
    "data.image_root",
    "data.path_prefix",
    "data.phantom.folder",
)
#: Settings that a run may be resumed with changed: where and how fast it runs, where its data lie, what is watched.
_FREE_SETTINGS = (
    "name",
    "contact_sheet_rows",
    "identifiers",
    "hardware.",
    "logger",
    "callbacks",
    "paths.",
    "trainer.log_every_n_steps",
    "trainer.enable_",
    "trainer.profiler",
    *DATA_ACCESS,
)
#: Settings that earlier versions had not, with what they did: a run of theirs is the same run.
_EARLIER = {"data.padding": "constant", "identifiers": "show", "loss.gather_distributed": True}
#: Settings that earlier versions had, with their defaults where folders of runs were called after them.
_GONE = {"data.check": "headers", "data.allow_short_scans": False, "data.cache_scans": None}
#: These may only grow.
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
#: Files and folders: the same however they are typed.
_PLACES = ("data.store", "data.annotations", "finetune.weights")

_NUM_DIGITS = 8
_MOST_SHOWN = 3


def settings_digest(settings: Mapping[str, Any], keyed: Collection[str] = ()) -> str:
    """Eight digits that follow from what may not change in a run, and from the place of its data.

    Args:
        settings: plain values; relative paths start from the current folder.
        keyed: settings that count besides, such as lengths that a sweep compares.
    """
    flat = flat_settings(settings)
    counted = (key in (*_PLACES, *keyed) or not (_is_free(key) or key in LENGTHS) for key in sorted(flat))
    fixed = {key: _plain(flat[key]) for key, counts in zip(sorted(flat), counted, strict=True) if counts}
    # A run of an earlier version is in a folder that is called after what parts had as names then.
    fixed |= {old: fixed.pop(new) for old, new in RENAMED_KEYS.items() if new in fixed}
    fixed |= {key: value for key, value in _GONE.items() if value is not None}
    fixed |= {key: first_target(value) for key, value in fixed.items() if key.endswith("_target_")}
    if fixed.get("method._target_") == "fmcib_ssl.methods.MinedContrast":
        fixed["method.gather"] = "all"  # a key that it had
    return digest_of(fixed)[:_NUM_DIGITS]


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Compare the settings that a folder was trained with to those of now.

    Args:
        before: as in the folder's `config.yaml`.
        now: plain values.
        folder: for the message.

    Returns:
        What differs and may, in words.

    Raises:
        RunFolderError: naming what differs and may not.
    """
    allowed, refused = _differences(before, now)
    if refused:
        raise RunFolderError(
            f"{folder} holds a run with other settings:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nTo resume it give the settings it had; {ANEW}. "
            "Only hardware, logger, callbacks, paths and a longer training may differ"
        )
    return allowed


def unlike_the_last(folder: Path, now: Mapping[str, Any]) -> str | None:
    """What keeps a run from being the last one beside it, if that is not finished: a run of days would start over.

    Args:
        folder: of the run, which is about to begin.
        now: its settings.
    """
    others = [file for file in folder.parent.glob(f"*/{STATE_FILE}") if file.parent != folder]
    last = max(others, key=lambda file: file.stat().st_mtime, default=None)
    try:
        if last is None or read_json(last).get("finished") is not None:
            return None
        _, refused = _differences(saved_settings(last.parent) or now, now)
    except (ValueError, AttributeError, OSError):  # whoever resumes that one is told
        return None
    more = [f"and {len(refused) - _MOST_SHOWN} more"] if len(refused) > _MOST_SHOWN else []
    differences = "; ".join([*refused[:_MOST_SHOWN], *more])
    return f"{last.parent} is not finished; this is another run: {differences}" if refused else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The settings that differ: those that may, and those that may not."""
    old, new = flat_settings(before), flat_settings(now)
    allowed: list[str] = []
    refused: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key, "not set"), new.get(key, "not set")
        if was != is_now:
            free = _is_free(key) or (key in LENGTHS and _at_least(is_now, was))
            (allowed if free else refused).append(f"{key}: {was} before, {is_now} now")
    return allowed, refused


def _is_free(key: str) -> bool:
    return key.startswith(_FREE_SETTINGS)


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, without `run`, which says which folder and not what is in it."""
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


def _at_least(asked: object, before: object) -> bool:
    """Whether one length of training is no shorter than another; none at all is the longest."""
    endless = (None, -1)
    if asked in endless:
        return True
    return isinstance(asked, int) and isinstance(before, int) and before not in endless and asked >= before


def run_key(
    settings: Settings, folder: Path, keyed: Collection[str] = (), environ: Mapping[str, str] = os.environ
) -> str:
    """The last part of the run folder's path.

    `KEY`, eight digits of what may not change in the run. `run=new` adds the job, or the time of the start; from then
    on the same command without it means the run that was started last, and a Slurm job the one that it began.

    Args:
        settings: of the run; its own folder may be anything.
        folder: that holds the run folders.
        keyed: settings that count besides those that may not change.
        environ: of this process.

    Raises:
        ConfigError: `run=new` under torchrun on several nodes without an id: they could not agree.
    """
    key = settings_digest(settings.model_dump(mode="json"), keyed)
    job = _job_name(environ)
    if settings.run == "new":
        return f"{key}-{job or _launch_time(environ)}"
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none yet, or lost, or damaged
        checkpoints = run / "checkpoints"
        return False, checkpoints.stat().st_mtime if checkpoints.is_dir() else 0.0


def _job_name(environ: Mapping[str, str]) -> str | None:
    """What a restart has in common with the start before; None where nothing is known."""
    run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":
        return f"torchrun-{run_id}"
    if not started_by_slurm(environ) or "TORCHELASTIC_RUN_ID" in environ:
        return None
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"slurm-{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return f"slurm-{environ['SLURM_JOB_ID']}"


def _launch_time(environ: Mapping[str, str]) -> str:
    """When this process was started, or, for all processes of one torchrun, torchrun itself."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return _now()
    if environ.get("WORLD_SIZE") != environ.get("LOCAL_WORLD_SIZE"):
        raise ConfigError(
            "run=new under torchrun on several nodes needs an id, or they would write into different run folders: add "
            "--rdzv-id=NAME to torchrun, or give hydra.run.dir=DIR in place of run=new"
        )
    return _in_words(_began_at(os.getppid()))


@functools.cache  # what follows in a process is the same folder
def _now() -> str:
    return _in_words(datetime.now())


def _began_at(pid: int) -> datetime:
    """When a process was started, to the second."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration, ValueError) as error:
        raise ConfigError(
            "torchrun was given no id, and when it was started cannot be read here: add --rdzv-id=NAME to torchrun, or "
            "give hydra.run.dir=DIR in place of run=new"
        ) from error
    return datetime.fromtimestamp(int(booted.split()[1]) + ticks // os.sysconf("SC_CLK_TCK"))


def _in_words(time: datetime) -> str:
    return time.strftime("%Y-%m-%d_%H-%M-%S")
