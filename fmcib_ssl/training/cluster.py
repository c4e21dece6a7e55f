"""What a scheduler, a launcher and the machine give, against what the configuration asks for, before torch is imported.

A job that waited a day for its nodes should learn within seconds that it asked for the wrong number of tasks. All
that is wrong is said at once, each with the line to change. And how a job that is stopped asks Slurm for another start.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from fmcib_ssl.training.run_folder import RunFolder, RunFolderError
from fmcib_ssl.training.settings import ConfigError, Settings
from fmcib_ssl.training.signals import EXIT_CODES

logger = logging.getLogger(__name__)

#: Names of Slurm jobs that Lightning takes for a shell at work, in which it starts the processes itself.
_INTERACTIVE_NAMES = ("bash", "interactive")
#: A job that was put back so often in a row, and has saved nothing new since, is not put back again.
_MOST_IDLE_STARTS = 3
#: What it exits with then: `EX_CONFIG`, and more than 75, because srun exits with the highest code of its processes.
EXIT_TOO_SHORT = 78

_PATIENCE_S = 20


def check_machine(settings: Settings, environ: Mapping[str, str]) -> None:
    """Compare the configuration with Slurm's or torchrun's environment, the network, the store and the driver.

    Args:
        settings: of the run.
        environ: the environment variables of this process.

    Raises:
        ConfigError: all that does not fit, each with what to change.
    """
    problems = [
        *_slurm_problems(settings, environ),
        *_torchrun_problems(settings, environ),
        *_network_problems(settings, environ),
        *_store_problems(settings),
        *_gpu_problems(settings, environ),
    ]
    if problems:
        where = f" on {socket.gethostname()}" if settings.world_size > 1 else ""
        raise ConfigError(f"the run cannot start{where}:\n" + "\n".join(f"  {problem}" for problem in problems))


def check_disk(run: Path, checkpoint_bytes: int) -> None:
    """Refuse a run folder without room for two checkpoints: the last good one, and the one being written.

    Args:
        run: the run folder; it exists.
        checkpoint_bytes: of one checkpoint.

    Raises:
        ConfigError: too little room.
    """
    free = shutil.disk_usage(run).free
    if free < 2 * checkpoint_bytes:
        raise ConfigError(
            f"{run} has {free / 1e9:.2f} GB free, and two checkpoints of this run take "
            f"{2 * checkpoint_bytes / 1e9:.2f}: make room, or set hydra.run.dir to another disk"
        )


def started_by_slurm(environ: Mapping[str, str]) -> bool:
    """Whether this process is in a Slurm job that is not a shell at work."""
    return "SLURM_JOB_ID" in environ and environ.get("SLURM_JOB_NAME") not in _INTERACTIVE_NAMES


def _slurm_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if not started_by_slurm(environ) or "TORCHELASTIC_RUN_ID" in environ:
        return
    devices, num_nodes = settings.hardware.devices, settings.hardware.num_nodes
    in_step = "SLURM_STEP_ID" in environ
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS")
    nodes = _number(environ, "SLURM_STEP_NUM_NODES" if in_step else "SLURM_NNODES")
    if not in_step and (settings.world_size > 1 or (tasks or 1) > 1):
        yield (
            f"{max(settings.world_size, tasks or 1)} processes are wanted, and this one was started without srun, so "
            "the others never come: put `srun` before `python train.py` in the batch script"
        )
        return
    if nodes is not None and nodes != num_nodes:
        yield (
            f"Slurm gave {nodes} nodes and hardware.num_nodes={num_nodes}: set hardware.num_nodes={nodes}, or "
            f"#SBATCH --nodes={num_nodes}"
        )
    elif tasks is not None and tasks != settings.world_size:
        line = f"#SBATCH --ntasks-per-node={devices}"
        if tasks % num_nodes == 0:
            line += f", or set hardware.devices={tasks // num_nodes}"
        yield f"Slurm started {tasks} tasks and hardware asks for {devices} on each of {num_nodes} nodes: {line}"
    elif settings.world_size > 1 and "SLURM_NTASKS_PER_NODE" not in environ:
        yield (
            "Lightning wants the tasks of each node, not of the job: replace --ntasks by "
            f"#SBATCH --ntasks-per-node={devices}"
        )


def _torchrun_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if "TORCHELASTIC_RUN_ID" not in environ:
        return
    world, local = _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_WORLD_SIZE")
    devices, num_nodes = settings.hardware.devices, settings.hardware.num_nodes
    if local is not None and local != devices:
        yield (
            f"torchrun started {local} processes on this node and hardware.devices={devices}: set "
            f"hardware.devices={local}, or torchrun --nproc-per-node={devices}"
        )
    elif local and world is not None and world != settings.world_size:
        yield (
            f"torchrun runs on {world // local} nodes and hardware.num_nodes={num_nodes}: set "
            f"hardware.num_nodes={world // local}, or torchrun --nnodes={num_nodes}"
        )


def _network_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if settings.world_size == 1:
        return
    address = environ.get("MASTER_ADDR")
    if address is None and started_by_slurm(environ):
        address = first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1")
    if address is not None:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            yield (
                f"the name of the first node, {address}, cannot be resolved from here ({error}): export "
                "MASTER_ADDR with its IP address in the batch script"
            )
    port = environ.get("MASTER_PORT")
    if port is not None and not (port.isdigit() and 0 < int(port) < 2**16):
        yield f"MASTER_PORT={port} is not a port: export one between 1024 and 65535, or unset it"


def _store_problems(settings: Settings) -> Iterator[str]:
    store = settings.data.store
    if store is None:
        return
    try:
        (store / "store.json").read_bytes()
    except OSError as error:
        host = socket.gethostname()
        yield (
            f"data.store={store} cannot be read on {host} ({error.strerror}): name a folder with a finished store that "
            "every node sees, and, in a container, mount it"
        )


def _gpu_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    hardware = settings.hardware
    if hardware.accelerator != "gpu":
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    num_visible = None if visible is None else len([device for device in visible.split(",") if device.strip()])
    on_rocm = Path("/dev/kfd").exists()
    if not on_rocm and not _has_cuda_driver():
        yield (
            "hardware.accelerator=gpu, and this machine has no NVIDIA driver (libcuda): ask Slurm for GPUs "
            "(#SBATCH --gpus-per-node), start the container with --gpus all, or train with hardware=cpu"
        )
    elif num_visible is not None and num_visible < hardware.devices:
        yield (
            f"hardware.devices={hardware.devices}, and CUDA_VISIBLE_DEVICES={visible!r} shows {num_visible}: "
            f"#SBATCH --gpus-per-node={hardware.devices}, or set hardware.devices={num_visible}"
        )


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list such as `gpu[07-09,12],login1`."""
    found = re.match(r"([^\[,\s]+)(?:\[([^\],-]+))?", nodes)
    return (found[1] + (found[2] or "")) if found else nodes


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else None


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
    if _num_idle_starts(run, job) >= _MOST_IDLE_STARTS and not _is_preempted(job):
        logger.error(
            "job %s is not queued again: it was %d times in a row, and nothing was saved in between. Its time is too "
            "short to start and to take a step before the signal: raise --time, or lower SECONDS in "
            "--signal=USR1@SECONDS, and submit it once more; the run folder is kept", job, _MOST_IDLE_STARTS,
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
