"""Asking Slurm to start a stopped job again."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess

logger = logging.getLogger(__name__)

_PATIENCE_S = 20


def requeue(signum: signal.Signals) -> bool:
    """Put this process's Slurm job back into the queue, if it is to go on: after SIGUSR1, or when it is preempted.

    SIGUSR1 is what a job asks for with `--signal=USR1@SECONDS`. A plain SIGTERM also comes from `scancel` and then
    means the end; Slurm is asked which it was.

    Returns:
        Whether Slurm took it. If not, a message says what to do.
    """
    job = _job()
    if job is None or signum == signal.SIGINT or (signum == signal.SIGTERM and not _is_preempted(job)):
        return False
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
            return True
        reason = result.stderr.strip() or f"scontrol ended with {result.returncode}"
    logger.warning(
        "job %s was not queued again (%s); submit it once more to go on: the run folder is kept", job, reason
    )
    return False


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
