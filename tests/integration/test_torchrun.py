"""Two processes that torchrun starts: it starts them again when one is killed, and the run is the same in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starts import OPTIONS, assert_same_runs, steps_logged
from tiny_runs import REPO

TWO = ["data.batch_size=1", "head.batch_norm=false", "hardware.devices=2", "trainer.max_epochs=8"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
#: Another port for another test beside this one.
IDENTITY = ["--rdzv-id=night1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def start(launcher: list[str], output: Path, *overrides: str) -> subprocess.Popen[bytes]:
    options = [option for option in OPTIONS if not option.startswith(("data.batch_size", "trainer.max_epochs"))]
    command = [sys.executable, *launcher, str(REPO / "train.py"), *options, *TWO, *overrides]
    with output.open("ab") as file:
        # Or processes that are started again may read from torchrun's store where those before them were to be reached.
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environ)


def run_in(runs: Path) -> Path:
    """The one run folder, once it is there."""
    return next(runs.glob("*/*"), runs)


def wait_for_steps(number: int, runs: Path, process: subprocess.Popen[bytes], output: Path) -> None:
    patience = time.monotonic() + 300
    while steps_logged(run_in(runs)) < number:
        assert process.poll() is None and time.monotonic() < patience, output.read_text()
        time.sleep(0.01)


def worker(rank: int, process: subprocess.Popen[bytes]) -> int:
    """The process of a rank that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    (pid,) = (
        int(pid)
        for pid in found.stdout.split()
        if f"RANK={rank}".encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0")
    )
    return pid


@pytest.mark.slow
def test_a_killed_process_and_a_stop(phantom_table: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run.out"
    data = f"data.annotations={phantom_table}"
    place = f"paths.data={phantom_table.parent}"
    assert start([], tmp_path / "whole.out", data, place, f"hydra.run.dir={whole}").wait(300) == 0

    runs = tmp_path / "runs"
    again = ([*TORCHRUN, *IDENTITY], output, data, place, f"paths.runs={runs}", "name=tried")
    process = start(*again)
    wait_for_steps(4, runs, process, output)
    os.kill(worker(1, process), signal.SIGKILL)
    wait_for_steps(12, runs, process, output)
    process.terminate()
    assert process.wait(250) != 0
    assert "stopped by SIGTERM after step" in output.read_text()
    assert start(*again).wait(300) == 0

    (run,) = (runs / "tried").iterdir()
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert len(starts) == 3 and starts[1]["step"] >= 2 and starts[2]["step"] >= 12
    assert_same_runs(run, whole)
