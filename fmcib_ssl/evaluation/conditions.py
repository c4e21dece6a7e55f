"""The same lesion, pointed at or imaged a little differently: what is done to its patch before it is embedded.

What is random follows from the lesion's id and the number of the draw: a point moves in the same direction at every
distance, and noise of two strengths is the same noise, for every encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int16, Int64
from torch import Tensor

from fmcib_ssl.augment import RandomGaussianSmooth, RandomNoise, RandomSliceThickness, uniforms
from fmcib_ssl.data import LesionPatches
from fmcib_ssl.io import digest_of

#: Read round a patch before it is filtered, so that its borders are made of what lies beyond them: two thick slices.
_MARGIN_MM = 10.0
#: Standard deviation of the Gaussian that smooths, and whose difference from the image sharpens, mm.
_KERNEL_SIGMA_MM = 1.0
#: Radius of the ball that is taken for the lesion, over half the patch's longest edge.
_LESION_RADIUS = 0.75

Images = Float[Tensor, "1 1 z y x"]


@dataclass(frozen=True)
class Condition:
    """One way to point at a lesion or to image it.

    Attributes:
        distance_mm: by which the point is moved, in a random direction, before it is rounded to a voxel.
        change: float32 HU images, their seeds and the spacing in mm, to images of the same size. None: no change.
        num_draws: how often what is random is drawn.
        is_control: what the encoder should look at is destroyed; only the patch itself is changed, without a margin.
    """

    distance_mm: float = 0.0
    change: Callable[[Images, Int64[Tensor, " 1"], float], Images] | None = None
    num_draws: int = 1
    is_control: bool = False


def _thicker_slices(thickness_mm: float) -> Condition:
    """Means over slabs along z, read linearly on the fine grid again; where the slabs lie is random."""

    def change(images: Images, seeds: Tensor, spacing_mm: float) -> Images:
        voxels = max(1.0, thickness_mm / spacing_mm)
        return RandomSliceThickness(1.0, (voxels, voxels))(images, seeds)

    return Condition(change=change)


def _noise(std_hu: float) -> Condition:
    """White Gaussian noise."""
    return Condition(change=lambda images, seeds, _: RandomNoise(1.0, (std_hu, std_hu))(images, seeds))


def _smoothed(images: Images, seeds: Tensor, spacing_mm: float) -> Images:
    voxels = _KERNEL_SIGMA_MM / spacing_mm
    return RandomGaussianSmooth(1.0, (voxels, voxels))(images, seeds)


def _sharpened(images: Images, seeds: Tensor, spacing_mm: float) -> Images:
    """Unsharp masking with weight 1."""
    return 2 * images - _smoothed(images, seeds, spacing_mm)


def _shuffled(images: Images, seeds: Tensor, _: float) -> Images:
    return images.flatten()[uniforms(seeds, images.numel())[0].argsort()].view(images.shape)


def _lesion_removed(images: Images, seeds: Tensor, _: float) -> Images:
    """Fill a ball round the point with values drawn from the voxels outside it."""
    axes = [(torch.arange(size) - size // 2).float() for size in images.shape[2:]]
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    inside = (distance < _LESION_RADIUS * max(images.shape[2:]) / 2).expand_as(images)
    outside = images[~inside]
    drawn = (uniforms(seeds, int(inside.sum()))[0] * len(outside)).long()
    return images.masked_scatter(inside, outside[drawn])


#: The lesion as its table and its scan have it.
CLEAN = "clean"
#: By name, in the order of tables and pictures.
CONDITIONS: dict[str, Condition] = {
    CLEAN: Condition(),
    **{f"point moved by {mm} mm": Condition(distance_mm=mm, num_draws=3) for mm in (1, 2, 3, 5)},
    **{f"slices of {mm} mm": _thicker_slices(mm) for mm in (3, 5)},
    **{f"noise of {hu} HU": _noise(hu) for hu in (15, 30)},
    "smoother kernel": Condition(change=_smoothed),
    "sharper kernel": Condition(change=_sharpened),
    "lesion removed": Condition(change=_lesion_removed, is_control=True),
    "voxels shuffled": Condition(change=_shuffled, is_control=True),
}


def margin_of(condition: str, spacing_mm: float) -> int:
    """Voxels that a condition needs on each side of a patch."""
    one = CONDITIONS[condition]
    return 0 if one.change is None or one.is_control else math.ceil(_MARGIN_MM / spacing_mm)


@dataclass(frozen=True)
class ConditionedPatches:
    """Patches of lesions under a condition.

    Attributes:
        patches: with the margin of the condition on each side.
        lesion_ids: of its lesions, in their order.
        condition: one of `CONDITIONS`.
        draw: number of the draw, from 0.
    """

    patches: LesionPatches
    lesion_ids: Sequence[str]
    condition: str
    draw: int

    def read(self, index: int) -> Int16[Tensor, "1 z y x"]:
        """The patch of a lesion, without the margin."""
        condition, spacing_mm = CONDITIONS[self.condition], self.patches.store.settings.spacing_mm
        seed = int(digest_of(self.lesion_ids[index], self.draw)[:15], 16)
        direction = np.random.default_rng(seed).normal(size=3)
        offset_mm = condition.distance_mm * direction / np.linalg.norm(direction)
        patch = self.patches.positive(index, offset_mm.tolist())
        if condition.change is not None:
            images = condition.change(patch[None].float(), torch.tensor([seed]), spacing_mm)
            patch = images[0].round().to(torch.int16)
        margin = margin_of(self.condition, spacing_mm)
        z, y, x = (slice(margin, size - margin) for size in patch.shape[1:])
        return patch[:, z, y, x]
