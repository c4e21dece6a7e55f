"""`python train.py`, stopped or killed, and started again with the same command: the same run to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starts import NUM_STEPS, OPTIONS, assert_same_runs, end, start, steps_logged, wait_for
from tiny_runs import REPO


@pytest.fixture(scope="module")
def whole(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(phantom_table, run)) == 0
    return run


def state_of(run: Path) -> dict[str, object]:
    state: dict[str, object] = json.loads((run / "run.json").read_text())
    return state


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(
    signum: signal.Signals, code: int, phantom_table: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(phantom_table, run)
    wait_for(lambda: steps_logged(run) >= 4, process)
    os.kill(process.pid or 0, signum)
    assert end(process) == code
    printed = run.with_suffix(".out").read_text()
    assert f"stopped by {signum.name} after step" in printed and "Traceback" not in printed, printed
    steps = steps_logged(run)
    assert (run / "checkpoints" / "last.ckpt").resolve().name == f"step-{steps:08d}.ckpt"  # nothing is lost
    assert not (run / "encoder.safetensors").exists()
    run_id = state_of(run)["run_id"]
    assert end(start(phantom_table, run)) == 0
    assert state_of(run)["run_id"] == run_id and len(state_of(run)["starts"]) == 2  # type: ignore[arg-type]
    assert_same_runs(run, whole)


def test_killed_in_a_save_and_again_in_a_step(phantom_table: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(phantom_table, run)
    wait_for(lambda: any((run / "checkpoints").glob("step-*")) and any((run / "checkpoints").glob(".step-*")), process)
    process.kill()
    assert end(process) == -signal.SIGKILL
    process = start(phantom_table, run)
    wait_for(lambda: steps_logged(run) >= 7, process)
    process.kill()
    assert end(process) == -signal.SIGKILL
    assert end(start(phantom_table, run)) == 0
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_runs(run, whole)


def test_the_newest_checkpoint_is_torn(phantom_table: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(phantom_table, run)
    wait_for(lambda: steps_logged(run) >= 7, process)
    process.kill()
    end(process)
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert end(start(phantom_table, run)) == 0
    assert f"{newest} cannot be used" in run.with_suffix(".out").read_text()
    assert_same_runs(run, whole)


def test_a_signal_to_every_process_of_the_job(phantom_table: Path, whole: Path, tmp_path: Path) -> None:
    """As Slurm sends it: the workers get it too."""
    run = tmp_path / "run"
    process = start(phantom_table, run, "hardware.num_workers=1")
    wait_for(lambda: steps_logged(run) >= 2, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, encoding="utf-8", check=True
    )
    for pid in [int(line) for line in children.stdout.split()]:
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGTERM)
    steps = steps_logged(run)
    wait_for(lambda: steps_logged(run) >= steps + 2, process)  # they did their work all the same
    os.kill(process.pid or 0, signal.SIGUSR1)
    assert end(process) == 75
    assert end(start(phantom_table, run, "hardware.num_workers=1")) == 0
    assert_same_runs(run, whole)


def test_a_job_is_queued_again(phantom_table: Path, tmp_path: Path) -> None:
    """With a stand-in for Slurm's command that notes what it is asked."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    environ = {
        "SLURM_JOB_ID": "812",
        "SLURM_JOB_NAME": "interactive",  # one process, no srun
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    run = tmp_path / "run"
    process = start(phantom_table, run, environ=environ)
    wait_for(lambda: steps_logged(run) >= 1, process)
    os.kill(process.pid or 0, signal.SIGUSR1)
    assert end(process) == 75
    assert (tmp_path / "asked").read_text() == "requeue 812\n"
    assert max((run / "checkpoints").glob("step-*.ckpt"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_ends_it_at_once(signum: signal.Signals, phantom_table: Path, tmp_path: Path) -> None:
    """A real process, while it imports torch; then the same command trains."""
    run = tmp_path / "run"
    command = [sys.executable, str(REPO / "train.py"), *OPTIONS, f"data.annotations={phantom_table}"]
    process = subprocess.Popen([*command, f"hydra.run.dir={run}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (run / "train.log").exists():  # Hydra has begun, torch is about to be imported
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signum)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGUSR1: 75}[signum]
    assert b"Traceback" not in printed, printed.decode()
    assert not (run / "metrics.csv").exists()


def test_two_processes_do_not_share_a_folder(phantom_table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(phantom_table, run)
    wait_for(lambda: steps_logged(run) >= 1, first)
    os.kill(first.pid or 0, signal.SIGSTOP)
    try:
        assert end(start(phantom_table, run)) == 1
    finally:
        os.kill(first.pid or 0, signal.SIGCONT)
    assert f"another process trains in this folder (process {first.pid}" in run.with_suffix(".out").read_text()
    assert end(first) == 0


@pytest.mark.slow
def test_killed_at_random_until_it_is_done(phantom_table: Path, whole: Path, tmp_path: Path) -> None:
    """Twenty kills, of any kind, at any moment."""
    draw = random.Random(0)
    kills = 0
    for attempt in range(8):
        run = tmp_path / str(attempt)
        while True:
            process = start(phantom_table, run, f"hardware.num_workers={draw.choice([0, 1])}")
            steps = min(steps_logged(run) + draw.randint(0, 5), NUM_STEPS)
            deadline = time.monotonic() + draw.uniform(0.5, 8)
            while process.is_alive() and steps_logged(run) < steps and time.monotonic() < deadline:
                time.sleep(0.01)
            if draw.random() < 0.8 and process.is_alive():
                os.kill(process.pid or 0, draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))
                kills += 1
            code = end(process)
            assert code in (0, 75, 130, 143, -signal.SIGKILL), run.with_suffix(".out").read_text()
            if code == 0:
                break
        assert_same_runs(run, whole)
    assert kills >= 10
