"""Linear maps of images that act along one axis after the other, as a small matrix for each axis.

Cropping, resizing, flipping, smoothing, a lower resolution and thicker slices are all of this kind, and so is any
sequence of them: their matrices are multiplied first, and the voxels are touched once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class AxisMaps(NamedTuple):
    """A linear map of `m` images, `(m, out, in)` for each axis z, y, x; None leaves an axis as it is.

    Attributes:
        zyx: the three matrices.
        outside_hu: what the map takes for the intensity outside the image; None where it reads nothing there, so that
            all rows sum to 1.
    """

    zyx: tuple[Tensor | None, Tensor | None, Tensor | None]
    outside_hu: float | None = None

    def after(self, earlier: AxisMaps) -> AxisMaps | None:
        """This map after another one, as one; None where they differ in what lies outside."""
        if self.outside_hu is not None and earlier.outside_hu not in (None, self.outside_hu):
            return None
        z, y, x = (_product(late, early) for late, early in zip(self.zyx, earlier.zyx, strict=True))
        return AxisMaps((z, y, x), earlier.outside_hu if self.outside_hu is None else self.outside_hu)

    def each(self, change: Callable[[Tensor | None], Tensor | None]) -> AxisMaps:
        """The same with other matrices."""
        z, y, x = map(change, self.zyx)
        return AxisMaps((z, y, x), self.outside_hu)

    def reading_only(self, box: Sequence[tuple[int, int]]) -> AxisMaps:
        """The same for images of which only a box is given, where the rest is not read."""
        z, y, x = (
            None if matrix is None else matrix[:, :, slice(*ends)] for matrix, ends in zip(self.zyx, box, strict=True)
        )
        return AxisMaps((z, y, x), self.outside_hu)

    def __call__(self, images: Float[Tensor, "m 1 z y x"]) -> Float[Tensor, "m 1 z_out y_out x_out"]:
        """Apply the map."""
        shift = self.outside_hu or 0.0
        values = images[:, 0] - shift if shift else images[:, 0]
        # Each pass contracts the last axis and puts what it makes first: after three of them z, y, x is back.
        for matrix in reversed(self.zyx):
            num, a, b, c = values.shape
            rows = values.reshape(num, a * b, c).mT
            values = (rows if matrix is None else torch.bmm(matrix, rows)).reshape(num, -1, a, b)
        values = values[:, None]
        return values.add_(shift) if shift else values


def _product(late: Tensor | None, early: Tensor | None) -> Tensor | None:
    if late is None or early is None:
        return early if late is None else late
    return torch.bmm(late, early)


def reading_matrix(positions: Float[Tensor, "m out"], size: int) -> Float[Tensor, "m out size"]:
    """Linear interpolation at given places of a line of `size` voxels; nothing is read outside.

    Args:
        positions: in voxels, 0 at the centre of the first.
        size: voxels of the line.
    """
    voxels = torch.arange(size, device=positions.device)
    return (positions[..., None] - voxels).abs_().neg_().add_(1).clamp_min_(0)


def resize_positions(num_out: int, start: Tensor, length: Tensor) -> Float[Tensor, "m out"]:
    """Where the voxels of a resized box lie in the whole line, by their centres (`align_corners=False`).

    Args:
        num_out: voxels of the result.
        start: `(m,)`, the box's first voxel.
        length: `(m,)`, its voxels.
    """
    out = torch.arange(num_out, device=start.device, dtype=torch.float32)
    step = (length.float() / num_out)[:, None]
    return start.float()[:, None] + (out + 0.5) * step - 0.5
