"""Folders on the command line of `train.py`: of configurations, and of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmcib_ssl.training.config import check_command_line
from fmcib_ssl.training.settings import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUN = ["+experiment=ct_infonce", "data.annotations=my.csv"]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_command_line(arguments, CONFIGS)
    return str(caught.value)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    file = tmp_path / "own" / "experiment" / "misspelt.yaml"
    file.write_text("# @package _global_\ndefaults:\n  - ct_infonce\nloss: {temprature: 0.3}\n")
    return tmp_path / "own"


def test_options_on_the_search_path_are_checked(own: Path) -> None:
    message = refusal(f"hydra.searchpath=[{own}]", "+experiment=misspelt", "data.annotations=my.csv")
    assert "loss.temprature" in message and "Did you mean loss.temperature?" in message


@pytest.mark.parametrize("option", [["--config-path", "nowhere"], ["hydra.searchpath=[nowhere]"]])
def test_a_folder_that_is_not_there(option: list[str]) -> None:
    assert "nowhere: there is no such folder" in refusal(*option, *RUN)


def test_another_folder_of_configurations_is_the_one_that_is_checked(tmp_path: Path) -> None:
    assert "+experiment: there is no such group" in refusal("--config-path", str(tmp_path), *RUN)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is not a folder" in refusal(*RUN, f"hydra.run.dir={tmp_path}/file/run")


def test_a_run_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert "paths.runs=DIR" in refusal(*RUN, f"hydra.run.dir={tmp_path}/run")
    check_command_line([*RUN, f"paths.runs={tmp_path.parent}"], CONFIGS)


def test_a_new_run_chooses_its_folder_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "leave one of them out" in refusal(*RUN, "run=new", "hydra.run.dir=here")
    monkeypatch.setenv("LOCAL_RANK", "1")  # whom Lightning started, with the folder of the first
    check_command_line([*RUN, "run=new", "hydra.run.dir=here"], CONFIGS)


def test_a_sweep_over_lengths_has_a_folder_for_each() -> None:
    assert check_command_line(["-m", *RUN, "seed=0,1"], CONFIGS) == [*RUN, "seed=0,1", "-m"]
    lengths = [*RUN, "trainer.max_epochs=1,2"]
    added = "hydra.sweep.subdir='${run_key:${hydra.sweep.dir},trainer.max_epochs}'"
    assert check_command_line(["-m", *lengths], CONFIGS) == [*lengths, added, "-m"]
