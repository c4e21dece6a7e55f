"""Tiny trainings as Slurm jobs, started by the shipped batch script, and what must be true of them in the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import starts
from slurm_cluster import ClusterError, SlurmCluster
from tiny_runs import checkpoint_of, metrics_of

REPO = Path(__file__).resolve().parents[2]
BATCH_SCRIPT = REPO / "scripts" / "slurm" / "pretrain.sbatch"

#: 12 steps with one process, 4 with two: an odd lesion is left for another epoch.
OPTIONS = [
    *(option for option in starts.OPTIONS if not option.startswith("hardware.")),
    *("data.spacing_mm=null", "hardware=cpu", "hardware.num_threads=1", "hardware.num_workers=1"),
]
HELD_AT = 3
NUM_STEPS = starts.NUM_STEPS

#: Much more than anything here takes, on a machine that has other work too.
PATIENCE_S = 600

#: What Slurm says of a job that will not run any more.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Shape:
    """Nodes and tasks of a job."""

    nodes: int = 1
    tasks_per_node: int = 1

    def sbatch(self) -> list[str]:
        return [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks_per_node}"]


ONE = Shape()
TWO_TASKS = Shape(tasks_per_node=2)
TWO_NODES = Shape(nodes=2)


@dataclass(frozen=True)
class Bench:
    """A cluster, a store, and a folder for what a test leaves."""

    cluster: SlurmCluster
    store: Path
    folder: Path

    def train(
        self,
        *overrides: str,
        shape: Shape = ONE,
        sbatch: Sequence[str] = (),
        script: Path = BATCH_SCRIPT,
        held_rank: int | None = None,
        held_at: int = HELD_AT,
        environ: Mapping[str, str] | None = None,
    ) -> TrainingJob:
        """Submit a training.

        Args:
            overrides: for `train.py`.
            shape: nodes and tasks.
            sbatch: more options for `sbatch`.
            script: the batch script.
            held_rank: the process that waits for what is going to happen.
            held_at: the step before which it does; by default the middle.
            environ: more variables for the batch script.
        """
        if held_rank is not None:
            overrides = (*gate(self.folder / "gate", held_rank, held_at), *overrides)
        number = self.cluster.submit(
            *shape.sbatch(),
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            "--time=30",
            f"--chdir={self.folder}",
            f"--output={self.folder}/%j.out",
            *sbatch,
            str(script),
            *self.options(),
            *overrides,
            environ={**self.environ, **(environ or {})},
        )
        return TrainingJob(self, number, self.folder / "gate")

    def options(self) -> list[str]:
        return [*OPTIONS, f"data.store={self.store}", f"paths.runs={self.folder / 'runs'}"]

    @property
    def environ(self) -> dict[str, str]:
        return {"PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class TrainingJob:
    """A training in the queue, at work or done."""

    bench: Bench
    number: str
    gate: Path

    @property
    def run(self) -> Path:
        """The one run folder."""
        folders = [path.parent for path in (self.bench.folder / "runs").rglob("run.json")]
        assert len(folders) == 1, folders
        return folders[0]

    @property
    def printed(self) -> str:
        output = self.bench.folder / f"{self.number}.out"
        return output.read_text(errors="replace") if output.exists() else ""

    def wait_until_held(self) -> int:
        """Wait until it is in the middle; gives the number of the process that waits there."""

        def look() -> int | None:
            if (held := held_in(self.gate)) is not None:
                return held[0]
            if (state := self.state()["JobState"]) in ENDED:
                raise ClusterError(f"job {self.number} is {state} before its middle\n{self.printed}")
            return None

        return self.bench.cluster.wait_until(look, "the training to come to where it waits", PATIENCE_S)

    def signal(self, name: str) -> None:
        """As Slurm does it at the end of the time: to every process of the step, and not to the batch script."""
        self.bench.cluster.run("scancel", f"--signal={name}", self.number)

    def state(self) -> dict[str, str]:
        return self.bench.cluster.job(self.number)

    def wait(self, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        """Wait for the end, through restarts."""
        return self.bench.cluster.wait(self.number, ENDED, timeout_s)

    def wait_until_complete(self, restarts: int = 0) -> None:
        """Wait for the end, which must be a good one, after so many restarts."""
        job = self.wait()
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), (
            f"{job}\n{self.printed}"
        )
        assert "Traceback" not in self.printed, self.printed


def gate(folder: Path, rank: int | str, step: int = HELD_AT) -> list[str]:
    """Overrides that make a process wait."""
    folder.mkdir()
    arguments = ["_target_=gate.Gate", f"folder={folder}", f"step={step}", f"rank={rank}"]
    return [f"+callbacks.gate.{argument}" for argument in arguments]


def held_in(folder: Path) -> tuple[int, str] | None:
    """The number of the process that waits, and its job's."""
    held = folder / "held"
    words = held.read_text().split() if held.exists() else []
    return (int(words[0]), words[1]) if len(words) == 2 else None


def starts_of(run: Path) -> list[dict[str, Any]]:
    starts: list[dict[str, Any]] = json.loads((run / "run.json").read_text())["starts"]
    return starts


def assert_same_runs(run: Path, whole: Path) -> None:
    """The same weights, optimizer, schedule and metrics, bit for bit; no row is missing, none is there twice."""
    starts.assert_same_runs(run, whole)
    assert metrics_of(run)["step"].tolist() == list(range(checkpoint_of(whole)["global_step"]))
    assert (run / "encoder.safetensors").read_bytes()
    assert not list(run.rglob("hpc_ckpt*")), "Lightning's own checkpoints, which a later call would load"
