"""What lies round the lesion, taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fmcib_ssl.augment.streams import derived_seeds, normals
from fmcib_ssl.augment.views import Size, VoxelTransform, in_range, interval, within


class ContextRemovalParams(NamedTuple):
    """Drawn by `RandomContextRemoval`."""

    active: Bool[Tensor, " n"]
    radius: Float[Tensor, " n"]  # voxels
    fill_hu: Float[Tensor, " n"]
    seed: Int64[Tensor, " n"]


class RandomContextRemoval(VoxelTransform[ContextRemovalParams]):
    """Replaces what is further from the view's centre than a random radius by noise about one random intensity.

    Two views of a lesion share its vessels, its pleura and its ribs, and those suffice to tell it from every other
    lesion: the loss falls, and nothing is learned of the lesion. Where one of the views has only a ball round the
    point, the lesion is all that they share. For patches that are centred on lesions.

    Args:
        prob: probability that a view is changed.
        radius: smallest and largest radius that is kept, voxels.
        softness: width over which the patch fades, voxels.
        lung_prob: probability of an intensity of lung; else it is one of soft tissue.
        lung_hu: smallest and largest intensity of lung.
        tissue_hu: smallest and largest intensity of soft tissue.
        noise_std_hu: of the white noise on the replaced part.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        prob: float,
        *,
        radius: Sequence[float] = (5.0, 11.0),
        softness: float = 0.7,
        lung_prob: float = 0.75,
        lung_hu: Sequence[float] = (-950.0, -650.0),
        tissue_hu: Sequence[float] = (-150.0, 60.0),
        noise_std_hu: float = 30.0,
    ) -> None:
        super().__init__(prob)
        self.radius = interval("radius", radius, 0)
        self.softness = in_range("softness", softness, 1e-3, 1e3)
        self.lung_prob = in_range("lung_prob", lung_prob, 0, 1)
        self.lung_hu = interval("lung_hu", lung_hu, -1024, 3071)
        self.tissue_hu = interval("tissue_hu", tissue_hu, -1024, 3071)
        self.noise_std_hu = in_range("noise_std_hu", noise_std_hu, 0, 1000)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> ContextRemovalParams:
        """Draw the radius, the intensity, and the seed of the noise."""
        active, drawn = self._draw(seeds, 3)
        is_lung = drawn[:, 1] < self.lung_prob
        fill_hu = torch.where(is_lung, within(drawn[:, 2], self.lung_hu), within(drawn[:, 2], self.tissue_hu))
        return ContextRemovalParams(active, within(drawn[:, 0], self.radius), fill_hu, derived_seeds(seeds, "voxels"))

    def change(self, images: Tensor, own: ContextRemovalParams) -> Tensor:
        """Blend into noise what is further from the centre than the radius."""
        z, y, x = ((torch.arange(size, device=images.device) - size // 2).float().square() for size in images.shape[2:])
        distance = (z[:, None, None] + y[:, None] + x).sqrt()
        radius, fill_hu = (values.view(-1, 1, 1, 1, 1) for values in (own.radius, own.fill_hu))
        kept = torch.sigmoid((radius - distance) / self.softness)
        noise = normals(own.seed, images[0].numel()).view(images.shape)
        return torch.lerp(noise.mul_(self.noise_std_hu).add_(fill_hu), images, kept)
