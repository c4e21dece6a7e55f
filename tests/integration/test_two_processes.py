"""Two processes over gloo: stopped, killed and started again they are the same run; nothing hangs, compiled or not."""

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
from tiny_runs import REPO, metrics_of

pytestmark = pytest.mark.slow

TWO = ["data.batch_size=1", "head.batch_norm=false", "hardware.devices=2"]
#: Starts them again if one is killed; another port for another test beside this one.
TORCHRUN = [
    *("-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"),
    *("--rdzv-id=night1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
]


def start(launcher: list[str], table: Path, output: Path, *overrides: str) -> subprocess.Popen[bytes]:
    options = [option for option in OPTIONS if not option.startswith("data.batch_size")]
    data = [f"data.annotations={table}", f"paths.data={table.parent}"]
    command = [sys.executable, *launcher, str(REPO / "train.py"), *options, *TWO, *data, *overrides]
    with output.open("ab") as file:
        # Or processes that are started again may read from torchrun's store where those before them were to be reached.
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environ)


def wait_for_steps(number: int, runs: Path, process: subprocess.Popen[bytes], output: Path) -> None:
    """Until the one run below a folder has logged so many."""
    patience = time.monotonic() + 300
    while not any(steps_logged(file.parent) >= number for file in runs.rglob("metrics.csv")):
        assert process.poll() is None and time.monotonic() < patience, output.read_text()
        time.sleep(0.01)


def child(process: subprocess.Popen[bytes], rank: int) -> int:
    """The process of a rank that another one has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    (pid,) = (
        int(pid)
        for pid in found.stdout.split()
        if f"LOCAL_RANK={rank}".encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0")
    )
    return pid


def test_a_signal_to_one_of_two(phantom_table: Path, tmp_path: Path) -> None:
    """It stops both after the same step."""
    whole, run, output = tmp_path / "whole", tmp_path / "run", tmp_path / "run.out"
    assert start([], phantom_table, tmp_path / "whole.out", f"hydra.run.dir={whole}").wait(300) == 0
    again = ([], phantom_table, output, f"hydra.run.dir={run}")
    process = start(*again)
    wait_for_steps(4, run, process, output)
    os.kill(child(process, 1), signal.SIGUSR1)
    assert process.wait(250) == 75
    assert (run / "checkpoints" / "last.ckpt").resolve().name == f"step-{steps_logged(run):08d}.ckpt"
    assert start(*again).wait(300) == 0
    assert_same_runs(run, whole)


def test_a_killed_process_and_a_stop(phantom_table: Path, tmp_path: Path) -> None:
    whole, runs, output = tmp_path / "whole", tmp_path / "runs", tmp_path / "run.out"
    length = "trainer.max_epochs=8"
    assert start([], phantom_table, tmp_path / "whole.out", length, f"hydra.run.dir={whole}").wait(300) == 0
    again = (TORCHRUN, phantom_table, output, length, f"paths.runs={runs}", "name=tried")
    process = start(*again)
    wait_for_steps(4, runs, process, output)
    os.kill(child(process, 1), signal.SIGKILL)
    wait_for_steps(12, runs, process, output)
    process.terminate()
    assert process.wait(250) != 0
    assert "stopped by SIGTERM after step" in output.read_text()
    assert start(*again).wait(300) == 0

    (run,) = (runs / "tried").iterdir()
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert len(starts) == 3 and starts[1]["step"] >= 2 and starts[2]["step"] >= 12
    assert_same_runs(run, whole)


def test_compiled(phantom_table: Path, tmp_path: Path) -> None:
    """The losses of two processes that compile are those of two that do not."""
    losses = []
    for switch in ("false", "true"):
        run, output = tmp_path / switch, tmp_path / f"{switch}.out"
        switches = [f"hardware.{name}={switch}" for name in ("compile", "gradient_checkpointing")]
        # AdamW's first steps go by the sign of a gradient and make much of rounding; LARS's are linear in it.
        switches += [
            "hardware.precision=32-true",
            "hardware.skip_padded_kernels=false",
            "trainer.max_epochs=1",
            "optimizer=lars",
        ]
        assert start([], phantom_table, output, *switches, f"hydra.run.dir={run}").wait(500) == 0, output.read_text()
        assert "uncompiled" not in output.read_text()
        losses.append(metrics_of(run)["train/loss"].tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
