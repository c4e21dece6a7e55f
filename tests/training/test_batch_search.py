"""The search against every limit there is, and what fits against memory that is really taken."""

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fmcib_ssl.augment import BatchedPublishedViews, PublishedViews
from fmcib_ssl.data.loader import LesionDataModule
from fmcib_ssl.models.pretraining import Pretraining
from fmcib_ssl.training import batch_search
from fmcib_ssl.training.batch_search import GPURoom, HostRoom, SmallestOfAll, largest_that_fits, take_steps
from fmcib_ssl.training.memory import free_host_memory, peak_memory, reset_host_peak
from fmcib_ssl.types import PatchPair, SampleKey

CPU = torch.device("cpu")
SIZE = (6, 6, 6)
MB = 1_000_000


@pytest.mark.parametrize("most", [1, 2, 3, 16, 100, 1000])
def test_every_limit_is_found(most: int) -> None:
    for limit in range(most + 5):
        asked: list[int] = []

        def fits(size: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(size)
            return size <= limit

        found = largest_that_fits(fits, min(2, most), most)
        allowed = [size for size in asked if size <= limit]
        assert found.size == max(allowed, default=0) and max(asked) <= most
        if limit >= most:
            assert found == (most, None)
        elif limit >= 2:
            # The true limit is less than a sixteenth away; up to 32 it is met.
            assert found.size <= limit < found.refused <= max(found.size + 1, 17 / 16 * found.size)  # type: ignore[operator]
        assert len(asked) <= 2 * math.log2(max(2, most)) + 5
        too_many = [size for size in asked if size > limit]
        assert too_many == sorted(too_many, reverse=True)  # never more than what did not fit


@pytest.mark.parametrize(("each", "fixed"), [(15 * MB, 0), (15 * MB, 240 * MB)])
def test_what_fits_on_a_host(each: int, fixed: int) -> None:
    """In a process of its own: what other tests have left would be measured too.

    What that process was started by has held more; the kernel hands this on to a new program, as `ru_maxrss`.
    """
    free = 750 * MB
    starter = (
        "import subprocess, sys\n"
        "import numpy as np\n"
        f"np.ones({2 * free}, np.uint8)\n"
        "sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)\n"
    )
    code = (
        "import numpy as np\n"
        "from fmcib_ssl.training import batch_search\n"
        f"batch_search.free_host_memory = lambda: {free}\n"
        "room = batch_search.HostRoom()\n"
        "tried = []\n"
        "def step(size):\n"
        "    tried.append(size)\n"
        # Written to, so that the kernel has to give it.
        f"    np.ones({fixed} + size * {each}, np.uint8)\n"
        "found = batch_search.largest_that_fits(lambda size: room.holds(size, lambda: step(size)), 2, 1000)\n"
        "print(found.size, max(tried))\n"
    )
    said = subprocess.run([sys.executable, "-c", starter, code], capture_output=True, text=True, check=True).stdout
    found, largest_tried = map(int, said.split())
    true = (0.9 * free - fixed) / each
    assert 0.7 * true <= found <= true + 1  # the process may hold more for other reasons, and then dares less
    assert fixed + largest_tried * each < free


def test_processes_share_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_search, "free_host_memory", lambda: 800 * MB)
    alone, shared = HostRoom(), HostRoom(num_processes=4)
    assert alone.limit - shared.limit == pytest.approx(0.75 * 0.9 * 800 * MB, rel=0.1)


def test_the_host_says_it_has_no_more() -> None:
    room = HostRoom()
    assert room.holds(2, lambda: torch.empty(10))  # type: ignore[arg-type,func-returns-value]
    assert not room.holds(4, lambda: torch.empty(10**14))  # type: ignore[arg-type,func-returns-value]


def test_an_error_that_is_not_of_memory_is_one() -> None:
    def step() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        HostRoom().holds(2, step)


def test_torch_is_held_to_a_part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the functions of `torch.cuda` that are called: nothing is known of a GPU here but its arithmetic."""
    fractions: list[float] = [1.0]
    fakes: dict[str, Any] = {
        "mem_get_info": lambda _: (60 * MB, 100 * MB),
        "memory_reserved": lambda _: 10 * MB,
        "get_per_process_memory_fraction": lambda _: fractions[-1],
        "set_per_process_memory_fraction": lambda fraction, _: fractions.append(fraction),
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(size: int) -> None:
        if size * 10 * MB > fractions[-1] * 100 * MB:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}")

    room = GPURoom(CPU, reserve=13 * MB)  # of 70 MB that are free 63 may be held, 50 by a trial
    assert room.limit == 63 * MB
    assert [room.holds(size, lambda size=size: step(size)) for size in (2, 5, 6, 12)] == [True, True, False, False]
    assert fractions[1] == pytest.approx(0.5) and fractions[-1] == 1.0


def test_the_most_memory_of_a_host() -> None:
    reset_host_peak()
    before = peak_memory(CPU)
    np.ones(300 * MB, np.uint8)
    assert peak_memory(CPU) - before == pytest.approx(300 * MB, rel=0.2)
    reset_host_peak()
    assert peak_memory(CPU) - before < 100 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_job_count(version: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:   90000 kB\n")
    assert free_host_memory_with(tmp_path, "1:cpu:/\n") == 90_000 * 1024
    held, most = (
        ("memory.usage_in_bytes", "memory.limit_in_bytes") if version == 1 else ("memory.current", "memory.max")
    )
    line, top = ("4:hugetlb,memory:/slurm/job_1\n", "memory") if version == 1 else ("0::/slurm/job_1\n", "")
    slurm = tmp_path / "sys/fs/cgroup" / top / "slurm"
    job = slurm / "job_1"
    job.mkdir(parents=True)
    (job / most).write_text("max\n" if version == 2 else str(2**63 - 4096))
    for group in (job, slurm):
        (group / held).write_text("30000000\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 4000000\nactive_file 6\n")
    assert free_host_memory_with(tmp_path, line) == 90_000 * 1024
    (slurm / most).write_text("50000000\n")  # 30 of 50 MB are held, 4 of them a cache that can go
    assert free_host_memory_with(tmp_path, line) == 24 * MB


def free_host_memory_with(root: Path, groups: str) -> int:
    (root / "proc/self/cgroup").write_text(groups)
    return free_host_memory(root)


class NoisePatches:
    """Patches of noise, with as many negatives."""

    def __init__(self, num_negatives: int) -> None:
        self.num_negatives = num_negatives

    def __len__(self) -> int:
        return 9

    def __getitem__(self, key: SampleKey) -> PatchPair:
        draw = np.random.default_rng(key.index)
        count = 1 + self.num_negatives
        positive, *negatives = torch.from_numpy(draw.integers(-1024, 1000, (count, 1, *SIZE), dtype=np.int16))
        negative = negatives[0] if len(negatives) == 1 else torch.stack([positive, *negatives])[1:]
        return {"positive": positive, "negative": negative, "lesion": key.index, "negative_from_other_scan": False}

    def title(self, lesion: int) -> str:
        return str(lesion)


class Seen(Pretraining):
    """Keeps the batches that it is trained on."""

    def __init__(self) -> None:
        encoder = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4))
        super().__init__(encoder, lambda named: torch.optim.Adam([parameter for _, parameter in named]))
        self.batches: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.batches.append(batch)
        self.steps.append(self.global_step)
        self.log("train/loss", 0.0)
        return {"loss": self.encoder(batch["positive"][0]).square().mean()}


@pytest.mark.parametrize("num_negatives", [0, 1, 2])
@pytest.mark.parametrize(
    ("transform", "views_on"),
    [(PublishedViews(SIZE), "auto"), (BatchedPublishedViews(SIZE), "workers"), (BatchedPublishedViews(SIZE), "device")],
)
def test_a_trial_has_the_shapes_of_the_run(transform: Any, views_on: Any, num_negatives: int, tmp_path: Path) -> None:
    data = LesionDataModule(NoisePatches(num_negatives), transform, batch_size=4, views_on=views_on)
    module = Seen()
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    (real,) = module.batches
    take_steps(module, data, 4, device=CPU, precision="32-true")
    assert len(module.batches) == 4  # three steps more
    for batch in module.batches[1:]:
        assert batch.keys() == real.keys()
        for key in ("positive", "negative"):
            assert [(view.shape, view.dtype) for view in batch[key]] == [(view.shape, view.dtype) for view in real[key]]


def test_a_trial_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)  # one of two processes; the other is not waited for
    module, data = Seen(), LesionDataModule(NoisePatches(1), PublishedViews(SIZE), batch_size=4)
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    take_steps(module, data, 5, device=CPU, precision="32-true", accumulate=8)
    assert module.steps == [0, 0, 1, 1, 2, 2]  # three steps, of two batches each: eight need no more memory
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert random.getstate() == python_before
    assert not list(tmp_path.iterdir())
    assert data.batch_size == 4 and data.trainer is None and len(data.dataset) == 9


class OnTwo(L.LightningModule):
    """Agrees, takes a step, and notes in a file what was agreed on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.folder = folder

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        (self.folder / f"optimizer-{self.global_rank}").touch()
        return torch.optim.SGD(self.parameters(), 0.1)


class RoomOfARank(SmallestOfAll):
    """The second of two devices has room for less."""

    def __init__(self, folder: Path) -> None:
        super().__init__(7, self.note)
        self.folder = folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.own = (7, 5)[trainer.global_rank]
        super().setup(trainer, pl_module, stage)

    def note(self, size: int) -> None:
        assert not list(self.folder.glob("optimizer-*"))  # whose rate follows from the batch
        (self.folder / f"agreed-{os.getpid()}").write_text(str(size))


def test_all_devices_take_what_the_smallest_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[RoomOfARank(tmp_path)],
        )  # fmt: skip
        trainer.fit(OnTwo(tmp_path), torch.utils.data.DataLoader(torch.ones(4, 1)))  # type: ignore[arg-type]
    assert [file.read_text() for file in tmp_path.glob("agreed-*")] == ["5", "5"]
    assert len(list(tmp_path.glob("optimizer-*"))) == 2
