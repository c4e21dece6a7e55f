"""Lesions with labels: augmented views to train on, plain patches to judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int16
from torch import Tensor
from torch.utils.data import Dataset

from fmcib_ssl.types import Preprocessing, SampleKey, ViewTransform


class LabelledView(TypedDict):
    """One lesion, as the encoder sees it."""

    view: Tensor  # float32 (1, z, y, x)
    label: Tensor  # int64 or float32
    row: int


class LabelledPatches(Dataset[LabelledView]):
    """The patch of each lesion with its label.

    With a transform, item `SampleKey(epoch, i)` is a view that (seed, epoch, row) decide; without, the patch as it is.

    Args:
        read: gives a lesion's patch by its row, int16 HU `(1, z, y, x)`.
        rows: of the lesions to serve.
        labels: of all rows: class numbers or values.
        preprocessing: how patches and views are scaled.
        view_transform: makes the views of a batch of patches, in HU.
        seed: non-negative.
    """

    def __init__(
        self,
        read: Callable[[int], Int16[Tensor, "1 z y x"]],
        rows: Sequence[int] | npt.NDArray[np.intp],
        labels: npt.NDArray[Any],
        preprocessing: Preprocessing,
        *,
        view_transform: ViewTransform | None = None,
        seed: int = 0,
    ) -> None:
        self.read = read
        self.rows = np.asarray(rows)
        self.labels = labels
        self.preprocessing = preprocessing
        self.view_transform = view_transform
        self.seed = seed

    def __len__(self) -> int:
        """Number of lesions served."""
        return len(self.rows)

    def __getitem__(self, key: SampleKey | int) -> LabelledView:
        """One lesion; a plain number means epoch 0."""
        epoch, place = key if isinstance(key, SampleKey) else (0, key)
        row = int(self.rows[place])
        view_hu = self.read(row)
        if self.view_transform is not None:
            seed = np.random.SeedSequence(self.seed, spawn_key=(epoch, row)).generate_state(1)[0]
            view_hu = self.view_transform(view_hu[None], torch.tensor([int(seed)]))[0]
        view = self.preprocessing.normalize(view_hu)
        return LabelledView(view=view, label=torch.as_tensor(self.labels[row]), row=row)
