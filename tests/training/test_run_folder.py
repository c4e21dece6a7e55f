"""A run folder knows whose it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fmcib_ssl.training.run_folder import (
    RunFolder,
    RunFolderError,
    check_same_run,
    refuse_foreign,
    saved_settings,
    settings_digest,
)

BEFORE = {
    "seed": 0,
    "loss": {"temperature": 0.1},
    "hardware": {"devices": 1},
    "trainer": {"max_epochs": 5, "max_steps": -1},
}


def test_the_same_id_through_all_starts(tmp_path: Path) -> None:
    ids = set()
    for step in (0, 7):
        folder = RunFolder(tmp_path / "run")
        folder.begin(BEFORE, {}, step=step)
        ids.add(folder.run_id)
        folder.release()
    assert len(ids) == 1 and len(ids.pop()) == 8
    assert [start["step"] for start in json.loads((tmp_path / "run" / "run.json").read_text())["starts"]] == [0, 7]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"run_id": 3}', "null", "[" * 100_000, "\\xff"]
    + [
        json.dumps({"run_id": "a", "starts": [], **wrong})
        for wrong in (
            {"finished": 3},
            {"starts": [1]},
            {"data_checksum": 7},
        )
    ],
    ids=lambda content: content[:60],
)
def test_a_damaged_state_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json is damaged .*restore it.*run=new"):
        RunFolder(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be used: Not a directory"):
        RunFolder(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "now",
    [
        {**BEFORE, "hardware": {"devices": 4}},
        {**BEFORE, "trainer": {"max_epochs": 9, "max_steps": -1}},
        {**BEFORE, "trainer": {"max_epochs": None, "max_steps": -1}},
        {**BEFORE, "logger": {"csv": {"path": "x"}}},
    ],
)
def test_what_may_differ(now: dict[str, object], tmp_path: Path) -> None:
    assert len(check_same_run(BEFORE, now, tmp_path)) == 1


def test_a_run_of_before_there_was_a_setting_is_the_same_run(tmp_path: Path) -> None:
    before, now = ({**BEFORE, "data": {"mining": "near", **more}} for more in ({}, {"padding": "constant"}))
    assert check_same_run(before, now, tmp_path) == []
    assert settings_digest(before) == settings_digest(now)
    with pytest.raises(RunFolderError, match=r"data\.padding: not set before, edge now"):
        check_same_run(before, {**now, "data": {"mining": "near", "padding": "edge"}}, tmp_path)


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({**BEFORE, "seed": 1}, "seed: 0 before, 1 now"),
        ({**BEFORE, "loss": {"temperature": 0.2}}, "loss.temperature: 0.1 before, 0.2 now"),
        ({**BEFORE, "trainer": {"max_epochs": 4, "max_steps": -1}}, "trainer.max_epochs: 5 before, 4 now"),
        ({**BEFORE, "trainer": {"max_epochs": 5, "max_steps": 3}}, "trainer.max_steps: -1 before, 3 now"),
        ({**BEFORE, "loss": {"temperature": 0.1, "margin": 1}}, "loss.margin: not set before, 1 now"),
    ],
)
def test_what_may_not(now: dict[str, object], line: str, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught:
        check_same_run(BEFORE, now, tmp_path)
    assert line in str(caught.value) and "run=new" in str(caught.value)


def test_other_lesions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_lesions("a" * 64)  # of a run that knows none yet
    folder.note(data_checksum="b" * 64)
    folder.check_lesions("a" * 64, "b" * 64)  # by an earlier version's checksum
    with pytest.raises(RunFolderError, match=r"bbbbbbbbbbbb, now aaaaaaaaaaaa.*run=new"):
        folder.check_lesions("a" * 64)


def test_nothing_is_written_before_a_start_has_passed_its_checks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(BEFORE, {}, step=0)
    folder.finish(step=5)
    folder.release()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    RunFolder(tmp_path).release()
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before


FOREIGN = ["thesis.docx", ".results.csv.0a1b2c3d.tmp", "config.yaml", "photos"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_others_is_not_touched(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "slurm-17.out").touch()
    with pytest.raises(RunFolderError, match=re.escape(f"is not the folder of a run and not empty (it has {name})")):
        RunFolder(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "slurm-17.out"])
    assert (folder / name).read_text() == "mine"


@pytest.mark.parametrize(
    "names",
    [
        ["train.log", "train_ddp_process_1.log", ".lock"],
        ["slurm-17.out", "rejected.csv", ".run.json.0a1b2c3d.tmp"],
        ["run.json", "notes.txt"],
        ["checkpoints/step-00000004.ckpt", "notes.txt"],
        ["config.yaml", "environment.json", "fold_0"],
    ],
    ids=lambda names: names[0],
)
def test_a_run_folder_is_one_whatever_its_start_came_to(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        (tmp_path / name).touch()
    if not any(tmp_path.glob("checkpoints/*")):
        (tmp_path / "checkpoints").rmdir()
    refuse_foreign(tmp_path)


def test_a_state_that_is_lost_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000004.ckpt").touch()
    with pytest.raises(RunFolderError, match=r"has checkpoints and no run\.json: restore .*run=new"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("content", ["a: [", "", "- 1", "42", "a: \x00"])
def test_damaged_settings_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.yaml is damaged .*run=new"):
        saved_settings(tmp_path)
