"""The engine and the image, for as long as the tests run, and folders of a user who is nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_runs import Workspace
from docker_engine import CANARY, REVISION, DockerEngine
from tiny_runs import tiny_store

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
    return tiny_store(tmp_path_factory.mktemp("store") / "store")


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
