"""A run that looks for its batch is, to the last bit, the run that was told it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import WATCH, Watch, assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

from fmcib_ssl.run import pretrain
from fmcib_ssl.training import batch_search as auto_batch
from fmcib_ssl.training.batch_search import SmallestOfAll
from fmcib_ssl.training.settings import ConfigError

SMALL = ["encoder=small", "hardware.precision=32-true", "trainer.max_epochs=-1"]
AUTO = [*SMALL, "hardware.auto_batch=true", "data.batch_size=auto"]


SLOW = pytest.mark.slow


class RoomFor:
    """Memory for so many lesions; steps that fit are really taken."""

    limit = 3_000_000_000

    def __init__(self, most: int) -> None:
        self.most = most
        self.tried: list[int] = []

    def holds(self, size: int, step: Callable[[], None]) -> bool:
        self.tried.append(size)
        if size <= self.most:
            step()
        return size <= self.most


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> RoomFor:
    room = RoomFor(3)
    monkeypatch.setattr(auto_batch, "room_of", lambda *_, **__: room)
    return room


def found_in(run: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((run / "run.json").read_text())["auto_batch"]
    return found


@pytest.mark.parametrize(
    "method", ["mined_contrast", *(pytest.param(name, marks=SLOW) for name in ("swav", "denoising"))]
)
def test_the_run_is_that_of_its_batch(method: str, phantom_table: Path, tmp_path: Path, room: RoomFor) -> None:
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


def test_a_later_start_keeps_the_batch(phantom_table: Path, tmp_path: Path, room: RoomFor) -> None:
    run = tmp_path / "run"
    pretrain(tiny_settings(phantom_table, run, *AUTO, "trainer.max_steps=1"))
    room.most, room.tried = 2, []  # another device, with less memory
    pretrain(tiny_settings(phantom_table, run, *AUTO, "trainer.max_steps=3"))
    assert not room.tried and found_in(run) == {"batch_size": 3}
    pretrain(tiny_settings(phantom_table, run, *AUTO, "trainer.max_steps=4", "hardware.auto_batch=false"))
    assert found_in(run) == {"batch_size": 3}
    assert len(metrics_of(run)) == 4


@pytest.mark.slow
def test_what_was_trained_keeps_its_batch(phantom_table: Path, tmp_path: Path, room: RoomFor) -> None:
    options = [*SMALL, "data.batch_size=auto", "data.max_batch_size=2"]
    pretrain(tiny_settings(phantom_table, tmp_path, *options, "trainer.max_steps=1"))
    pretrain(tiny_settings(phantom_table, tmp_path, *options, "trainer.max_steps=2", "hardware.auto_batch=true"))
    assert not room.tried and "auto_batch" not in json.loads((tmp_path / "run.json").read_text())


def test_the_largest_chunk(
    phantom_table: Path, tmp_path: Path, room: RoomFor, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["method.chunk_size=1", "data.batch_size=4", "hardware.auto_batch=true", *SMALL, WATCH]
    with caplog.at_level("INFO", "fmcib_ssl"):
        pretrain(tiny_settings(phantom_table, tmp_path, *options, "trainer.max_steps=1"))
    assert room.tried == [2, 4, 3] and found_in(tmp_path) == {"chunk_size": 3}
    module: Any = Watch.latest.module
    assert module.chunk_size == 3
    assert "auto_batch takes chunk_size=3: 4 do not" in caplog.text
    assert "4 lesions on each of 1 cpu devices, in chunks of 3" in caplog.text


@pytest.mark.slow
def test_another_device_has_less(
    phantom_table: Path, tmp_path: Path, room: RoomFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallestOfAll, "setup", lambda self, *_, **__: self._take(2))
    looked, told = tmp_path / "looked", tmp_path / "told"
    options = [*SMALL, "trainer.max_steps=2"]
    pretrain(tiny_settings(phantom_table, looked, *options, *AUTO))
    pretrain(tiny_settings(phantom_table, told, *options, "data.batch_size=2"))
    assert found_in(looked) == {"batch_size": 2}
    assert_equal_weights(checkpoint_of(looked)["state_dict"], checkpoint_of(told)["state_dict"])


def test_no_room(phantom_table: Path, tmp_path: Path, room: RoomFor) -> None:
    room.most = 1
    with pytest.raises(ConfigError, match=r"not even batch_size=2 fits in 3\.0 GB: take a smaller encoder"):
        pretrain(tiny_settings(phantom_table, tmp_path, *AUTO, "trainer.max_steps=1"))


@pytest.mark.slow
def test_a_real_search_on_this_machine(phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fmcib_ssl"):
        pretrain(tiny_settings(phantom_table, tmp_path, *AUTO, "data.max_batch_size=3", "trainer.max_steps=1"))
    assert found_in(tmp_path) == {"batch_size": 3}
    assert "no more are tried: data.max_batch_size=3" in caplog.text


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
