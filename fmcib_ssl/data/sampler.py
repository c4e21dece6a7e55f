"""The order in which lesions are seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from fmcib_ssl.types import SampleKey


class EpochSampler(Sampler[SampleKey]):
    """Deals lesions out to ranks, in an order that is a function of seed and epoch alone.

    Global batch `k` of an epoch is `order[k * B * W : (k + 1) * B * W]` for `W` ranks with batches of `B`; rank `r`
    takes its `r`-th block of `B`. So `W` ranks with `B` see what one process with `W * B` sees, and every rank has
    the same number of batches. What is left over at the end of an epoch is dropped, never padded with repeats.

    A run that stopped in the middle goes on with `resume_at`: epoch and batch are `divmod` of the number of batches it
    had taken by the number an epoch has, so a step number is all that has to be kept.

    `Trainer` calls `set_epoch` by itself if it finds this as the `sampler` of a loader, and must not replace it:
    `use_distributed_sampler=False`.

    Args:
        num_lesions: how many there are.
        batch_size: lesions a rank takes at a time.
        rank: of this process, from 0.
        world_size: number of processes.
        seed: non-negative.
        shuffle: draw a new order each epoch; else that of the table.

    Raises:
        ValueError: fewer lesions than one global batch, or a number that makes no sense.
    """

    def __init__(
        self,
        num_lesions: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}: need batch_size >= 1 and "
                "0 <= rank < world_size."
            )
        if num_lesions < batch_size * world_size:
            raise ValueError(
                f"{num_lesions} lesions do not fill one batch of {batch_size} on {world_size} device(s), which takes "
                f"{batch_size * world_size}: choose a batch size of at most {num_lesions // world_size}, "
                "fewer devices, or more lesions."
            )
        self.num_lesions = num_lesions
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._resumed = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration deals out."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """Leave out the first batches of one epoch, which were seen before; other epochs stay whole."""
        self._resumed = (epoch, batch)

    def __len__(self) -> int:
        """Number of lesions that this rank sees in a whole epoch, a multiple of the batch size."""
        return self.num_lesions // (self.batch_size * self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        """Yield this rank's keys for the epoch that is set now."""
        first = self._resumed[1] if self._resumed[0] == self.epoch else 0
        order = np.arange(self.num_lesions)
        if self.shuffle:
            stream = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
            order = np.random.default_rng(stream).permutation(order)
        dealt = order[: len(self) * self.world_size].reshape(-1, self.world_size, self.batch_size)
        return iter([SampleKey(self.epoch, index) for index in dealt[first:, self.rank].ravel().tolist()])
