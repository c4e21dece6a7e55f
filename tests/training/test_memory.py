"""The search for the largest batch against every limit there is; and what is said when memory runs out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fmcib_ssl.training import memory
from fmcib_ssl.training.memory import MemoryAdvice, largest_that_fits

MB = 1_000_000


@pytest.mark.parametrize("max_", [1, 2, 3, 16, 300])
def test_every_limit_is_found(max_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)  # it takes a while
    for limit in range(max_ + 5):
        tried: list[int] = []

        def step(size: int, limit: int = limit, tried: list[int] = tried) -> None:
            tried.append(size)
            if size > limit:
                raise torch.OutOfMemoryError

        size = largest_that_fits(step, max_)
        assert size == max((size for size in tried if size <= limit), default=0) and max(tried) <= max_
        if limit >= max_:
            assert size == max_
        elif limit >= 2:  # the true limit is less than a sixteenth away; up to 32 it is met
            assert size <= limit < max(size + 1, 17 / 16 * size)
        assert len(tried) <= 2 * math.log2(max(2, max_)) + 5
        too_many = [size for size in tried if size > limit]
        assert too_many == sorted(too_many, reverse=True)  # never more than what did not fit


def test_an_error_that_is_not_of_memory_is_one() -> None:
    def step(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_that_fits(step, 8)


def test_torch_is_held_to_a_part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the functions of `torch.cuda` that are called: nothing is known of a GPU here but its arithmetic."""
    fractions: list[float] = [1.0]
    fakes: dict[str, Any] = {
        "mem_get_info": lambda _: (60 * MB, 100 * MB),
        "memory_reserved": lambda _: 10 * MB,
        "get_per_process_memory_fraction": lambda _: fractions[-1],
        "set_per_process_memory_fraction": lambda fraction, _: fractions.append(fraction),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with memory._room_left(torch.device("cuda", 0), reserve=3 * MB):
        assert fractions[-1] == pytest.approx(0.9 * 0.7 - 0.03)
    assert fractions[-1] == 1.0


def test_an_error_of_memory_says_what_helps() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")
    MemoryAdvice().on_exception(SimpleNamespace(), SimpleNamespace(), error)  # type: ignore[arg-type]
    message = str(error)
    for remedy in ("data.batch_size", "hardware.auto_batch=true", "method.chunk_size", "bf16-mixed"):
        assert remedy in message
    assert message.endswith("torch says: CUDA out of memory. Tried to allocate 2 GiB.")
    other = ValueError("another")
    MemoryAdvice().on_exception(SimpleNamespace(), SimpleNamespace(), other)  # type: ignore[arg-type]
    assert str(other) == "another"
