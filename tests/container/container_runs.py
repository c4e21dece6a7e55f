"""Trainings in the container, by the shipped script for Docker."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster_runs import OPTIONS, gate, held_in
from docker_engine import REPO, DockerEngine, EngineError

RUN_SCRIPT = REPO / "scripts" / "docker" / "run.sh"
GATE = REPO / "tests" / "cluster" / "gate.py"


@dataclass(frozen=True)
class Workspace:
    """A folder that is the container's working directory, and belongs to the user with this number."""

    engine: DockerEngine
    image: str
    folder: Path
    store: Path
    uid: int
    gid: int

    def command(self, *arguments: str, docker: Sequence[str] = ()) -> list[str]:
        """The shipped script's call, with the scans mounted read-only; `docker` are options for `docker run`."""
        mounts = (f"{self.store}:/data/store:ro", f"{GATE}:/gate/gate.py:ro")
        options = [f"--user={self.uid}:{self.gid}", *(f"--volume={mount}" for mount in mounts)]
        options += ["--env=PYTHONPATH=/gate", "--env=OMP_NUM_THREADS=1", *docker]
        return [str(RUN_SCRIPT), *options, "--", *arguments]

    def run(self, *arguments: str, docker: Sequence[str] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, docker=docker)
        return self.engine.run(command, cwd=self.folder, check=check, FMCIB_SSL_IMAGE=self.image)

    def start(self, *arguments: str, docker: Sequence[str] = ()) -> subprocess.Popen[str]:
        """As `run`, and do not wait for the end."""
        return subprocess.Popen(
            self.command(*arguments, docker=docker), cwd=self.folder,
            env={**self.engine.environ, "FMCIB_SSL_IMAGE": self.image},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def gate(self) -> list[str]:
        """Overrides that make a training wait in the middle."""
        overrides = gate(self.folder / "gate", 0)
        os.chown(self.folder / "gate", self.uid, self.gid)
        return [override.replace(str(self.folder), "/workspace") for override in overrides]

    def wait_until_held(self, running: subprocess.Popen[str], timeout_s: float = 240) -> None:
        """Wait until it is in the middle."""
        end = time.monotonic() + timeout_s
        while held_in(self.folder / "gate") is None:
            if running.poll() is not None or time.monotonic() > end:
                running.kill()
                raise EngineError(f"it has not come to its middle\n{running.communicate()[0]}")
            time.sleep(0.2)

    def training(self, *overrides: str) -> list[str]:
        """A tiny one."""
        return ["train", *OPTIONS, "data.store=/data/store", "hydra.run.dir=runs/1", *overrides]
