"""The name of a run's folder: the same for the same command, on all its processes and after every restart."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path

from fmcib_ssl.preflight import started_by_slurm
from fmcib_ssl.settings import ConfigError, Settings
from fmcib_ssl.training.run_folder import STATE_FILE
from fmcib_ssl.training.same_run import settings_digest


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
        starts = json.loads((run / STATE_FILE).read_text())["starts"]
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
    return _in_words(_began(os.getppid()))


@functools.cache  # what follows in a process is the same folder
def _now() -> str:
    return _in_words(datetime.now())


def _began(pid: int) -> datetime:
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
