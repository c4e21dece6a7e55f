"""The cluster, for as long as the tests run, and the runs that nothing happened to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import ONE, TWO_TASKS, Bench, Shape
from slurm_cluster import SlurmCluster
from tiny_runs import NUM_SCANS, tiny_store

from fmcib_ssl.data.phantom import make_archive


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := SlurmCluster.why_not():
        pytest.skip(reason)
    # As Ctrl-C: what is at work is taken out of the queue, and the cluster goes down.
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 128 + signal.SIGTERM))
    with SlurmCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a small phantom archive: six lesions in four scans."""
    return make_archive(tmp_path_factory.mktemp("archive"), NUM_SCANS, num_workers=1, progress=False)


@pytest.fixture(scope="session")
def store(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store(tmp_path_factory.mktemp("store") / "store", archive)


@pytest.fixture
def bench(cluster: SlurmCluster, store: Path, tmp_path: Path) -> Iterator[Bench]:
    """For one test; what it leaves in the queue is taken out."""
    yield Bench(cluster, store, tmp_path)
    cluster.run("scancel", "--user=root", "--full", check=False)
    cluster.wait_until(lambda: cluster.run("squeue", "--noheader") == "" or None, "an empty queue", 60)


def _uninterrupted(cluster: SlurmCluster, store: Path, folder: Path, shape: Shape) -> Path:
    job = Bench(cluster, store, folder).train(shape=shape)
    job.wait_until_complete()
    return job.run


@pytest.fixture(scope="session")
def whole_one(cluster: SlurmCluster, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing happened to."""
    return _uninterrupted(cluster, store, tmp_path_factory.mktemp("whole_one"), ONE)


@pytest.fixture(scope="session")
def whole_two(cluster: SlurmCluster, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes on one node that nothing happened to."""
    return _uninterrupted(cluster, store, tmp_path_factory.mktemp("whole_two"), TWO_TASKS)
