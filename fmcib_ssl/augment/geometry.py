"""Everything that moves voxels, composed into one resampling: small matrices along the axes, or a general warp."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fmcib_ssl.augment.views import (
    BatchedTransform,
    Params,
    Size,
    derived_seeds,
    in_range,
    interval,
    size_of,
    uniforms,
    within,
)
from fmcib_ssl.types import PADDING_HU

#: Spans of the elastic field along each axis; a cubic B-spline has three more control points.
_ELASTIC_SPANS = 3


class RandomGeometry(BatchedTransform):
    """Crop, resize, flips, rotations, zoom and elastic shift, read from the patch in one trilinear interpolation.

    Views that are only cropped, resized, zoomed, flipped or turned by right angles are made by matrices along the axes,
    which is several times faster than the general case and exact where no voxel has to be interpolated. Such a view of
    a box reads nothing outside the box, as if the box had been cut out first.

    Args:
        size_zyx: voxels of a view; None is the patch's size.
        crop_edge: smallest and largest edge of the box over the patch's, within (0, 1]; one factor for all axes, the
            position is uniform over the patch.
        flip_prob: probability of a flip.
        flip: `"one_axis"` flips one random axis, `"each_axis"` each with that probability.
        rotate90_prob: probability of a rotation by right angles, one of those that leave the patch's size as it is.
        rotate_prob: probability of a rotation by any angle, round all three axes.
        rotate_degrees: largest angle round each axis.
        zoom_prob: probability of an anisotropic zoom.
        zoom: smallest and largest factor, drawn for each axis on a logarithmic scale; above 1 is larger.
        elastic_prob: probability of an elastic shift, a cubic B-spline field of 6 x 6 x 6 control points.
        elastic_strength: largest shift of a control point over the distance between them, 0 to 0.4; up to there
            nothing folds (Choi and Lee 2000).
        outside: what rotations and zooms read outside the patch: `"border"` the nearest voxel, or a number in HU.

    Raises:
        ValueError: a number out of range, or another choice.
    """

    def __init__(
        self,
        size_zyx: Sequence[int] | None = None,
        *,
        crop_edge: Sequence[float] = (0.5, 1.0),
        flip_prob: float = 0.5,
        flip: Literal["one_axis", "each_axis"] = "one_axis",
        rotate90_prob: float = 0.0,
        rotate_prob: float = 0.0,
        rotate_degrees: float = 15.0,
        zoom_prob: float = 0.0,
        zoom: Sequence[float] = (0.8, 1.25),
        elastic_prob: float = 0.0,
        elastic_strength: float = 0.2,
        outside: Literal["border"] | float = "border",
    ) -> None:
        super().__init__(1.0)
        if size_zyx is not None and (len(size_zyx) != 3 or min(size_zyx) < 1):
            raise ValueError(f"size_zyx is {tuple(size_zyx)}; it must be three positive numbers.")
        self.size_zyx = None if size_zyx is None else (size_zyx[0], size_zyx[1], size_zyx[2])
        self.crop_edge = interval("crop_edge", crop_edge, 1e-3, 1)
        self.flip_prob = in_range("flip_prob", flip_prob, 0, 1)
        if flip not in ("one_axis", "each_axis"):
            raise ValueError(f"flip is {flip!r}; it must be 'one_axis' or 'each_axis'.")
        self.flip = flip
        self.rotate90_prob = in_range("rotate90_prob", rotate90_prob, 0, 1)
        self.rotate_prob = in_range("rotate_prob", rotate_prob, 0, 1)
        self.rotate_degrees = in_range("rotate_degrees", rotate_degrees, 0, 180)
        self.zoom_prob = in_range("zoom_prob", zoom_prob, 0, 1)
        self.zoom = interval("zoom", zoom, 0.1, 10)
        self.elastic_prob = in_range("elastic_prob", elastic_prob, 0, 1)
        self.elastic_strength = in_range("elastic_strength", elastic_strength, 0, 0.4)
        if isinstance(outside, str) and outside != "border":
            raise ValueError(f"outside is {outside!r}; it must be 'border' or a number in HU, such as {PADDING_HU}.")
        self.outside_hu = None if isinstance(outside, str) else float(outside)

    def size_after(self, size_zyx: Size) -> Size:
        """Voxels of a view."""
        return self.size_zyx or size_zyx

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw all parts; what a view has no part of is the identity.

        First the patch is turned: its axis `a` is axis `axes[a]` of the given patch. All that follows is in the turned
        patch. An output voxel `o`, in voxels from the middle of the view, negated along the axes in `flip`, displaced
        by the elastic field, is read at `middle of the box + R @ diag(box / view size / zoom) @ o`.

        Returns:
            `active`, always true: at least the size is brought about here; `axes`, `flip`, `box_start`, `box_size`,
            `zoom` (1 where there is none) and `angle` (radians round z, y, x), each `(n, 3)`; `elastic`, `(n, 3, c, c,
            c)`, control points: displacement along z, y, x in output voxels; `warped`, `(n,)`: rotated by an angle or
            bent, not a map along the axes.
        """
        num = len(seeds)
        u = uniforms(seeds, 20)

        edges = torch.tensor(size_zyx)
        factor = self.crop_edge[0] + u[:, :1] * (self.crop_edge[1] - self.crop_edge[0])
        box_size = (factor * edges).ceil().long()
        box_start = (u[:, 1:4] * (edges - box_size + 1)).long()

        if self.flip == "each_axis":
            flip = u[:, 4:7] < self.flip_prob
        else:
            axis = (u[:, 5:6] * 3).long()
            flip = (u[:, 4:5] < self.flip_prob) & (torch.arange(3) == axis)

        axes, signs = _right_angles(size_zyx)
        turn = 1 + (u[:, 8] * (len(axes) - 1)).long()
        turn *= (u[:, 7] < self.rotate90_prob) & (len(axes) > 1)  # the first one is the identity

        rotated = u[:, 9] < self.rotate_prob
        limit = math.radians(self.rotate_degrees)
        angle = within(u[:, 10:13], (-limit, limit)) * rotated[:, None]

        zoomed = u[:, 13] < self.zoom_prob
        log_zoom = within(u[:, 14:17], (math.log(self.zoom[0]), math.log(self.zoom[1])))

        bent = u[:, 17] < self.elastic_prob
        points = _ELASTIC_SPANS + 3
        elastic = torch.zeros(num, 3, points, points, points)
        if bent.any():
            drawn = uniforms(derived_seeds(seeds[bent], "elastic"), 3 * points**3).view(-1, 3, points, points, points)
            largest = self.elastic_strength * torch.tensor(self.size_after(size_zyx)) / _ELASTIC_SPANS
            elastic[bent] = ((2 * drawn - 1) * largest.view(3, 1, 1, 1)).float()
        return {
            "active": torch.ones(num, dtype=torch.bool),
            "axes": axes[turn],
            "flip": flip ^ signs[turn],
            "box_start": box_start,
            "box_size": box_size,
            "zoom": torch.where(zoomed[:, None], log_zoom.exp(), 1.0),
            "angle": angle,
            "elastic": elastic,
            "warped": rotated | bent,
        }

    def prepare(self, own: Params, size_zyx: Size, device: torch.device) -> Params:
        """What each voxel of a view reads along z, y, x of the turned patch, on the device; the rest on the CPU."""
        result = dict(own)
        on_device = super().prepare(
            {name: own[name] for name in ("box_start", "box_size", "zoom", "flip")}, size_zyx, device
        )
        zoomed = (on_device["zoom"] != 1).any(1, keepdim=True)
        for axis, (size, num_out) in enumerate(zip(size_zyx, self.size_after(size_zyx), strict=True)):
            start, length, zoom, flip = (values[:, axis, None] for values in on_device.values())
            position = resize_positions(num_out, start[:, 0], length[:, 0])
            middle = start + (length - 1) / 2
            position = torch.where(zoom == 1, position, middle + (position - middle) / zoom)
            position = torch.where(flip, position.flip(1), position)
            in_box = torch.minimum(torch.maximum(position, start), start + length - 1)
            free = position if self.outside_hu is not None else position.clamp(0, size - 1)
            result["zyx"[axis]] = reading_matrix(torch.where(zoomed, free, in_box), size)
        return result

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Map along the axes what can be, and warp the others."""
        images, warped = _turned(images, own["axes"]), own["warped"]
        if not warped.any():
            return self._mapped(images, own)
        if warped.all():
            return self._warped(images, own)
        views = images.new_empty((len(images), 1, *self.size_after(size_of(images))))
        for chosen, read in ((~warped, self._mapped), (warped, self._warped)):
            rows = chosen.nonzero()[:, 0]
            index = rows.to(images.device, non_blocking=True)
            views[index] = read(images[index], {name: values[rows] for name, values in own.items()})
        return views

    def _mapped(self, images: Tensor, own: Params) -> Tensor:
        """Turned images along their axes; what lies outside their boxes is not touched."""
        middle, reach = own["box_start"] + (own["box_size"] - 1) / 2, own["box_size"] / 2 / own["zoom"]
        low = (middle - reach).floor().long().amin(0).clamp_min(0).tolist()
        high = ((middle + reach).floor().long().amax(0) + 2).tolist()  # a slice ends at the edge by itself
        z, y, x = (slice(*ends) for ends in zip(low, high, strict=True))
        images = images[:, :, z, y, x]
        matrices = [own[axis][:, :, part] for axis, part in zip("zyx", (z, y, x), strict=True)]
        if self.outside_hu is None or (own["zoom"] == 1).all():
            return along_axes(images, matrices)
        return along_axes(images - self.outside_hu, matrices).add_(self.outside_hu)

    def _warped(self, images: Tensor, own: Params) -> Tensor:
        """Turned images, each output voxel `o` read at `middle + matrix @ (o - middle of the output + field at o)`."""
        size_out = self.size_after(size_of(images))
        step = own["box_size"] / torch.tensor(size_out) / own["zoom"] * (1 - 2 * own["flip"].float())
        middle = own["box_start"] + (own["box_size"] - 1) / 2
        if self.outside_hu is not None:
            # One voxel of it on every side; what is read further out is the nearest voxel of that.
            images, middle = F.pad(images, (1,) * 6, value=self.outside_hu), middle + 1
        read = _by_grid_sample if images.is_cuda else _by_gathering
        return read(images, _rotation_matrices(own["angle"]) * step[:, None], middle, own["elastic"], size_out)


def _turned(images: Tensor, axes: Int64[Tensor, "m 3"]) -> Tensor:
    for permutation in set(map(tuple, axes.tolist())) - {(0, 1, 2)}:
        rows = (axes == torch.tensor(permutation)).all(1).nonzero()[:, 0]
        order = (0, 1, *(2 + axis for axis in permutation))
        if len(rows) == len(images):
            return images.permute(order)
        index = rows.to(images.device, non_blocking=True)
        images[index] = images[index].permute(order)
    return images


@cache
def _right_angles(size_zyx: Size) -> tuple[Int64[Tensor, "turns 3"], Bool[Tensor, "turns 3"]]:
    """The rotations by right angles that leave an image's size as it is: 24 of a cube, 4 where all edges differ.

    Returns:
        For each the input axis that each output axis is, and whether it is reversed; the identity comes first.
    """
    axes = torch.tensor(list(itertools.permutations(range(3)))).repeat_interleave(8, 0)
    signs = torch.tensor(list(itertools.product((False, True), repeat=3))).repeat(6, 1)
    size = torch.tensor(size_zyx)
    one = torch.nn.functional.one_hot(axes, 3) * torch.where(signs, -1, 1)[..., None]
    allowed = (torch.linalg.det(one.double()) > 0) & (size[axes] == size).all(1)
    return axes[allowed], signs[allowed]


def _rotation_matrices(angle: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 3"]:
    """Rotations round z, then y, then x, acting on columns (z, y, x); right-handed in (z, y, x)."""
    joined = torch.eye(3).repeat(len(angle), 1, 1)
    for axis, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
        cosine, sine = angle[:, axis].cos(), angle[:, axis].sin()
        one = torch.eye(3).repeat(len(angle), 1, 1)
        one[:, a, a] = one[:, b, b] = cosine
        one[:, a, b], one[:, b, a] = -sine, sine
        joined = one @ joined
    return joined


def _by_grid_sample(images: Tensor, matrix: Tensor, middle: Tensor, elastic: Tensor, size_zyx: Size) -> Tensor:
    """Read with torch's own kernel: fast on a GPU, and not on a CPU, where it takes voxel after voxel."""
    # Its places: -1 to 1 over the image from edge to edge, in the order x, y, z.
    edges = torch.tensor(images.shape[-3:])
    matrix, middle = (matrix * (2 / edges)[:, None]).flip(1), ((2 * middle + 1) / edges - 1).flip(1)
    grid = _places(matrix, middle, elastic, size_zyx, images.device).permute(0, 2, 3, 4, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _by_gathering(images: Tensor, matrix: Tensor, middle: Tensor, elastic: Tensor, size_zyx: Size) -> Tensor:
    """Read the eight neighbours of all places, one neighbour after the other: the same to rounding."""
    size, num = size_of(images), len(images)
    position = _places(matrix, middle, elastic, size_zyx, images.device)
    for axis, edge in enumerate(size):
        position[:, axis].clamp_(0, edge - 1)
    corner = position.floor()
    for axis, edge in enumerate(size):
        corner[:, axis].clamp_max_(max(edge - 2, 0))
    z, y, x = position.sub_(corner).unbind(1)
    index = torch.int32 if images.numel() < 2**31 else torch.int64
    corner = corner.to(index)
    origin = torch.arange(0, images.numel(), size[0] * size[1] * size[2], dtype=index, device=images.device)
    at = corner[:, 0].mul_(size[1]).add_(corner[:, 1]).mul_(size[2]).add_(corner[:, 2]).add_(origin.view(-1, 1, 1, 1))
    at, voxels = at.flatten(), images.flatten()
    # To the next voxel of an axis; where there is none, the weight of the next is zero.
    along_z, along_y, along_x = size[1] * size[2] * (size[0] > 1), size[2] * (size[1] > 1), int(size[2] > 1)

    def line(offset: int) -> Tensor:
        first, second = (voxels[offset + step :].index_select(0, at).view(num, *size_zyx) for step in (0, along_x))
        return first.lerp_(second, x)

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
    splines = [_b_spline_matrix(n, elastic.shape[-1], device).expand(len(control), -1, -1) for n in size_zyx]
    return along_axes(control, splines).view(len(matrix), 3, *size_zyx).add_(z).add_(plane)


def _b_spline_matrix(num_out: int, num_points: int, device: torch.device) -> Float[Tensor, "1 out points"]:
    """What each control point of a uniform cubic B-spline has to say at each of `num_out` voxels.

    The `num_points - 3` spans cover the voxels from edge to edge.
    """
    position = (torch.arange(num_out, device=device) + 0.5) * ((num_points - 3) / num_out)
    distance = (position[:, None] + 1 - torch.arange(num_points, device=device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)[None]


def along_axes(
    images: Float[Tensor, "m 1 z y x"], matrices: Sequence[Tensor | None]
) -> Float[Tensor, "m 1 z_out y_out x_out"]:
    """Multiply each image with a matrix of its own along z, y and x.

    Args:
        images: HU.
        matrices: `(m, out, in)` for z, y, x; None leaves an axis as it is.
    """
    values = images[:, 0]
    # Each pass contracts the last axis and puts what it makes first: after three of them z, y, x is back.
    for matrix in reversed(matrices):
        num, a, b, c = values.shape
        rows = values.reshape(num, a * b, c).mT
        values = (rows if matrix is None else torch.bmm(matrix, rows)).reshape(num, -1, a, b)
    return values[:, None]


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
