"""Stopped after any step and gone on with: the same run, whatever Lightning's loops were counting at that moment."""

from __future__ import annotations

import io
import logging
import resource
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_trainer import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fmcib_ssl.data.loader import EpochSampler, ResumableLoader
from fmcib_ssl.training import signals
from fmcib_ssl.training.checkpoints import RunCheckpoints, WholeFileIO, find_checkpoint, step_of
from fmcib_ssl.training.loggers import MetricsFile, read_metrics
from fmcib_ssl.training.run_folder import RunFolderError
from fmcib_ssl.types import SampleKey

NUM_BATCHES = 3


class Numbers(Dataset[Tensor]):
    """What an item is follows from epoch and index, so every batch of a run is another one."""

    def __getitem__(self, key: SampleKey) -> Tensor:
        return torch.tensor([float(key.index), float(key.epoch), 1.0])


class Numbering(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        def num_trained() -> int:
            return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed)

        # As ours: a loader without a generator draws from the global random state whenever it is asked for an epoch.
        generator = torch.Generator().manual_seed(0)
        sampler = EpochSampler(2 * NUM_BATCHES, 2)
        return ResumableLoader(sampler, num_trained, dataset=Numbers(), generator=generator)


class Net(L.LightningModule):
    """Dropout draws from the global random state; AdamW and a schedule have states of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("of_epoch", self.net[0].weight.norm())  # a row of its own, written after the epoch's last step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        total = self.trainer.estimated_stepping_batches  # makes Lightning forget the place in the epoch
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2 + int(total > 1e6), gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fmcib_ssl"] = {"extra": {"run_id": "mine"}}


class SignalAfter(L.Callback):
    """Lets a signal arrive while a step is taken."""

    def __init__(self, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps, self.monkeypatch = num_steps, monkeypatch

    def on_before_zero_grad(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == self.num_steps:
            self.monkeypatch.setattr(signals, "_received", signals.signal.SIGTERM)


def checkpointing(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return tiny_trainer(*callbacks, enable_checkpointing=True, plugins=[WholeFileIO()], **options)


def fit(folder: Path, *callbacks: L.Callback, **arguments: Any) -> L.Trainer:
    """One start of the run in a folder, as `fmcib_ssl.run` makes it."""
    torch.manual_seed(0)
    checkpoint = find_checkpoint(folder, "mine")
    step = step_of(checkpoint) if checkpoint else 0
    metrics = MetricsFile(folder / "metrics.csv")
    metrics.resume_from(Any, step, {})  # type: ignore[arg-type]
    saving = {key: arguments.pop(key) for key in list(arguments) if key in ("every_n_train_steps", "save_top_k")}
    trainer = checkpointing(RunCheckpoints(folder, **saving), *callbacks, logger=metrics, **arguments)
    torch.manual_seed(100 + step)  # the state that dropout draws from has to come from the checkpoint
    trainer.fit(Net(), Numbering(), ckpt_path=checkpoint)
    return trainer


def state_of(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return checkpoint


def assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


LENGTHS = [
    pytest.param({"max_epochs": 3}, 9, id="epochs"),
    pytest.param({"max_epochs": -1, "max_steps": 8}, 8, id="steps"),
    pytest.param({"max_epochs": 3, "accumulate_grad_batches": 2}, 6, id="accumulated"),
    pytest.param({"max_epochs": 5, "limit_train_batches": 1}, 5, id="epochs of one step"),
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.setattr(signals, "_received", None)
    yield
    logging.getLogger("lightning.pytorch").setLevel(logging.NOTSET)


@pytest.mark.parametrize(("length", "num_steps"), LENGTHS)
def test_stopped_after_any_step_and_gone_on_with(
    length: dict[str, Any], num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "whole", **length)
    whole, rows = state_of(tmp_path / "whole"), read_metrics(tmp_path / "whole" / "metrics.csv")
    assert whole["global_step"] == num_steps
    for stop in range(1, num_steps):
        folder = tmp_path / str(stop)
        with pytest.raises(signals.Stopped) as stopped:
            fit(folder, SignalAfter(stop, monkeypatch), **length)
        assert stopped.value.exit_code == 143
        assert [path.name for path in folder.glob("step-*")] == [f"step-{stop:08d}.ckpt"]
        monkeypatch.setattr(signals, "_received", None)
        fit(folder, **length)
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "fmcib_ssl_rng", "global_step", "epoch", "loops")
        for part in parts:
            assert_same(state_of(folder)[part], whole[part], f"stopped after {stop}: {part}")
        assert read_metrics(folder / "metrics.csv") == rows, f"stopped after {stop}"


def test_killed_after_any_save_and_gone_on_with(tmp_path: Path) -> None:
    """Rows that were logged after the checkpoint are logged again, and stand there once."""
    fit(tmp_path / "whole", max_epochs=3, accumulate_grad_batches=2, every_n_train_steps=1, save_top_k=100)
    whole, rows = state_of(tmp_path / "whole"), read_metrics(tmp_path / "whole" / "metrics.csv")
    saved = sorted((tmp_path / "whole").glob("step-*.ckpt"))
    assert [step_of(path) for path in saved] == list(range(1, 7))
    for path in saved[:-1]:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / path.name).hardlink_to(path)
        (folder / "metrics.csv").write_bytes((tmp_path / "whole" / "metrics.csv").read_bytes() + b"12,torn")
        fit(folder, max_epochs=3, accumulate_grad_batches=2)
        for part in ("state_dict", "optimizer_states"):
            assert_same(state_of(folder)[part], whole[part], f"{path.stem}: {part}")
        assert read_metrics(folder / "metrics.csv") == rows, path.stem


@pytest.mark.parametrize("shorter", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}])
def test_a_finished_run_may_be_trained_for_longer(shorter: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path / "whole", max_epochs=4)
    fit(tmp_path / "run", **shorter)
    fit(tmp_path / "run", max_epochs=4)
    for part in ("state_dict", "optimizer_states", "fmcib_ssl_rng"):
        assert_same(state_of(tmp_path / "run")[part], state_of(tmp_path / "whole")[part], part)


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    saving = RunCheckpoints(tmp_path, every_n_train_steps=2, keep_every_n_epochs=2, save_top_k=3)
    checkpointing(saving, max_epochs=5).fit(Net(), Numbering())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt",
        "step-00000006-epoch-0002.ckpt",
        "step-00000010.ckpt",
        "step-00000012-epoch-0004.ckpt",
        "step-00000014.ckpt",
        "step-00000015.ckpt",
    ]
    assert (tmp_path / "last.ckpt").resolve().name == "step-00000015.ckpt"


def test_saves_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmcib_ssl.training import checkpoints

    class Clock(L.Callback):
        """A step takes forty seconds."""

        def on_train_batch_end(self, *args: Any) -> None:
            self.now = getattr(self, "now", 0.0) + 40
            monkeypatch.setattr(checkpoints.time, "monotonic", lambda: self.now)

    saved: list[int] = []
    monkeypatch.setattr(RunCheckpoints, "_save", lambda self, trainer, *place: (
        saved.append(trainer.global_step), setattr(self, "_saved_at", checkpoints.time.monotonic())
    ))  # fmt: skip
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: 0.0)
    saving = RunCheckpoints(tmp_path, train_time_interval={"minutes": 2})
    checkpointing(saving, Clock(), max_epochs=4).fit(Net(), Numbering())
    assert saved == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [({"save_top_k": 1}, "save_top_k=1"), ({"every_n_train_steps": 0}, "every_n_train_steps=0")],
)
def test_numbers_out_of_range(arguments: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=fragment):
        RunCheckpoints(tmp_path, **arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fit(folder, max_epochs=1, every_n_train_steps=1, save_top_k=3)
    return folder


def copied(trained: Path, folder: Path) -> list[Path]:
    folder.mkdir()
    for path in trained.glob("step-*.ckpt"):
        (folder / path.name).write_bytes(path.read_bytes())
    return sorted(folder.iterdir(), reverse=True)


def with_one_bit_flipped(content: bytes) -> bytes:
    """A bit of the largest part, which is a weight."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = max((i for i in archive.infolist() if "/data/" in i.filename), key=lambda i: i.file_size)
        data = archive.read(info)
    place = content.index(data) + len(data) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "one bit": with_one_bit_flipped,
    "zeros": lambda content: bytes(len(content)),
    "text": lambda _: b"no checkpoint",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    how: str, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before, _ = copied(trained, tmp_path / "run")
    newest.write_bytes(DAMAGE[how](newest.read_bytes()))
    assert find_checkpoint(tmp_path / "run", "mine") == before
    assert newest.name in caplog.text and "damaged" in caplog.text and before.name in caplog.text
    assert not newest.exists() and newest.with_name(f"{newest.name}.unusable").exists()
    assert (tmp_path / "run" / "last.ckpt").resolve() == before


def test_a_name_that_cannot_be_given_is_no_reason_to_stop(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`last.ckpt` is a folder."""
    newest, before, _ = copied(trained, tmp_path / "run")
    (tmp_path / "run" / "last.ckpt" / "mine").mkdir(parents=True)
    newest.write_bytes(b"")
    assert find_checkpoint(tmp_path / "run", "mine") == before
    assert f"does not name the newest checkpoint, {before.name}" in caplog.text


class Harmful:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 1},
        [1, 2],
        {"state_dict": {}, "a": Harmful()},
        {"loops": {}, "optimizer_states": [], "fmcib_ssl": {"format_version": 99, "extra": {"run_id": "mine"}}},
    ],
    ids=["keys", "a list", "code", "another version"],
)
def test_a_foreign_file_is_passed_over_and_not_executed(
    content: Any, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    newest, before, _ = copied(trained, tmp_path / "run")
    torch.save(content, newest)
    assert find_checkpoint(tmp_path / "run", "mine") == before
    assert newest.name in caplog.text
    assert not (tmp_path / "executed").exists()


def test_checkpoints_of_another_run_are_refused(trained: Path, tmp_path: Path) -> None:
    files = copied(trained, tmp_path / "run")
    with pytest.raises(RunFolderError, match="belongs to another run") as caught:
        find_checkpoint(tmp_path / "run", "other")
    assert all(path.name in str(caught.value) for path in files) and "run=new" in str(caught.value)
    assert all(path.exists() for path in files)


def test_a_worker_that_was_killed_is_no_full_disk(tmp_path: Path) -> None:
    """torch raises that wherever the process is; taken for a full disk, the last checkpoint would be lost."""

    def killed(_number: int, _frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    class Heavy:
        def __reduce__(self) -> Any:
            signal.raise_signal(signal.SIGUSR2)
            return (int, ())

    before = signal.signal(signal.SIGUSR2, killed)
    try:
        with pytest.raises(RuntimeError):
            WholeFileIO().save_checkpoint({"weights": torch.zeros(10), "more": Heavy()}, tmp_path / "a.ckpt")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "step-00000001.ckpt"
    WholeFileIO().save_checkpoint({"weights": torch.zeros(10)}, path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        WholeFileIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert "could not be saved" in caplog.text and "File too large" in caplog.text
