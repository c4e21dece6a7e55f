"""What an out-of-memory error proposes, with a GPU that is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fmcib_ssl.training.memory import MemoryAdvice


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
