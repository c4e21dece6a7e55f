"""The general resampling: an affine map and an elastic field in one trilinear interpolation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.augment.axis_maps import AxisMaps
from fmcib_ssl.augment.transform import Size, size_of


def warp(
    images: Float[Tensor, "m 1 z y x"],
    matrix: Float[Tensor, "m 3 3"],
    middle: Float[Tensor, "m 3"],
    elastic: Float[Tensor, "m 3 c c c"],
    *,
    size_zyx: Size,
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
    if outside_hu is not None:
        # One voxel of it on every side; what is read further out is the nearest voxel of that.
        images, middle = F.pad(images, (1,) * 6, value=outside_hu), middle + 1
    read = by_grid_sample if images.is_cuda else by_gathering
    return read(images, matrix, middle, elastic, size_zyx)


def by_grid_sample(images: Tensor, matrix: Tensor, middle: Tensor, elastic: Tensor, size_zyx: Size) -> Tensor:
    """Read with torch's own kernel: fast on a GPU, and not on a CPU, where it takes voxel after voxel."""
    # Its places: -1 to 1 over the image from edge to edge, in the order x, y, z.
    edges = torch.tensor(images.shape[-3:])
    matrix, middle = (matrix * (2 / edges)[:, None]).flip(1), ((2 * middle + 1) / edges - 1).flip(1)
    grid = _places(matrix, middle, elastic, size_zyx, images.device).permute(0, 2, 3, 4, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def by_gathering(images: Tensor, matrix: Tensor, middle: Tensor, elastic: Tensor, size_zyx: Size) -> Tensor:
    """Read the eight neighbours of all places, one neighbour after the other: the same to rounding."""
    size, num = size_of(images), len(images)
    place = _places(matrix, middle, elastic, size_zyx, images.device)
    for axis, edge in enumerate(size):
        place[:, axis].clamp_(0, edge - 1)
    corner = place.floor()
    for axis, edge in enumerate(size):
        corner[:, axis].clamp_max_(max(edge - 2, 0))
    z, y, x = place.sub_(corner).unbind(1)
    index = torch.int32 if images.numel() < 2**31 else torch.int64
    corner = corner.to(index)
    first = torch.arange(0, images.numel(), size[0] * size[1] * size[2], dtype=index, device=images.device)
    at = corner[:, 0].mul_(size[1]).add_(corner[:, 1]).mul_(size[2]).add_(corner[:, 2]).add_(first.view(-1, 1, 1, 1))
    at, voxels = at.flatten(), images.flatten()
    # To the next voxel of an axis; where there is none, the weight of the next is zero.
    along_z, along_y, along_x = size[1] * size[2] * (size[0] > 1), size[2] * (size[1] > 1), int(size[2] > 1)

    def line(offset: int) -> Tensor:
        here, there = (voxels[offset + step :].index_select(0, at).view(num, *size_zyx) for step in (0, along_x))
        return here.lerp_(there, x)

    def plane(offset: int) -> Tensor:
        return line(offset).lerp_(line(offset + along_y), y)

    return plane(0).lerp_(plane(along_z), z)[:, None]


def _places(
    matrix: Tensor, middle: Tensor, elastic: Tensor, size_zyx: Size, device: torch.device
) -> Float[Tensor, "m 3 z_out y_out x_out"]:
    """Where each voxel of the output is read, in the rows of `matrix`."""
    control = None
    if elastic.any():
        # The field is linear in its control points, so those are mapped, and not the field.
        control = torch.einsum("mij,mjzyx->mizyx", matrix, elastic).flatten(0, 1)[:, None].to(device, non_blocking=True)
    matrix, middle = matrix.to(device, non_blocking=True), middle.to(device, non_blocking=True)
    lines = [torch.arange(n, device=device) - (n - 1) / 2 for n in size_zyx]
    z, y, x = (matrix[:, :, axis, None] * line for axis, line in enumerate(lines))
    z = (z + middle[..., None])[..., None, None]
    plane = y[:, :, None, :, None] + x[:, :, None, None, :]
    if control is None:
        return z + plane
    z_map, y_map, x_map = (b_spline_matrix(n, elastic.shape[-1], device).expand(len(control), -1, -1) for n in size_zyx)
    return AxisMaps((z_map, y_map, x_map))(control).view(len(matrix), 3, *size_zyx).add_(z).add_(plane)


def b_spline_matrix(num_out: int, num_points: int, device: torch.device) -> Float[Tensor, "1 out points"]:
    """What each control point of a uniform cubic B-spline has to say at each of `num_out` voxels.

    The `num_points - 3` spans cover the voxels from edge to edge.
    """
    place = (torch.arange(num_out, device=device) + 0.5) * ((num_points - 3) / num_out)
    distance = (place[:, None] + 1 - torch.arange(num_points, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)[None]
