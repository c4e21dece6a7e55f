"""What Slurm or torchrun started, against what the configuration asks for; and how a stopped job is requeued.

A job that waited a day for its nodes should learn within seconds, before torch is imported, that it asked for the wrong
number of tasks, and which line to change.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from fmcib_ssl.training.run_folder import num_saved, slurm_job, started_by_slurm
from fmcib_ssl.training.settings import ConfigError, Settings
from fmcib_ssl.training.signals import EXIT_CODES

logger = logging.getLogger(__name__)

#: A job that was requeued so often and has saved nothing is not requeued again.
_MAX_IDLE_STARTS = 3
#: What it exits with then: `EX_CONFIG`, and more than 75, because srun exits with the highest code of its processes.
_EXIT_TOO_SHORT = 78

_PATIENCE_S = 20


def check_machine(settings: Settings, environ: Mapping[str, str]) -> None:
    """Compare the configuration with what Slurm or torchrun says in the environment variables of this process.

    Raises:
        ConfigError: what does not fit, with what to change.
    """
    if problem := next(_launch_problems(settings, environ), None):
        host = f" on {socket.gethostname()}" if settings.world_size > 1 else ""
        raise ConfigError(f"the run cannot start{host}: {problem}")


def _launch_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    devices, num_nodes, world_size = settings.hardware.devices, settings.hardware.num_nodes, settings.world_size

    def number(name: str) -> int | None:
        value = environ.get(name, "")
        return int(value) if value.isdigit() else None

    if "TORCHELASTIC_RUN_ID" in environ:
        world, local = number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE")
        if local and local != devices:
            yield (
                f"torchrun started {local} processes on this node and hardware.devices={devices}: set "
                f"hardware.devices={local}, or torchrun --nproc-per-node={devices}"
            )
        if local and world and world != world_size:
            yield (
                f"torchrun runs on {world // local} nodes and hardware.num_nodes={num_nodes}: set "
                f"hardware.num_nodes={world // local}, or torchrun --nnodes={num_nodes}"
            )
    elif started_by_slurm(environ):
        in_step = "SLURM_STEP_ID" in environ
        tasks = number("SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS") or 1
        nodes = number("SLURM_STEP_NUM_NODES" if in_step else "SLURM_NNODES") or num_nodes
        if not in_step:
            if max(world_size, tasks) > 1:
                yield f"{max(world_size, tasks)} processes need srun: put `srun` before `fmcib-ssl train` in the script"
        elif nodes != num_nodes:
            yield (
                f"Slurm gave {nodes} nodes and hardware.num_nodes={num_nodes}: set hardware.num_nodes={nodes}, or "
                f"#SBATCH --nodes={num_nodes}"
            )
        elif tasks != world_size:
            remedy = f"#SBATCH --ntasks-per-node={devices}"
            if tasks % num_nodes == 0:
                remedy += f", or set hardware.devices={tasks // num_nodes}"
            yield f"Slurm started {tasks} tasks and hardware asks for {devices} on each of {num_nodes} nodes: {remedy}"
        elif world_size > 1 and "SLURM_NTASKS_PER_NODE" not in environ:
            yield f"Lightning needs the tasks of each node: replace --ntasks by #SBATCH --ntasks-per-node={devices}"


def requeue(signum: signal.Signals, run: Path, *, ask: bool = True) -> int:
    """Requeue this process's Slurm job after SIGUSR1, or when it is preempted; gives the exit code of the process.

    SIGUSR1 is what a job asks for with `--signal=USR1@SECONDS`. A plain SIGTERM also comes from `scancel` and then
    means the end; Slurm is asked which it was. A job whose time is too short to make progress is not requeued forever.
    If Slurm does not take the job, a message says what to do.

    Args:
        signum: what was received.
        run: the run folder.
        ask: whether to run `scontrol requeue`; if not, a batch script may, going by the exit code.
    """
    job = slurm_job(os.environ)
    if job is None or signum.name in ("SIGINT", "SIGHUP"):
        return EXIT_CODES[signum]
    if signum == signal.SIGTERM and not _is_preempted(job):
        return EXIT_CODES[signum]
    num_restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if signum != signal.SIGTERM and num_restarts >= _MAX_IDLE_STARTS and num_saved(run) == 0 and not _is_preempted(job):
        logger.error(
            "job %s is not requeued: after %d restarts it has saved nothing, so its time is too short for one step. "
            "Submit it with more --time, or lower SECONDS in --signal=USR1@SECONDS", job, num_restarts,
        )  # fmt: skip
        return _EXIT_TOO_SHORT
    if ask:
        returncode, message = _scontrol("requeue", job)
        if returncode == 0:
            logger.info("job %s is requeued", job)
        else:
            logger.warning("job %s could not be requeued (%s): submit it once more to resume", job, message)
    return EXIT_CODES[signum]


def _scontrol(*arguments: str) -> tuple[int, str]:
    """Exit code and output of Slurm's command, or why it could not run."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"scontrol: {error}"
    return done.returncode, done.stdout + done.stderr.strip()


def _is_preempted(job: str) -> bool:
    _, shown = _scontrol("show", "job", job)
    state, preempted = re.search(r"JobState=(\w+)", shown), re.search(r"PreemptTime=(\S+)", shown)
    return bool(state and preempted and state[1] == "RUNNING" and preempted[1] not in ("None", "N/A", "Unknown"))
