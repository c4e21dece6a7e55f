"""Two processes over gloo: a signal that reaches one of them stops both after the same step, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starts import OPTIONS, assert_same_runs, steps_logged
from tiny_runs import REPO


def start(table: Path, run: Path) -> subprocess.Popen[bytes]:
    options = [option for option in OPTIONS if "batch_size" not in option]
    options += ["data.batch_size=1", "head.batch_norm=false", "hardware.devices=2"]
    command = [sys.executable, str(REPO / "train.py"), *options, f"data.annotations={table}", f"hydra.run.dir={run}"]
    command += [f"paths.data={table.parent}"]
    with run.with_suffix(".out").open("ab") as output:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)


@pytest.mark.slow
def test_a_signal_to_one_of_two(phantom_table: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(phantom_table, whole).wait(300) == 0
    process = start(phantom_table, run)
    while steps_logged(run) < 4:
        assert process.poll() is None, run.with_suffix(".out").read_text()
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    other = int(found.stdout.split()[0])
    os.kill(other, signal.SIGUSR1)
    assert process.wait(250) == 75
    assert (run / "checkpoints" / "last.ckpt").resolve().name == f"step-{steps_logged(run):08d}.ckpt"
    assert start(phantom_table, run).wait(300) == 0
    assert_same_runs(run, whole)
