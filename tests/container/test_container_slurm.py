"""`pretrain_container.sbatch` on a real cluster, with the image in Charliecloud, which needs no engine on the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_runs import HELD_AT, ONE, TWO_NODES, TrainingJob, assert_same_runs, starts_of
from container_runs import ContainerBench

pytestmark = pytest.mark.container


def assert_gone_on_in_the_same_folder(job: TrainingJob, whole: Path) -> None:
    job.wait_until_complete(restarts=1)
    assert_same_runs(job.run, whole)
    assert [start["step"] for start in starts_of(job.run)] == [0, HELD_AT]
    assert f"after step {HELD_AT}" in job.printed and "resuming" in job.printed


def test_the_signal_that_announces_the_end(bench: ContainerBench, whole_two: Path) -> None:
    """It comes to the batch script alone, which queues the job again when all processes have saved."""
    job = bench.submit(shape=TWO_NODES, held=True)
    job.wait_until_held()
    bench.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    assert_gone_on_in_the_same_folder(job, whole_two)
    assert f"stopped by SIGUSR1 after step {HELD_AT}" in job.printed


def test_cancelled_is_not_queued_again(bench: ContainerBench) -> None:
    job = bench.submit(shape=ONE, held=True)
    job.wait_until_held()
    bench.cluster.run("scancel", job.number)
    assert job.wait()["JobState"] == "CANCELLED"
    assert job.state()["Restarts"] == "0"
    bench.cluster.wait_until(lambda: "The same command resumes" in job.printed or None, "the last words", 30)


def test_the_batch_script_ends_as_training_does(bench: ContainerBench) -> None:
    ended = (job := bench.submit("data.store=/nowhere", shape=ONE)).wait(60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), job.printed
    assert "data.store=/nowhere cannot be read on" in job.printed and "Traceback" not in job.printed


def test_nodes_whose_names_do_not_resolve_in_the_container(bench: ContainerBench) -> None:
    """The container has an /etc/hosts of its own instead of the nodes'."""
    hosts = bench.folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    environ = {"CONTAINER": bench.container(f"--bind={hosts}:/etc/hosts")}
    job = bench.submit(shape=TWO_NODES, environ=environ)
    assert job.wait(90)["JobState"] == "FAILED"
    assert "node1" in job.printed and "Traceback" not in job.printed, job.printed
