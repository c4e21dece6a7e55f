"""`python train.py`, stopped or killed, and started again with the same command: the same run to the last bit."""

from __future__ import annotations

import json
import os
import random
import re
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
    run = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(phantom_table, run)) == 0
    return run


def state_of(run: Path) -> dict[str, object]:
    state: dict[str, object] = json.loads((run / "run.json").read_text())
    return state


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with a stand-in for Slurm's command that notes in `asked` what it is asked."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    # A job of this name has one process, and no srun.
    job = {"SLURM_JOB_ID": "812", "SLURM_JOB_NAME": "interactive"}
    return {**job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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


def test_the_same_command_finds_its_run_and_a_new_one_is_beside_it(
    phantom_table: Path, whole: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    """No folder is named: stopped as Slurm does it, started again with the table typed another way, and once anew."""
    runs = tmp_path / "runs"
    process = start(phantom_table, runs, named=False, environ=slurm)
    wait_for(lambda: any(steps_logged(run) >= 4 for run in runs.glob("*/*")), process)
    os.kill(process.pid or 0, signal.SIGUSR1)
    assert end(process) == 75
    assert (tmp_path / "asked").read_text() == "requeue 812\n"
    (run,) = runs.glob("*/*")
    steps, state = steps_logged(run), state_of(run)
    assert (run / "checkpoints" / "last.ckpt").resolve().name == f"step-{steps:08d}.ckpt"  # nothing is lost
    other_way = phantom_table.parent / ".." / phantom_table.parent.name / phantom_table.name
    assert end(start(other_way, runs, "hardware.num_threads=1", named=False)) == 0
    assert_same_runs(run, whole)
    assert state_of(run)["run_id"] == state["run_id"] and len(state_of(run)["starts"]) == 2  # type: ignore[arg-type]
    printed = runs.with_suffix(".out").read_text()
    assert "stopped by SIGUSR1 after step" in printed and "Traceback" not in printed
    assert "The same command resumes from there" in printed
    assert re.search(rf"resuming {run} at step \d+; run=new starts afresh", printed)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.suffix not in (".log", "") and path.is_file()}
    assert end(start(phantom_table, runs, "run=new", "trainer.max_epochs=1", named=False)) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    (new,) = (folder for folder in runs.glob("*/*") if folder != run)
    assert new.name.startswith(f"{run.name}-") and state_of(new)["run_id"] != state_of(run)["run_id"]


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("module", "signum", "code"),
    [
        ("hydra.version", signal.SIGTERM, 143),
        pytest.param("torch.version", signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param("torch.version", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_it_starts(
    module: str, signum: signal.Signals, code: int, phantom_table: Path, tmp_path: Path
) -> None:
    """A real process, in the midst of its imports: a quiet end, and no training."""
    run = tmp_path / "run"
    command = [sys.executable, "-X", "importtime", str(REPO / "train.py"), *OPTIONS, f"hydra.run.dir={run}"]
    process = subprocess.Popen([*command, f"data.annotations={phantom_table}"], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    imported = iter(process.stderr.readline, "")
    assert any(line.split()[-1] == module for line in imported)
    process.send_signal(signum)
    _, printed = process.communicate(timeout=250)
    assert process.returncode == code
    assert [line for line in printed.splitlines() if not line.startswith("import time:")] == []
    assert not (run / "metrics.csv").exists()


def listens(pid: int) -> bool:
    """Whether a process handles SIGUSR1."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.slow
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
            allowed = {0, 75, 130, 143, -signal.SIGKILL}
            if draw.random() < 0.8 and process.is_alive():
                signum = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
                if not listens(process.pid or 0):  # before the first line of train.py a signal ends it, as any program
                    allowed.add(-signum)
                os.kill(process.pid or 0, signum)
                kills += 1
            code = end(process)
            assert code in allowed, run.with_suffix(".out").read_text()
            if code == 0:
                break
        assert_same_runs(run, whole)
    assert kills >= 10
