"""Asking Slurm to start a stopped job again."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from pathlib import Path

from fmcib_ssl.signals import EXIT_CODES
from fmcib_ssl.training.run_folder import RunFolder, RunFolderError

logger = logging.getLogger(__name__)

#: A job that was put back so often in a row, and has saved nothing new since, is not put back again.
MOST_IDLE_STARTS = 3
#: What it exits with then: `EX_CONFIG`, and more than 75, because srun exits with the highest code of its processes.
EXIT_TOO_SHORT = 78

_PATIENCE_S = 20


def requeue(signum: signal.Signals, run: Path, *, ask: bool = True) -> int:
    """Put this process's Slurm job back into the queue, if it is to go on: after SIGUSR1, or when it is preempted.

    SIGUSR1 is what a job asks for with `--signal=USR1@SECONDS`. A plain SIGTERM also comes from `scancel` and then
    means the end; Slurm is asked which it was. A job whose time is too short to get anywhere is not put back for ever.

    Args:
        signum: what was received.
        run: the run folder, where it is noted.
        ask: whether to ask Slurm; else somebody else does, who goes by the exit code.

    Returns:
        What the process is to exit with. If Slurm does not take the job, a message says what to do.
    """
    job = _job()
    if job is None or signum.name in ("SIGINT", "SIGHUP"):
        return EXIT_CODES[signum]
    if signum == signal.SIGTERM and not _is_preempted(job):
        return EXIT_CODES[signum]
    if _num_idle_starts(run, job) >= MOST_IDLE_STARTS and not _is_preempted(job):
        logger.error(
            "job %s is not queued again: it was %d times in a row, and nothing was saved in between. Its time is too "
            "short to start and to take a step before the signal: raise --time, or lower SECONDS in "
            "--signal=USR1@SECONDS, and submit it once more; the run folder is kept", job, MOST_IDLE_STARTS,
        )  # fmt: skip
        return EXIT_TOO_SHORT
    if ask:
        _put_back(job)
    return EXIT_CODES[signum]


def _num_idle_starts(run: Path, job: str) -> int:
    try:
        return RunFolder(run).note_requeue(job)
    except RunFolderError as error:  # then there are other worries
        logger.warning("%s", error)
        return 0


def _put_back(job: str) -> None:
    try:
        result = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except FileNotFoundError:
        reason = "there is no scontrol here"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        if result.returncode == 0:
            logger.info("job %s is queued again", job)
            return
        reason = result.stderr.strip() or f"scontrol ended with {result.returncode}"
    logger.warning(
        "job %s was not queued again (%s); submit it once more to go on: the run folder is kept", job, reason
    )


def _job() -> str | None:
    """Name of the job; of a job array only this task, or all would be put back."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _is_preempted(job: str) -> bool:
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    state, preempted = re.search(r"JobState=(\w+)", shown), re.search(r"PreemptTime=(\S+)", shown)
    return bool(state and preempted and state[1] == "RUNNING" and preempted[1] not in ("None", "N/A", "Unknown"))
