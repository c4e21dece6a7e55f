"""What is recorded about a run, against git and the installed packages themselves; and what its ranks agree on."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pandas as pd
import pytest

import fmcib_ssl
from fmcib_ssl.io import write_json
from fmcib_ssl.training import summary


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
    assert summary._git_state(tmp_path / "package") == {"commit": commit, "uncommitted": []}
    (tmp_path / "kept.txt").write_text("second")
    (tmp_path / "new.txt").write_text("new")
    state = summary._git_state(tmp_path)
    assert state is not None and state["commit"] == commit
    assert {tuple(line.split()) for line in state["uncommitted"]} == {("M", "kept.txt"), ("??", "new.txt")}


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary._git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # and without git
    assert summary._git_state(Path(summary.__file__).parent) is None


def test_the_environment_survives_a_file(tmp_path: Path) -> None:
    environment = summary.environment()
    write_json(tmp_path / "environment.json", environment)
    assert json.loads((tmp_path / "environment.json").read_text()) == environment
    assert environment["command"] == sys.argv
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["numpy"] == numpy.__version__
    assert environment["packages"]["fmcib_ssl"] == fmcib_ssl.__version__
    assert all(environment["packages"].values()), "one of them is known under another name"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_PACKAGES", ("no_such_package",))
    assert summary.environment()["packages"] == {"no_such_package": None}


def facts(**settings: Any) -> dict[str, Any]:
    table = pd.DataFrame({"lesion_id": ["a", "b"], "center_z": [1.0, 2.0], "image_path": ["x", "y"]})
    values = {"seed": 0, "paths": {"run": "/one"}, "stalls": "/one/stalls", "data": {"store": "/s"}}
    return summary.facts_of_rank({**values, **settings}, SimpleNamespace(lesions=table))


def test_the_same_run_elsewhere_is_the_same() -> None:
    elsewhere = facts(paths={"run": "/two"}, stalls="/two/stalls", data={"store": "/scratch/s"})
    assert summary._differences([facts(), elsewhere]) == []


def test_values_are_told_with_their_ranks() -> None:
    lines = summary._differences([facts(), facts(seed=1), facts(seed=1), facts(seed=2)])
    assert lines == ["seed: 0 on rank 0; 1 on ranks 1, 2; 2 on rank 3"]


def test_code_and_versions_count() -> None:
    other = facts() | {"code of fmcib_ssl": "0", "version of torch": "1.0"}
    lines = summary._differences([facts(), other])
    assert [line.partition(":")[0] for line in lines] == ["version of torch", "code of fmcib_ssl"]
