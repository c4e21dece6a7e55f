"""What a cluster does to a job, and the job comes back as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cluster_runs import (
    BATCH_SCRIPT,
    HELD_AT,
    NUM_STEPS,
    PATIENCE_S,
    REPO,
    TWO_NODES,
    TWO_TASKS,
    Bench,
    TrainingJob,
    assert_same_runs,
    starts_of,
)

pytestmark = pytest.mark.cluster


def assert_gone_on_in_the_same_folder(job: TrainingJob, whole: Path) -> None:
    assert_same_runs(job.run, whole)
    assert [start["step"] for start in starts_of(job.run)] == [0, HELD_AT]
    assert "resuming" in job.printed


def test_the_signal_that_announces_the_end(bench: Bench, whole_two: Path) -> None:
    """Two nodes with a data worker each: every process gets the signal."""
    job = bench.train(shape=TWO_NODES, held_rank=0)
    job.wait_until_held()
    job.signal("USR1")
    job.wait_until_complete(restarts=1)
    assert_gone_on_in_the_same_folder(job, whole_two)
    assert f"stopped by SIGUSR1 after step {HELD_AT}" in job.printed  # --open-mode=append: both starts are in one log


@pytest.mark.slow
@pytest.mark.parametrize("signum", ["USR1", "TERM"])
def test_preempted(signum: str, bench: Bench, whole_one: Path) -> None:
    """Without a signal asked for SIGTERM is all that comes, and would also come from scancel."""
    script = bench.folder / "pretrain.sbatch"
    lines = BATCH_SCRIPT.read_text().splitlines()
    script.write_text("\n".join(line for line in lines if signum == "USR1" or "#SBATCH --signal" not in line) + "\n")
    job = bench.train(script=script, held_rank=0)
    job.wait_until_held()
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    bench.cluster.wait(bench.cluster.submit(*urgent), ["COMPLETED"])  # takes all nodes, for a moment
    job.wait_until_complete(restarts=1)
    assert_gone_on_in_the_same_folder(job, whole_one)
    assert f"stopped by SIG{signum} after step {HELD_AT}" in job.printed


def test_a_killed_process_ends_the_job(bench: Bench, whole_two: Path) -> None:
    """The other one waits for it in a collective."""
    job = bench.train(shape=TWO_TASKS, held_rank=1)
    os.kill(job.wait_until_held(), signal.SIGKILL)
    ended = job.wait()
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] != "0:0"
    assert "task 1: Killed" in job.printed
    bench.cluster.run("scontrol", "requeue", job.number)
    bench.cluster.wait_until(lambda: job.state()["Restarts"] == "1" or None, "the job in the queue again")
    assert job.wait()["JobState"] == "COMPLETED", job.printed
    assert_same_runs(job.run, whole_two)
    assert len(starts_of(job.run)) == 2


@pytest.mark.slow
def test_the_time_limit(bench: Bench, whole_one: Path) -> None:
    """Slurm's own clock: the limit is drawn near while the job is in its middle."""
    job = bench.train(held_rank=0, sbatch=["--signal=USR1@110"])
    job.wait_until_held()
    minutes, seconds = map(int, job.state()["RunTime"].split(":")[1:])
    bench.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 1 + (seconds > 40)}")
    bench.cluster.wait_until(lambda: job.state()["Restarts"] == "1" or None, "the job in the queue again", PATIENCE_S)
    bench.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    job.wait_until_complete(restarts=1)
    assert_gone_on_in_the_same_folder(job, whole_one)
    assert f"stopped by SIGUSR1 after step {HELD_AT}" in job.printed


@pytest.mark.slow
def test_cancelled_and_submitted_again_by_hand(bench: Bench, whole_one: Path) -> None:
    job = bench.train(held_rank=0)
    job.wait_until_held()
    bench.cluster.run("scancel", job.number)
    assert job.wait()["JobState"] == "CANCELLED" and job.state()["Restarts"] == "0"
    bench.cluster.wait_until(lambda: "The same command resumes" in job.printed or None, "the last words", 60)
    assert f"stopped by SIGTERM after step {HELD_AT}" in job.printed
    again = bench.train()  # the same line
    again.wait_until_complete()
    assert_gone_on_in_the_same_folder(again, whole_one)


@pytest.mark.slow
def test_a_signal_before_training(bench: Bench, whole_one: Path) -> None:
    """While torch is imported; there is nothing to save, and the job is queued again all the same."""
    job = bench.train()
    bench.cluster.wait_until(
        lambda: next((bench.folder / "runs").rglob("train.log"), None), "the first line of the log"
    )
    job.signal("USR1")
    job.wait_until_complete(restarts=1)
    assert_same_runs(job.run, whole_one)


@pytest.mark.slow
def test_a_signal_after_the_last_step(bench: Bench, whole_one: Path) -> None:
    """All is learned: the results are still written, and there is nothing to queue again for."""
    job = bench.train(held_rank=0, held_at=NUM_STEPS)
    job.wait_until_held()
    job.signal("USR1")
    job.wait_until_complete()
    assert_same_runs(job.run, whole_one)
    assert len(starts_of(job.run)) == 1


@pytest.mark.slow
def test_a_job_that_may_not_be_queued_again(bench: Bench) -> None:
    """It stops where it saved, and says what to do; it does not train on towards its death."""
    job = bench.train(held_rank=0, sbatch=["--no-requeue"])
    job.wait_until_held()
    job.signal("USR1")
    ended = job.wait()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    assert "could not be requeued" in job.printed and "submit it once more to resume" in job.printed
    assert (job.run / "checkpoints" / "last.ckpt").resolve().name == f"step-{HELD_AT:08d}.ckpt"


@pytest.mark.slow
def test_where_the_processes_have_no_scontrol(bench: Bench, whole_two: Path) -> None:
    """As in a container: the signal goes to the batch script, which hands it on, waits, and queues the job again.

    `env` stands for the container's command; it takes away the path on which Slurm's commands are found.
    """
    job = bench.train(
        shape=TWO_NODES,
        script=REPO / "scripts" / "slurm" / "pretrain_container.sbatch",
        environ={"CONTAINER": "env PATH=/nowhere"},
        held_rank=0,
    )
    job.wait_until_held()
    bench.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until_complete(restarts=1)
    assert_gone_on_in_the_same_folder(job, whole_two)
    assert f"stopped by SIGUSR1 after step {HELD_AT}" in job.printed
