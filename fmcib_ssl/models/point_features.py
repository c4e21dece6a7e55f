"""What is computed without weights round a patch's centre: derivatives towards and across it, local histograms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from jaxtyping import Float
from monai.networks.layers import gaussian_1d, separable_filtering
from torch import Tensor

#: Values are clamped to these, HU: denser tissue would hide what differs between lung, ground glass and soft tissue.
_HU_RANGE = (-1000.0, 300.0)
#: Of the derivatives, voxels.
_SMOOTHING = 1.0
#: Borders of the shells in which moments are taken, voxels from the centre.
_SHELLS = (0.0, 2.0, 3.5, 5.0, 7.0, 10.0, 20.0)
#: Standard deviations of the Gaussian weights under which values are counted, voxels.
_SIGMAS = (1.5, 3.0, 5.0, 8.0)
#: Centres of the bins: HU; HU a voxel for the gradient's magnitude and its part away from the point; HU a square voxel.
_BINS = {
    "intensity": (-1000, -900, -800, -700, -600, -500, -400, -300, -200, -100, -50, 0, 50, 100, 200, 300),
    "magnitude": (0, 10, 20, 40, 70, 110, 160, 220, 300),
    "laplacian": (-250, -120, -60, -30, -10, 0, 10, 30, 60, 120, 250),
    "radial": (-250, -160, -110, -70, -40, -20, 0, 20, 40, 70, 110),
}


def offsets_from_point(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "3 z y x"]:
    """Voxels along z, y and x from the voxel `size // 2`, which holds the lesion's point, to every other."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) - size // 2 for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def point_derivatives(hu: Float[Tensor, "batch 1 z y x"]) -> dict[str, Float[Tensor, "batch 1 z y x"]]:
    """Derivatives of smoothed patches as seen from the centre, where a lesion's point is.

    The edge of a round lesion is a gradient towards the point, a vessel or a spicule that leaves it one across; a
    convolution, which does not know where the point is, cannot tell them apart.

    Args:
        hu: patches in HU, clamped to -1000 and 300; smoothed with a Gaussian of one voxel before they are derived.

    Returns:
        `magnitude` of the gradient; `radial`, its part that points away from the centre, negative where it darkens
        outwards; `tangential`, the length of the rest, all HU a voxel; `laplacian`, HU a square voxel.
    """
    with _full_precision(hu.device):
        clamped = hu.float().clamp(*_HU_RANGE)
        kernel = gaussian_1d(torch.tensor(_SMOOTHING), 3.0, approx="sampled", normalize=True).to(hu.device)
        smooth = separable_filtering(clamped, [kernel] * 3, mode="replicate")
        slopes = [_slope(smooth, axis) for axis in (2, 3, 4)]
        second = [_slope(slope, axis) for axis, slope in enumerate(slopes, start=2)]
        laplacian = torch.cat(second, dim=1).sum(1, keepdim=True)
        offsets = offsets_from_point(hu.shape[2:], hu.device)
        directions = offsets / offsets.square().sum(0).sqrt().clamp_min(0.5)
        gradient = torch.cat(slopes, dim=1)
        squared = gradient.square().sum(1, keepdim=True)
        radial = (gradient * directions).sum(1, keepdim=True)
        # Below the square root nothing is 0, where its own slope would be infinite.
        across = (squared - radial.square()).clamp_min(1e-6).sqrt()
        magnitude = squared.clamp_min(1e-6).sqrt()
    return {"magnitude": magnitude, "laplacian": laplacian, "radial": radial, "tangential": across}


def _slope(image: Tensor, axis: int) -> Tensor:
    """`torch.gradient` along an axis, which cannot be exported for batches of any size."""
    size = image.shape[axis]
    first, last = (image.narrow(axis, start + 1, 1) - image.narrow(axis, start, 1) for start in (0, size - 2))
    between = (image.narrow(axis, 2, size - 2) - image.narrow(axis, 0, size - 2)) / 2
    return torch.cat([first, between, last], dim=axis)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: half precision would round HU to steps of 4. The device of shapes alone has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def num_point_features() -> int:
    """How many numbers `point_features` gives."""
    num_images = 5
    return 2 * num_images * (len(_SHELLS) - 1) + len(_SIGMAS) * sum(map(len, _BINS.values()))


def point_features(
    hu: Float[Tensor, "batch 1 z y x"], derivatives: dict[str, Float[Tensor, "batch 1 z y x"]]
) -> Float[Tensor, "batch features"]:
    """Moments in shells round the centre, and soft histograms under Gaussian weights round it.

    Args:
        hu: patches in HU, clamped to -1000 and 300.
        derivatives: by `point_derivatives`.

    Returns:
        `(batch, 248)`: for each of the six shells the means of intensity and the four derivatives, then the standard
        deviations, in 100 HU; then for intensity, magnitude, Laplacian and radial derivative the share of each bin
        under each Gaussian. Shares are linear between the centres of two bins, so that they have a gradient.
    """
    with _full_precision(hu.device):
        images = {"intensity": hu.float().clamp(*_HU_RANGE), **derivatives}
        radius = offsets_from_point(hu.shape[2:], hu.device).square().sum(0).flatten().sqrt()
        inside = torch.stack([(low <= radius) & (radius < high) for low, high in pairwise(_SHELLS)], dim=1).float()
        gaussians = torch.stack([torch.softmax(-radius.square() / (2 * sigma**2), dim=0) for sigma in _SIGMAS], dim=1)
        values = torch.cat(list(images.values()), dim=1).flatten(2) / 100
        shells = inside / inside.sum(0).clamp_min(1)
        means = values @ shells
        deviations = (values.square() @ shells - means.square()).clamp_min(1e-6).sqrt()
        shares = [share for name, centres in _BINS.items() for share in _shares(images[name], centres, gaussians)]
        return torch.cat([means.flatten(1), deviations.flatten(1), *shares], dim=1)


def _shares(values: Tensor, centres: tuple[int, ...], weights: Tensor) -> Iterator[Tensor]:
    """Of each bin, `(batch, gaussians)`: a voxel counts 1 at the bin's centre, less towards its neighbours'.

    One bin at a time, since all at once would take a gigabyte for a batch of large patches.
    """
    position = torch.zeros_like(values.flatten(1))
    for low, high in pairwise(centres):
        position = position + ((values.flatten(1) - low) / (high - low)).clamp(0, 1)
    for number in range(len(centres)):
        yield (1 - (position - number).abs()).clamp_min(0) @ weights
