"""Views of a whole batch at once, on whatever device it is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fmcib_ssl.augment.geometry import RandomGeometry
from fmcib_ssl.augment.intensity import RandomHistogramShift
from fmcib_ssl.augment.resolution import RandomGaussianSmooth
from fmcib_ssl.augment.streams import derived_seeds
from fmcib_ssl.augment.transform import BatchedTransform, Size, size_of
from fmcib_ssl.augment.work import Work

#: Voxels that are worked on at a time: on a GPU so many that it is busy, and still a small part of its memory (some ten
#: float32 numbers a voxel); on a CPU so many that calling torch costs little beside the work.
CHUNK_VOXELS = {"cpu": 2**20, "other": 2**26}

#: A view of more voxels than this has a CPU to itself: it stays in a core's own cache, and little is gained by calling
#: torch less often.
ALONE_ON_CPU_VOXELS = 2**15


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiplies matrices in float32 whatever the run has chosen: HU have more digits than TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class BatchedViews:
    """Makes views of batches of patches: random transforms in HU.

    What is drawn for a view follows from its seed alone, whatever else is in the batch and wherever it is made. On a
    CPU and a GPU the views are the same to rounding.

    Args:
        transforms: by name, applied in their order. The name decides, with the seed, what a transform draws: to leave
            one out does not change the others.

    Raises:
        ValueError: `transforms` is empty.
    """

    def __init__(self, transforms: Mapping[str, BatchedTransform[Any]]) -> None:
        if not transforms:
            raise ValueError("no transforms: the views of a patch would all be the same; give at least one.")
        self.transforms = dict(transforms)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> dict[str, Any]:
        """Parameters of `n` views by the transform's name, on the CPU; `apply` makes the views again from them.

        Args:
            seeds: one a view, of up to 64 bits.
            size_zyx: voxels of the patches.
        """
        seeds = seeds.cpu()
        params = {}
        for name, transform in self.transforms.items():
            params[name] = transform.draw(derived_seeds(seeds, name), size_zyx)
            size_zyx = transform.size_after(size_zyx)
        return params

    @torch.no_grad()
    def apply(self, patches: Tensor, params: Mapping[str, Any]) -> Float[Tensor, "n 1 z y x"]:
        """Make the views that `params` describe, float32 HU on the device of the patches.

        Args:
            patches: HU `(n, 1, z, y, x)`, of any number type; left as they are.
            params: as drawn for them.
        """
        sizes = [size_of(patches)]
        for transform in self.transforms.values():
            sizes.append(transform.size_after(sizes[-1]))
        views = torch.empty((len(patches), 1, *sizes[-1]), device=patches.device)
        at_a_time = _at_a_time(patches.device.type, max(map(_volume, sizes)))
        with torch.autocast(patches.device.type, enabled=False), _full_precision():
            steps = [
                step
                for (name, transform), size in zip(self.transforms.items(), sizes, strict=False)
                for step in transform.steps(params[name], size, patches.device)
            ]
            for first in range(0, len(patches), at_a_time):
                end = min(first + at_a_time, len(patches))
                work = Work(patches[first:end])
                work.run(step.part(first, end) for step in steps)
                views[first:end] = work.finished()
        return views

    def __call__(self, patches: Tensor, seeds: Int64[Tensor, " n"]) -> Float[Tensor, "n 1 z y x"]:
        """Make one view of each patch, float32 HU.

        Args:
            patches: HU `(n, 1, z, y, x)`, of any number type; left as they are.
            seeds: one a patch, of up to 64 bits; decides everything that is drawn for its view.
        """
        return self.apply(patches, self.draw(seeds, size_of(patches)))


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


def _at_a_time(device: str, voxels: int) -> int:
    if device == "cpu" and voxels > ALONE_ON_CPU_VOXELS:
        return 1
    return max(1, CHUNK_VOXELS.get(device, CHUNK_VOXELS["other"]) // voxels)


def _volume(size_zyx: Size) -> int:
    z, y, x = size_zyx
    return z * y * x
