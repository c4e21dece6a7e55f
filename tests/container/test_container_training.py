"""What a user does in the container, as somebody whom the image does not know, with code that nobody can write."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cluster_runs import HELD_AT, assert_same_runs, starts_of
from container_runs import Workspace
from docker_engine import REVISION

import fmcib_ssl

pytestmark = pytest.mark.container


def test_the_demo(workspace: Workspace) -> None:
    """`make demo`, shortened: scans, store, training, features, probes, a page."""
    printed = workspace.run("demo", "trainer.max_epochs=2").stdout
    assert "Traceback" not in printed, printed
    (run,) = (workspace.folder / "runs" / "demo").iterdir()
    assert f"encoder   runs/demo/{run.name}/encoder.safetensors" in printed
    assert fmcib_ssl.load_encoder(run / "encoder.safetensors").preprocessing.spacing_mm
    assert "\nrandom weights " in printed  # a row of the table
    assert "What the encoder learned from synthetic scans" in (run / "report.html").read_text()
    for path in workspace.folder.rglob("*"):
        its = path.lstat()
        assert (its.st_uid, its.st_gid) == (workspace.uid, workspace.gid), path
        assert path.is_symlink() or not its.st_mode & stat.S_IWOTH, path


def test_the_run_knows_the_commit_of_its_image(workspace: Workspace, whole: Path) -> None:
    label = '--format={{index .Config.Labels "org.opencontainers.image.revision"}}'
    commit = workspace.engine.docker("image", "inspect", label, workspace.image).stdout.strip()
    assert json.loads((whole / "environment.json").read_text())["git"]["commit"] == (commit or None)
    assert commit == REVISION or "FMCIB_SSL_IMAGE" in os.environ


def test_stopped_and_gone_on(workspace: Workspace, whole: Path) -> None:
    command = workspace.training(*workspace.gate())
    running = workspace.start(*command, docker=["--name=fmcib_ssl-test"])
    try:
        workspace.wait_until_held(running)
        workspace.engine.docker("stop", "fmcib_ssl-test")
        printed, _ = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 143, printed  # 137: it was killed
    assert f"stopped by SIGTERM after step {HELD_AT}" in printed
    printed = workspace.run(*command).stdout
    assert "resuming" in printed
    run = workspace.folder / "runs" / "1"
    assert [start["step"] for start in starts_of(run)] == [0, HELD_AT]
    assert_same_runs(run, whole)


#: One batch of 85 MB: four views of 6 lesions of 96 x 96 x 96 voxels.
LARGE = ("data.batch_size=6", "data.patch_size=[96,96,96]", "trainer.max_epochs=null", "trainer.max_steps=1")


def test_workers_hand_over_large_batches(workspace: Workspace) -> None:
    workspace.run(*workspace.training(*LARGE))


def test_without_the_shared_memory_that_the_script_asks_for(workspace: Workspace) -> None:
    """Docker's own 64 MB."""
    done = workspace.run(*workspace.training(*LARGE), docker=["--shm-size=64m"], check=False)
    assert done.returncode == 1
    assert "/dev/shm is full" in done.stdout and "--shm-size" in done.stdout
    assert "Traceback" not in done.stdout


def test_nothing_is_trained_without_a_mount(workspace: Workspace) -> None:
    for options in ([], ["--read-only"], [f"--user={workspace.uid}"]):
        done = workspace.engine.docker(
            "run", "--rm", *options, workspace.image, "train", "+experiment=phantom_ntxent_mined", check=False
        )
        assert done.returncode == 1
        assert "no permission for /workspace" in done.stdout and "in a container, mount a folder" in done.stdout
        assert "Traceback" not in done.stdout


def test_nobody_but_root_can_change_the_code(workspace: Workspace) -> None:
    """Also without `--read-only`."""
    program = (
        "import os, fmcib_ssl\n"
        "for folder in ('/opt/venv', os.path.dirname(fmcib_ssl.__file__), '/workspace'):\n"
        "    assert not any(os.access(os.path.join(*path, name), os.W_OK) for *path, names, files in os.walk(folder)\n"
        "                   for name in ('.', *files)), folder\n"
    )
    options = (f"--user={workspace.uid}:{workspace.gid}", "--entrypoint=python", workspace.image, "-c", program)
    workspace.engine.docker("run", "--rm", *options)


def test_what_the_image_does_by_itself(workspace: Workspace) -> None:
    assert "fmcib-ssl VERB" in workspace.engine.docker("run", "--rm", "--read-only", workspace.image).stdout
