"""Two processes of which one meets a step that is not finite, a disk that is full, memory that is not enough."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fmcib_ssl.training.checkpoints import RunCheckpoints, WholeFileIO, find_checkpoint
from fmcib_ssl.training.memory import MemoryAdvice

RANK = """
import logging, os, sys
sys.path.insert(0, {here!r})
logging.basicConfig(level=logging.WARNING)
import torch, lightning as L, test_guards as t
from fmcib_ssl.training.guards import TrainingFaultError
from torch.utils.data import DataLoader

rank = int(os.environ["RANK"])
guard = t.NonFiniteGuard({folder!r}, on_non_finite={mode!r}, stop_after=1)
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, callbacks=[guard],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
data = t.batches({{2: "view"}} if rank == 1 else {{}})
module = t.Small("sgd")
try:
    trainer.fit(module, DataLoader(data, batch_size=None))
except TrainingFaultError as error:
    print("STOPPED", error)
torch.save((trainer.global_step, guard.num_skipped, module.state_dict()), f"{folder}/result-{{rank}}.pt")
"""


def on_two_ranks(folder: Path, mode: str) -> tuple[list[Any], list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTEST_"))}
    code = RANK.format(here=str(Path(__file__).parent), folder=str(folder), mode=mode)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            env={**kept, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                 "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                 "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=250)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(2)], said


def test_both_ranks_leave_out_what_one_has_met(tmp_path: Path) -> None:
    (one, other), said = on_two_ranks(tmp_path, "skip")
    assert one[:2] == other[:2] == (6, 1)
    parameters = [name for name in one[2] if "running" not in name]
    assert all(torch.equal(one[2][name], other[2][name]) for name in parameters)
    assert all(bool(torch.isfinite(value).all()) for result in (one, other) for value in result[2].values())
    assert sorted(file.name for file in (tmp_path / "step-00000002").iterdir()) == [
        "lesions.csv", "rank-0.pt", "rank-1.pt",
    ]  # fmt: skip
    assert "row 10, whose views are not finite" in said[0]  # rank 0 speaks, of rank 1's lesions


def test_both_ranks_stop(tmp_path: Path) -> None:
    results, said = on_two_ranks(tmp_path, "stop")
    assert [result[0] for result in results] == [2, 2]
    assert all("STOPPED step 2 is not finite" in text for text in said)


class Plain(L.LightningModule):
    """Half a megabyte of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = {"extra": {"run_id": "mine"}}
        self.net = nn.Linear(64, 2048)
        self.fill: Any = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == 4 and self.fill is not None:
            self.fill()
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fmcib_ssl"] = self.metadata


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fill() -> None:
        with suppress(OSError), (small_disk / "others").open("wb", buffering=0) as file:
            while True:
                if not file.write(bytes(4096)):
                    return

    checkpoints, module = small_disk / "checkpoints", Plain()
    module.fill = fill
    trainer = L.Trainer(
        accelerator="cpu", max_steps=8, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[RunCheckpoints(checkpoints, every_n_train_steps=1)], plugins=[WholeFileIO()],
        default_root_dir=small_disk,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.ones(32, 64), batch_size=4))
    assert trainer.global_step == 8  # training went on
    assert "could not be saved (" in caplog.text and "No space left on device" in caplog.text
    newest = find_checkpoint(checkpoints, "mine")
    assert newest is not None and newest.name == "step-00000004.ckpt"
    assert not list(checkpoints.glob(".*"))


class Memory:
    """A GPU of 1000 MB whose encoder takes 10 MB a row, in place of the measuring of a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mb = 2**20
        cuda = {
            "memory_allocated": lambda *_: 100 * mb,
            "memory_reserved": lambda *_: 100 * mb,
            "mem_get_info": lambda *_: (900 * mb, 1000 * mb),
            "get_per_process_memory_fraction": lambda *_: 1.0,
            "empty_cache": lambda: None,
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(MemoryAdvice, "_peak", staticmethod(lambda t, e, rows: 7 * mb + 10 * mb * len(rows)))


def test_the_batch_that_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch)
    advice = MemoryAdvice()
    module: Any = nn.Module()
    module.encoder, module.device, module.chunk_size = nn.Linear(1, 1), torch.device("cpu"), None
    advice._hook = module.encoder.register_forward_pre_hook(advice._look)
    trainer: Any = SimpleNamespace(precision="32-true", optimizers=[])
    advice.on_train_batch_start(trainer, module, {"lesion": torch.arange(32)}, 0)
    advice._look(module.encoder, (torch.zeros(128, 1, 4, 4, 4),))  # four views a lesion
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    advice.on_exception(trainer, module, error)
    # 1000 MB less 10 % to spare, 100 MB that are there and 7 MB for any batch: 793 MB, at 40 MB a lesion.
    assert advice.fits == 19
    text = str(error)
    assert "data.batch_size=32 on each device" in text and "data.batch_size=19 would fit" in text
    assert "method.chunk_size=19" in text and "bf16-mixed" in text and "Tried to allocate 2.00 GiB" in text


def test_other_errors_are_let_alone() -> None:
    error = ValueError("another")
    MemoryAdvice().on_exception(SimpleNamespace(), nn.Module(), error)  # type: ignore[arg-type]
    assert str(error) == "another"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
