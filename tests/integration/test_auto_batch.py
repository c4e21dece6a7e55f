"""A run that looks for its batch is, to the last bit, the run that was told it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import WATCH, Watch, assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

from fmcib_ssl.run import pretrain
from fmcib_ssl.training import memory
from fmcib_ssl.training.run_folder import RunFolder
from fmcib_ssl.training.settings import ConfigError

SMALL = ["encoder=small", "hardware.precision=32-true", "trainer.max_epochs=-1"]
AUTO = [*SMALL, "hardware.auto_batch=true", "data.batch_size=auto"]
SLOW = pytest.mark.slow


class Room:
    """Memory for so many lesions, in a batch or in a chunk; steps that fit are really taken, on the CPU."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tried: list[int] = []
        self._take_steps = memory._take_steps

    def take_steps(self, settings: Any, parts: Any, batch_size: int, device: torch.device) -> None:
        self.tried.append(settings.method.get("chunk_size") or batch_size)
        if self.tried[-1] > self.limit:
            raise torch.OutOfMemoryError
        self._take_steps(settings, parts, batch_size, device)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    room = Room(3)
    monkeypatch.setattr(memory, "_gpu_of_this_process", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory, "_take_steps", room.take_steps)
    return room


def found_in(run: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((run / "run.json").read_text())["auto_batch"]
    return found


@pytest.mark.parametrize(
    "method", ["mined_contrast", *(pytest.param(name, marks=SLOW) for name in ("swav", "denoising"))]
)
def test_the_run_is_that_of_its_batch(method: str, phantom_table: Path, tmp_path: Path, room: Room) -> None:
    looked, told = tmp_path / "looked", tmp_path / "told"
    options = [*SMALL, f"method={method}", "trainer.max_steps=2", WATCH]
    pretrain(tiny_settings(phantom_table, looked, *options, *AUTO))
    first = Watch.latest.first_weights
    pretrain(tiny_settings(phantom_table, told, *options, "data.batch_size=3"))
    assert room.tried == [2, 4, 3] and found_in(looked) == {"batch_size": 3}
    assert_equal_weights(first, Watch.latest.first_weights)
    one, other = checkpoint_of(looked), checkpoint_of(told)
    assert_equal_weights(one["state_dict"], other["state_dict"])
    assert metrics_of(looked)["lr"].tolist() == metrics_of(told)["lr"].tolist()
    assert metrics_of(looked)["train/loss"].tolist() == metrics_of(told)["train/loss"].tolist()
    assert one["loops"] == other["loops"]
    assert {file.name for file in looked.iterdir()} == {file.name for file in told.iterdir()}
    # A later start keeps the batch, on a device with less memory, and when it is no longer asked to look.
    room.limit, room.tried = 2, []
    pretrain(tiny_settings(phantom_table, looked, *options, *AUTO, "trainer.max_steps=3"))
    pretrain(tiny_settings(phantom_table, looked, *options, *AUTO, "trainer.max_steps=4", "hardware.auto_batch=false"))
    assert not room.tried and found_in(looked) == {"batch_size": 3} and len(metrics_of(looked)) == 4


@pytest.mark.slow
def test_what_was_trained_keeps_its_batch(phantom_table: Path, tmp_path: Path, room: Room) -> None:
    options = [*SMALL, "data.batch_size=auto", "data.max_batch_size=2"]
    pretrain(tiny_settings(phantom_table, tmp_path, *options, "trainer.max_steps=1"))
    pretrain(tiny_settings(phantom_table, tmp_path, *options, "trainer.max_steps=2", "hardware.auto_batch=true"))
    assert not room.tried and "auto_batch" not in json.loads((tmp_path / "run.json").read_text())


@pytest.mark.slow
def test_the_largest_chunk(phantom_table: Path, tmp_path: Path, room: Room, caplog: pytest.LogCaptureFixture) -> None:
    options = ["method.chunk_size=1", "data.batch_size=4", "hardware.auto_batch=true", *SMALL, WATCH]
    with caplog.at_level("INFO", "fmcib_ssl"):
        pretrain(tiny_settings(phantom_table, tmp_path, *options, "trainer.max_steps=1"))
    assert room.tried == [2, 4, 3] and found_in(tmp_path) == {"chunk_size": 3}
    module: Any = Watch.latest.module
    assert module.chunk_size == 3
    assert "auto_batch takes chunk_size=3" in caplog.text
    assert "4 lesions on each of 1 cpu devices, in chunks of 3" in caplog.text


def test_other_processes_take_what_the_first_has_found(phantom_table: Path, tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.note(auto_batch={"batch_size": 5})
    other = RunFolder(tmp_path / "other", main_process=False)
    other.path = tmp_path  # it was not there yet when this process has looked
    assert memory._size_of_first_process(other, "batch_size", 5.0) == 5
    with pytest.raises(ConfigError, match="has found no chunk_size"):
        memory._size_of_first_process(other, "chunk_size", 0.0)
    first.release()


def test_no_room(phantom_table: Path, tmp_path: Path, room: Room) -> None:
    room.limit = 1
    with pytest.raises(ConfigError, match=r"not even batch_size=2 fits in the GPU's memory: take a smaller encoder"):
        pretrain(tiny_settings(phantom_table, tmp_path, *AUTO, "trainer.max_steps=1"))


def test_no_gpu(phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"there is none: set hardware\.auto_batch=false"):
        pretrain(tiny_settings(phantom_table, tmp_path, *AUTO, "trainer.max_steps=1"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.batch_size=8"], "data.batch_size=8 names one: set data.batch_size=auto"),
        (["+experiment=finetune", "data.batch_size=auto"], "hardware.auto_batch is for pretraining"),
    ],
)
def test_refused(options: list[str], words: str, phantom_table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_settings(phantom_table, tmp_path, "hardware.auto_batch=true", *options)
