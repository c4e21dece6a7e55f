"""The engine, the image and the cluster, for as long as the tests run, and folders of a user who is nobody."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cluster_runs import TWO_NODES
from container_runs import ContainerBench, Workspace
from docker_engine import CANARY, REVISION, DockerEngine
from slurm_cluster import SlurmCluster

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.phantom import make_archive
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.data.store import StoreSettings

#: A UID and a GID without an entry in the image's /etc/passwd.
NOBODY = 4711


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerEngine]:
    if reason := DockerEngine.why_not():
        pytest.skip(reason)
    with DockerEngine(tmp_path_factory.mktemp("engine")) as engine:
        yield engine


@pytest.fixture(scope="session")
def image(engine: DockerEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image, built with BASE_IMAGE and TORCH_INDEX_URL of the environment, unless FMCIB_SSL_IMAGE names one."""
    if name := os.environ.get("FMCIB_SSL_IMAGE"):
        return name
    given = {name: os.environ[name] for name in ("BASE_IMAGE", "TORCH_INDEX_URL") if os.environ.get(name)}
    base = given.get("BASE_IMAGE") or engine.base_image()
    settings = Path.home() / ".config" / "pip" / "pip.conf"
    secret = tmp_path_factory.mktemp("secret") / "pip.conf"
    secret.write_text(f"# {CANARY}\n" + (settings.read_text() if settings.is_file() else ""))
    arguments = {**given, "BASE_IMAGE": base, "REVISION": REVISION}
    return engine.build("fmcib_ssl:test", arguments, {"pip_conf": secret})


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six lesions in four phantom scans."""
    folder = tmp_path_factory.mktemp("store") / "store"
    table = make_archive(folder.with_name("archive"), 4, num_workers=1, progress=False)
    prepare_store(read_annotations(table), folder, StoreSettings(spacing_mm=1.5), num_workers=0)
    return folder


def _workspace(folder: Path, engine: DockerEngine, image: str, store: Path) -> Workspace:
    folder.mkdir()
    uid, gid = os.getuid() or NOBODY, os.getgid() or NOBODY
    os.chown(folder, uid, gid)
    return Workspace(engine, image, folder, store, uid, gid)


@pytest.fixture
def workspace(engine: DockerEngine, image: str, store: Path, tmp_path: Path) -> Workspace:
    return _workspace(tmp_path / "workspace", engine, image, store)


@pytest.fixture(scope="session")
def whole(engine: DockerEngine, image: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run under Docker that nothing happened to."""
    workspace = _workspace(tmp_path_factory.mktemp("whole") / "workspace", engine, image, store)
    workspace.run(*workspace.training())
    return workspace.folder / "runs" / "1"


@pytest.fixture(scope="session")
def unpacked(engine: DockerEngine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image as a folder, which Charliecloud runs without an engine."""
    if shutil.which("ch-run") is None:
        pytest.skip("there is no Charliecloud here; `make test-container` installs Debian's")
    folder = tmp_path_factory.mktemp("unpacked")
    engine.unpack(image, folder / "image")
    yield folder / "image"
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if reason := SlurmCluster.why_not():
        pytest.skip(reason)
    # pytest's own folders are for root alone, which munge does not like.
    with TemporaryDirectory(prefix="fmcib_ssl-cluster-") as folder, SlurmCluster(Path(folder)) as cluster:
        cluster.environ["USER"] = "root"  # which ch-run must know
        yield cluster


@pytest.fixture
def bench(cluster: SlurmCluster, store: Path, unpacked: Path, tmp_path: Path) -> Iterator[ContainerBench]:
    """For one test; what it leaves in the queue is taken out."""
    yield ContainerBench(cluster, store, tmp_path, unpacked)
    cluster.run("scancel", "--user=root", "--full", check=False)
    cluster.wait_until(lambda: cluster.run("squeue", "--noheader") == "" or None, "an empty queue", 60)


@pytest.fixture(scope="session")
def whole_two(cluster: SlurmCluster, store: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Slurm job of two nodes that nothing happened to."""
    job = ContainerBench(cluster, store, tmp_path_factory.mktemp("whole_two"), unpacked).submit(shape=TWO_NODES)
    job.wait_until_complete()
    return job.run
