"""The general resampling: an affine map and an elastic field in one trilinear interpolation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.augment.axis_maps import AxisMaps


def warp(
    images: Float[Tensor, "m 1 z y x"],
    matrix: Float[Tensor, "m 3 3"],
    middle: Float[Tensor, "m 3"],
    elastic: Float[Tensor, "m 3 c c c"],
    *,
    size_zyx: tuple[int, int, int],
    outside_hu: float | None,
) -> Float[Tensor, "m 1 z_out y_out x_out"]:
    """Read output voxel `o` at `middle + matrix @ (o - middle of the output + elastic field at o)`.

    Args:
        images: HU.
        matrix: output to input voxels; rows and columns are z, y, x. On the CPU, as `middle` and `elastic`.
        middle: input voxel that the middle of the output is read at.
        elastic: control points of a cubic B-spline over the output, shift along z, y, x in output voxels. The field
            at a place is their mean, weighted with the B-spline.
        size_zyx: voxels of the output.
        outside_hu: what lies outside; None for the nearest voxel.
    """
    # grid_sample's places: -1 to 1 over the image from edge to edge, in the order x, y, z.
    edges = torch.tensor(images.shape[-3:])
    matrix = (matrix * (2 / edges)[:, None]).flip(1)
    middle = ((2 * middle + 1) / edges - 1).flip(1)
    # The field is linear in its control points, so those are mapped, and not the field.
    control = torch.einsum("mij,mjzyx->mizyx", matrix, elastic).flatten(0, 1)[:, None]
    matrix, middle, control = (given.to(images.device, non_blocking=True) for given in (matrix, middle, control))
    lines = [torch.arange(n, device=images.device) - (n - 1) / 2 for n in size_zyx]
    z, y, x = (b_spline_matrix(n, control.shape[-1], images.device).expand(len(control), -1, -1) for n in size_zyx)
    grid = AxisMaps((z, y, x))(control).view(len(images), 3, *size_zyx)
    grid += (matrix[:, :, 0, None] * lines[0] + middle[..., None])[..., None, None]
    grid += (matrix[:, :, 1, None] * lines[1])[:, :, None, :, None] + (matrix[:, :, 2, None] * lines[2])[
        :, :, None, None, :
    ]
    mode = "border" if outside_hu is None else "zeros"
    shifted = images if outside_hu is None else images - outside_hu
    found = F.grid_sample(shifted, grid.permute(0, 2, 3, 4, 1), mode="bilinear", padding_mode=mode, align_corners=False)
    return found if outside_hu is None else found.add_(outside_hu)


def b_spline_matrix(num_out: int, num_points: int, device: torch.device) -> Float[Tensor, "1 out points"]:
    """What each control point of a uniform cubic B-spline has to say at each of `num_out` voxels.

    The `num_points - 3` spans cover the voxels from edge to edge.
    """
    place = (torch.arange(num_out, device=device) + 0.5) * ((num_points - 3) / num_out)
    distance = (place[:, None] + 1 - torch.arange(num_points, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)[None]
