"""What each method says that it sends through its network, against what goes through its encoders in a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_contrast import LOSSES, make_module
from tiny_contrast import a_batch as a_batch_with_negatives
from tiny_methods import METHODS, a_batch, make_method, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmcib_ssl.models.pretraining import Pretraining

NUM_LESIONS = 3


def rows_in_a_step(module: Pretraining, batch: Any, folder: Path) -> tuple[int, int]:
    """Rows that go through encoders, with a gradient and without one."""
    rows: Counter[bool] = Counter()

    def note(_encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[torch.is_grad_enabled()] += len(inputs[0])

    handles = [
        child.register_forward_pre_hook(note) for name, child in module.named_children() if name.endswith("encoder")
    ]
    # What chunks compute a second time, in the backward, is no other work.
    module.backward = lambda loss: ([handle.remove() for handle in handles], loss.backward())  # type: ignore[assignment,func-returns-value]
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    make_trainer(folder, max_steps=1).fit(module, loader)
    return rows[True], rows[False]


@pytest.mark.parametrize("name", METHODS)
def test_of_two_views(name: str, tmp_path: Path) -> None:
    module = make_method(name)
    trained, watched = rows_in_a_step(module, a_batch(NUM_LESIONS), tmp_path)
    assert trained == NUM_LESIONS * module.trained_views(1)  # a negative that is there is not looked at
    assert watched == NUM_LESIONS * module.watched_views


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("num_negatives", [0, 1, 2])
def test_of_mined_contrast(num_negatives: int, chunk_size: int | None, tmp_path: Path) -> None:
    module = make_module(LOSSES["ntxent-lesions"](), chunk_size=chunk_size)
    batch: Any = dict(a_batch_with_negatives(NUM_LESIONS))
    batch["negative"] = [torch.stack([view] * num_negatives, 1) if num_negatives else view[:, None][:, :0]
                         for view in batch["negative"]]  # fmt: skip
    trained, watched = rows_in_a_step(module, batch, tmp_path)
    assert (trained, watched) == (NUM_LESIONS * module.trained_views(num_negatives), 0)
