"""Which job a process belongs to, so that a restart of the job finds its run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from fmcib_ssl.preflight import started_by_slurm
from fmcib_ssl.settings import ConfigError


def run_key(environ: Mapping[str, str] = os.environ) -> str:
    """The last part of the run folder's path, the same on all ranks and after a restart of the job.

    `slurm-JOB` or `slurm-JOB_TASK` in a Slurm job, `torchrun-ID` under torchrun with an id of the user's, else the
    time: of the start, or, for all processes of one torchrun, of torchrun's own.

    Raises:
        ConfigError: torchrun on several nodes without an id: they could not agree.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _torchrun_key(environ)
    if started_by_slurm(environ):
        if "SLURM_ARRAY_JOB_ID" in environ:
            return f"slurm-{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
        return f"slurm-{environ['SLURM_JOB_ID']}"
    return _in_words(datetime.now())


def _torchrun_key(environ: Mapping[str, str]) -> str:
    run_id = environ["TORCHELASTIC_RUN_ID"]
    if run_id != "none":
        return f"torchrun-{run_id}"
    if environ.get("WORLD_SIZE") != environ.get("LOCAL_WORLD_SIZE"):
        raise ConfigError(
            "torchrun on several nodes needs an id, or they would write into different run folders: add "
            "--rdzv-id=NAME to torchrun, or hydra.run.dir=DIR to the command"
        )
    return _in_words(_began(os.getppid()))


def _began(pid: int) -> datetime:
    """When a process was started, to the second."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration, ValueError) as error:
        raise ConfigError(
            "torchrun was given no id, and when it was started cannot be read here: add --rdzv-id=NAME to torchrun, or "
            "hydra.run.dir=DIR to the command"
        ) from error
    return datetime.fromtimestamp(int(booted.split()[1]) + ticks // os.sysconf("SC_CLK_TCK"))


def _in_words(time: datetime) -> str:
    return time.strftime("%Y-%m-%d_%H-%M-%S")
