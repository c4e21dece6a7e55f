"""Whole recipes: views as the published CT foundation model was trained on, and any list of MONAI transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms import Compose, RandAxisFlip, RandGaussianSmooth, RandHistogramShift, Randomizable, Transform
from torch import Tensor

from fmcib_ssl.augment.geometry import RandomGeometry
from fmcib_ssl.augment.intensity import RandomHistogramShift
from fmcib_ssl.augment.resolution import RandomGaussianSmooth
from fmcib_ssl.augment.views import BatchedTransform, BatchedViews, Params, Size


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Lets MONAI pass tensors on without metadata: a third of the time of a small view goes there."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


class MonaiViews(BatchedTransform):
    """Makes views with a list of MONAI transforms, patch by patch.

    The transforms are built once and seeded again for each view. Random ones must draw from MONAI's own
    generator (`Randomizable.R`), as all of MONAI's do, and none may depend on metadata: a patch has none.

    Args:
        transforms: applied in order to a float32 tensor `(1, z, y, x)` in HU; what leaves the last one is the view,
            still in HU: views are normalised once, by whoever serves them.

    Raises:
        ValueError: `transforms` is empty.
    """

    #: A device would wait for one small patch after the other: many workers are faster.
    patch_by_patch = True

    def __init__(self, transforms: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__(1.0)
        if not transforms:
            raise ValueError("no transforms: the views of a patch would all be the same; give at least one.")
        self._compose = Compose(list(transforms))

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Hand on the seeds: all else is drawn by MONAI."""
        return {"active": torch.ones(len(seeds), dtype=torch.bool), "seed": seeds}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Transform one by one."""
        views = []
        with _plain_tensors():
            for image, seed in zip(images, own["seed"].tolist(), strict=True):
                self._compose.set_random_state(seed=seed)
                views.append(self._compose(image).float())
        return torch.stack(views)


class RandResizedCrop(Randomizable, Transform):  # type: ignore[misc]  # MONAI is not typed
    """Crops a box at a random place and resizes it trilinearly; one random factor for all its edges.

    MONAI's `RandScaleCrop` draws its factor for each axis by itself, which would change the shape of things.

    Args:
        size_zyx: voxels of the result.
        crop_edge: smallest and largest edge of the box as a fraction of the image's, within (0, 1].

    Raises:
        ValueError: `crop_edge` is not an ordered pair within (0, 1].
    """

    def __init__(self, size_zyx: Sequence[int], crop_edge: tuple[float, float] = (0.5, 1.0)) -> None:
        low, high = crop_edge
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_edge is {tuple(crop_edge)}; it must be (low, high) with 0 < low <= high <= 1.")
        self.size_zyx = tuple(size_zyx)
        self.crop_edge = (low, high)

    def __call__(self, image: Tensor) -> Tensor:
        """Crop and resize an image `(channels, z, y, x)`."""
        factor = self.R.uniform(*self.crop_edge)
        box = [math.ceil(factor * edge) for edge in image.shape[1:]]
        starts = [self.R.randint(edge - length + 1) for edge, length in zip(image.shape[1:], box, strict=True)]
        crop = image[:, *(slice(start, start + length) for start, length in zip(starts, box, strict=True))]
        return F.interpolate(crop[None], size=self.size_zyx, mode="trilinear")[0]


class PublishedViews(MonaiViews):
    """The augmentation of the published CT foundation model: geometry, then contrast, then blur, in HU.

    Random resized crop, flip of one random axis, histogram shift, Gaussian blur with a sigma of 0.25 to 1.5
    voxels on each axis. The published list ends with a padding that finds nothing left to pad, a threshold and a
    scaling; the latter two are `Preprocessing.normalize`. The order is the published one, and with it one of its
    marks: MONAI's blur takes what lies outside the view for 0 HU.

    Args:
        size_zyx: voxels of a view.
        crop_edge: smallest and largest edge of the crop as a fraction of the patch's.
        flip_prob: probability of a flip.
        histogram_shift_prob: probability of a histogram shift with 10 control points.
        smooth_prob: probability of a blur.

    Source: Pai et al. 2024, Foundation model for cancer imaging biomarkers, Nature Machine Intelligence 6, and
    `experiments/pretraining/fmcib_pretrain.yaml` of its code. Departs from it in drawing from seeds, where
    that drew the crop from torch's global generator.
    """

    def __init__(
        self,
        size_zyx: Sequence[int] = (50, 50, 50),
        *,
        crop_edge: tuple[float, float] = (0.5, 1.0),
        flip_prob: float = 0.5,
        histogram_shift_prob: float = 0.5,
        smooth_prob: float = 0.5,
    ) -> None:
        super().__init__(
            [
                RandResizedCrop(size_zyx, crop_edge),
                RandAxisFlip(prob=flip_prob),
                RandHistogramShift(prob=histogram_shift_prob),
                RandGaussianSmooth(prob=smooth_prob),
            ]
        )


class BatchedPublishedViews(BatchedViews):
    """`PublishedViews` for whole batches: the same recipe with the same arguments, drawn from other random numbers.

    With the same parameters the views are the same to rounding.

    Args:
        size_zyx: voxels of a view.
        crop_edge: smallest and largest edge of the crop as a fraction of the patch's.
        flip_prob: probability of a flip of one random axis.
        histogram_shift_prob: probability of a histogram shift with 10 control points.
        smooth_prob: probability of a blur with a sigma of 0.25 to 1.5 voxels.
    """

    def __init__(
        self,
        size_zyx: Sequence[int] = (50, 50, 50),
        *,
        crop_edge: Sequence[float] = (0.5, 1.0),
        flip_prob: float = 0.5,
        histogram_shift_prob: float = 0.5,
        smooth_prob: float = 0.5,
    ) -> None:
        super().__init__(
            {
                "geometry": RandomGeometry(size_zyx, crop_edge=crop_edge, flip_prob=flip_prob),
                "histogram_shift": RandomHistogramShift(histogram_shift_prob),
                "smooth": RandomGaussianSmooth(smooth_prob, padding="zeros"),
            }
        )
