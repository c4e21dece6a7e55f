"""What is kept about a run, against git and the installed packages themselves."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import fmcib_ssl
from fmcib_ssl.io import write_json
from fmcib_ssl.training import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_what_is_not_committed(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "kept.txt").write_text("first")
    git(tmp_path, "add", "kept.txt")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "package").mkdir()
    assert provenance.git_state(tmp_path / "package") == {"commit": commit, "uncommitted": []}
    (tmp_path / "kept.txt").write_text("second")
    (tmp_path / "new.txt").write_text("new")
    state = provenance.git_state(tmp_path)
    assert state is not None and state["commit"] == commit
    assert {tuple(line.split()) for line in state["uncommitted"]} == {("M", "kept.txt"), ("??", "new.txt")}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # and without git
    assert provenance.git_state(Path(provenance.__file__).parent) is None


def test_the_environment_survives_a_file(tmp_path: Path) -> None:
    environment = provenance.environment()
    write_json(tmp_path / "environment.json", environment)
    assert json.loads((tmp_path / "environment.json").read_text()) == environment
    assert environment["command"] == sys.argv
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["numpy"] == numpy.__version__
    assert environment["packages"]["fmcib_ssl"] == fmcib_ssl.__version__
    assert all(environment["packages"].values()), "one of them is known under another name"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no_such_package",))
    assert provenance.environment()["packages"] == {"no_such_package": None}
