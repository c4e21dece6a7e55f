"""The queue against a deque, and against lightly's memory bank."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torch.nn.functional as F

from fmcib_ssl.models.queues import FeatureQueue


@pytest.mark.parametrize("batch_sizes", [[2, 2, 2], [3, 3, 3, 3], [5, 5], [7], [12, 1], [1] * 11])
def test_it_holds_the_newest(batch_sizes: list[int]) -> None:
    queue, newest, total = FeatureQueue(5, 3), deque[list[float]](maxlen=5), 0
    newest.extend(queue.features.tolist())
    for size in batch_sizes:
        batch = F.normalize(torch.randn(size, 3), dim=1)
        queue.enqueue(batch)
        newest.extend(batch.tolist())
        total += size
        assert sorted(queue.features.tolist()) == sorted(newest)
        assert queue.is_full == (total >= 5)


def test_the_nearest_is_lightlys() -> None:
    from lightly.models.modules import NNMemoryBankModule

    bank, queue = NNMemoryBankModule(size=(20, 6)), FeatureQueue(20, 6)
    queue.features.copy_(bank.bank)
    for _ in range(4):
        z = F.normalize(torch.randn(5, 6), dim=1)
        torch.testing.assert_close(queue.nearest(z), bank(z, update=True))
        queue.enqueue(z)


def test_checkpoints_hold_it() -> None:
    queue, other = FeatureQueue(4, 3), FeatureQueue(4, 3)
    queue.enqueue(torch.randn(3, 3))
    other.load_state_dict(queue.state_dict())
    last = torch.randn(2, 3)
    for each in (queue, other):
        each.enqueue(last)
    assert torch.equal(queue.features, other.features)


def test_a_queue_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FeatureQueue(0, 3)
