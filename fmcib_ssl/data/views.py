"""From a lesion's patches to the views that are contrasted.

One by one in the data loader's workers (`ViewPairDataset`), or a batch at a time, in the workers or on the device
(`SeededPatches`, then `batch_of_views`). Both draw from the same seeds, so a transform that can do both gives the same.
A transform, whosever it is, gives HU; here and nowhere else views are normalised, as the encoder's preprocessing says.
"""

from __future__ import annotations

from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fmcib_ssl.types import BatchViewTransform, PatchPair, Preprocessing, SampleKey, ViewPairs, ViewTransform


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


def view_seeds(seed: int, key: SampleKey, num_negatives: int) -> list[int]:
    """Seeds of the views that `key` names: two of the lesion's patch, then two of each negative."""
    # A spawn key, unlike a longer list of entropy, is distinct by its length too: SeedSequence([1, 2]) and
    # SeedSequence([1, 2, 0]) are the same stream.
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(2 + 2 * num_negatives)
    seeds: list[int] = state.tolist()
    return seeds


class ViewPairDataset(Dataset[LesionViews]):
    """Two views of each lesion's patch and two of its mined negative.

    A batch made by torch's default collation has the same keys; the two views come in a list then.

    Args:
        patches: where the patches come from.
        view_transform: makes one view of one patch.
        seed: non-negative; with epoch and index it decides every view.
        preprocessing: of the encoder; its intensity range is used, not its patch size.
    """

    def __init__(
        self,
        patches: PatchPairs,
        view_transform: ViewTransform,
        seed: int,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  (frozen)
    ) -> None:
        self.patches = patches
        self.view_transform = view_transform
        self.seed = seed
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        """Number of usable lesions."""
        return len(self.patches)

    def __getitem__(self, key: SampleKey | int) -> LesionViews:
        """Make the views that `key` names; a plain number means that lesion in epoch 0."""
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        pair = self.patches[key]
        several = pair["negative"].ndim == 5
        negatives = pair["negative"] if several else pair["negative"][None]
        seeds = view_seeds(self.seed, key, len(negatives))
        views = [
            self.preprocessing.normalize(self.view_transform(patch, seed))
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


class SeededPair(PatchPair):
    """The patches of one lesion, and the seeds of the views that are to be made of them; collated, `SeededPatches`."""

    view_seeds: Tensor  # int64 (2 + 2 * num_negatives,)


class SeededPatches(TypedDict):
    """A batch of patches whose views are still to be made."""

    positive: Tensor  # int16 (batch, 1, z, y, x), HU
    negative: Tensor  # the same, or (batch, per_lesion, 1, z, y, x)
    view_seeds: Tensor | npt.NDArray[np.int64]  # (batch, 2 + 2 * per_lesion); an array stays on the CPU
    lesion: Tensor
    negative_from_other_scan: Tensor


class SeededPairDataset(Dataset[SeededPair]):
    """The patches of each lesion as they are, with the seeds that `ViewPairDataset` makes their views from.

    Args:
        patches: where the patches come from.
        seed: non-negative; with epoch and index it decides every view.
    """

    def __init__(self, patches: PatchPairs, seed: int) -> None:
        self.patches = patches
        self.seed = seed

    def __len__(self) -> int:
        """Number of usable lesions."""
        return len(self.patches)

    def __getitem__(self, key: SampleKey | int) -> SeededPair:
        """Cut the patches that `key` names; a plain number means that lesion in epoch 0."""
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        pair = self.patches[key]
        num_negatives = len(pair["negative"]) if pair["negative"].ndim == 5 else 1
        return SeededPair(**pair, view_seeds=torch.tensor(view_seeds(self.seed, key, num_negatives)))


def batch_of_views(batch: SeededPatches, view_transform: BatchViewTransform, preprocessing: Preprocessing) -> ViewPairs:
    """Make the views of a batch, on the device it is on; the same that `ViewPairDataset` makes lesion by lesion."""
    positive, negative, seeds = batch["positive"], batch["negative"], torch.as_tensor(batch["view_seeds"])
    several = negative.ndim == 6
    patches = torch.cat([positive, negative.flatten(0, 1) if several else negative])
    # Columns: both views of the lesion, then both of its first negative, ...; all in one go, which a GPU does at once.
    by_view = [torch.cat([seeds[:, view], seeds[:, 2 + view :: 2].flatten()]) for view in (0, 1)]
    views_hu = view_transform.views(torch.cat([patches, patches]), torch.cat(by_view))
    made = preprocessing.normalize(views_hu).chunk(2)
    lesions = [views[: len(positive)] for views in made]
    mined = [views[len(positive) :].view(*negative.shape[:-4], *views.shape[1:]) for views in made]
    return ViewPairs(
        positive=(lesions[0], lesions[1]),
        negative=(mined[0], mined[1]),
        lesion=batch["lesion"],
        negative_from_other_scan=batch["negative_from_other_scan"],
    )


class ViewCollation:
    """Collates seeded patches and makes their views where that happens: in a data loader's worker.

    Args:
        view_transform: makes the views of a batch.
        preprocessing: of the encoder.
    """

    def __init__(self, view_transform: BatchViewTransform, preprocessing: Preprocessing) -> None:
        self.view_transform = view_transform
        self.preprocessing = preprocessing

    def __call__(self, pairs: list[SeededPair]) -> ViewPairs:
        """Turn lesions into a batch."""
        return batch_of_views(default_collate(pairs), self.view_transform, self.preprocessing)


def _stacked(views: list[Tensor], patches: Tensor) -> Tensor:
    """Views of several patches as one tensor; of no patches there is still a shape to collate."""
    return torch.stack(views) if views else torch.empty(patches.shape)
