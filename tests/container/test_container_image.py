"""What the image is made of: how large it is, and what must not be in it."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from typing import IO

import pytest
from docker_engine import CANARY, DockerEngine

pytestmark = pytest.mark.container

#: The folders that the Dockerfile makes; what is elsewhere is the base image's, or does not belong there.
OURS = re.compile(r"(opt|workspace|opt/venv(/.*)?)")
NOT_WANTED = re.compile(r"\.git|\.cache|\.netrc|\.pypirc|\.ssh|pip\.conf|.*\.whl|\.env|id_rsa")


def test_size(engine: DockerEngine, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nearly all of it is one layer, which a change of the code leaves alone."""
    history = engine.docker("history", "--no-trunc", "--human=false", "--format={{json .}}", image).stdout
    sizes = {layer["CreatedBy"]: int(layer["Size"]) for layer in map(json.loads, history.splitlines())}
    torch = engine.docker("run", "--rm", "--entrypoint=python", image, "-c", "import torch; print(torch.__version__)")
    with capsys.disabled():
        print(f"\n{engine.docker('image', 'ls', image).stdout}torch {torch.stdout}")
        print(engine.docker("history", "--format={{.Size}}\t{{.CreatedBy}}", image).stdout)
    (environment,) = (size for step, size in sizes.items() if step.startswith("COPY /opt/venv"))
    (package,) = (size for step, size in sizes.items() if "pip install" in step)
    assert package < 5e6 < environment


def test_nothing_that_does_not_belong_there_is_in_any_layer(engine: DockerEngine, image: str) -> None:
    """Read from the layers as they are pushed: what a later one hides is seen too."""
    strange, has_secret, num_files = [], [], 0
    with subprocess.Popen(["docker", "save", image], env=engine.environ, stdout=subprocess.PIPE) as save:
        assert save.stdout is not None
        with tarfile.open(fileobj=save.stdout, mode="r|") as archive:
            for layer in _layers(archive):
                members = []
                for member in layer:
                    members.append(member)
                    content = layer.extractfile(member) if member.isfile() else None  # a stream has no way to a link's
                    if content is not None and _holds(content, CANARY.encode()):
                        has_secret.append(member.name)
                if any(_name(member).startswith(("opt/venv", "workspace")) for member in members):
                    num_files += len(members)
                    strange += [_name(member) for member in members if _is_strange(member)]
    assert save.returncode == 0
    assert num_files > 10_000
    assert not has_secret
    assert not strange
    for look in (("history", "--no-trunc"), ("image", "inspect")):
        assert CANARY not in engine.docker(*look, image).stdout


def _layers(archive: tarfile.TarFile) -> Iterator[tarfile.TarFile]:
    """The layers in what `docker save` writes, whatever it calls them: its members that are archives themselves."""
    for member in archive:
        content = archive.extractfile(member)
        if content is None:
            continue
        try:
            layer = tarfile.open(fileobj=content, mode="r|*")  # noqa: SIM115
        except tarfile.ReadError:
            continue
        with layer:
            yield layer


def _name(member: tarfile.TarInfo) -> str:
    return member.name.removeprefix("./").rstrip("/")


def _is_strange(member: tarfile.TarInfo) -> bool:
    """Elsewhere than in the image's own folders, by its name not for others, or theirs to write."""
    name = _name(member)
    if member.isdir() and not OURS.fullmatch(name):
        return False  # the base's, touched: what is in it would be listed too
    writable = not member.issym() and member.mode & 0o022
    return (
        not OURS.fullmatch(name)
        or any(NOT_WANTED.fullmatch(part) for part in name.split("/"))
        or bool(writable)
        or member.uid != 0
    )


def _holds(content: IO[bytes], wanted: bytes) -> bool:
    tail = b""
    while chunk := content.read(1 << 22):
        if wanted in tail + chunk:
            return True
        tail = chunk[-len(wanted) :]
    return False
