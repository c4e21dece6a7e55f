"""What is said when memory runs out."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fmcib_ssl.training.memory import MemoryAdvice


def test_an_error_of_memory_says_what_helps() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")
    MemoryAdvice().on_exception(SimpleNamespace(), SimpleNamespace(), error)  # type: ignore[arg-type]
    message = str(error)
    for remedy in ("data.batch_size", "method.chunk_size", "bf16-mixed"):
        assert remedy in message
    assert message.endswith("torch says: CUDA out of memory. Tried to allocate 2 GiB.")
    other = ValueError("another")
    MemoryAdvice().on_exception(SimpleNamespace(), SimpleNamespace(), other)  # type: ignore[arg-type]
    assert str(other) == "another"
