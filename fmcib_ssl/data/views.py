"""From a lesion's patches to the views that are contrasted, in the data loader's workers.

This is all there is between patches and views: to augment on the device, leave it out and send the int16 patches.
"""

from __future__ import annotations

from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fmcib_ssl.types import PatchPair, SampleKey, ViewTransform


class PatchPairs(Protocol):
    """A dataset of patches: item `SampleKey(epoch, index)` is the pair drawn for lesion `index` in `epoch`."""

    def __len__(self) -> int:
        """Number of usable lesions."""
        ...

    def __getitem__(self, key: SampleKey, /) -> PatchPair:
        """Cut the pair that `key` names."""
        ...

    def title(self, lesion: int, /) -> str:
        """What names a lesion in a picture."""
        ...


class LesionViews(TypedDict):
    """The views of one lesion, each float32 `(1, z, y, x)`; collated, they are `ViewPairs`.

    With other than one negative a lesion, those are `(per_lesion, 1, z, y, x)`.
    """

    positive: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]
    lesion: int
    negative_from_other_scan: bool


class ViewPairDataset(Dataset[LesionViews]):
    """Two views of each lesion's patch and two of its mined negative.

    A batch made by torch's default collation has the same keys; the two views come in a list then.

    Args:
        patches: where the patches come from.
        view_transform: makes one view of one patch.
        seed: non-negative; with epoch and index it decides every view.
    """

    def __init__(self, patches: PatchPairs, view_transform: ViewTransform, seed: int) -> None:
        self.patches = patches
        self.view_transform = view_transform
        self.seed = seed

    def __len__(self) -> int:
        """Number of usable lesions."""
        return len(self.patches)

    def __getitem__(self, key: SampleKey | int) -> LesionViews:
        """Make the views that `key` names; a plain number means that lesion in epoch 0."""
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        pair = self.patches[key]
        several = pair["negative"].ndim == 5
        negatives = pair["negative"] if several else pair["negative"][None]
        # A spawn key, unlike a longer list of entropy, is distinct by its length too: SeedSequence([1, 2]) and
        # SeedSequence([1, 2, 0]) are the same stream.
        seeds = np.random.SeedSequence(self.seed, spawn_key=key).generate_state(2 + 2 * len(negatives)).tolist()
        views = [
            self.view_transform(patch, seed)
            for patch, seed in zip((p for p in (pair["positive"], *negatives) for _ in range(2)), seeds, strict=True)
        ]
        mined = views[2::2], views[3::2]
        return LesionViews(
            positive=(views[0], views[1]),
            negative=(_stacked(mined[0], negatives), _stacked(mined[1], negatives))
            if several
            else (views[2], views[3]),
            lesion=pair["lesion"],
            negative_from_other_scan=pair["negative_from_other_scan"],
        )


def _stacked(views: list[Tensor], patches: Tensor) -> Tensor:
    """Views of several patches as one tensor; of no patches there is still a shape to collate."""
    return torch.stack(views) if views else torch.empty(patches.shape)
