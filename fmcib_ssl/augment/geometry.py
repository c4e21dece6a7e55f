"""Everything that moves voxels, composed into one resampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fmcib_ssl.augment.axis_maps import AxisMaps, reading_matrix, resize_positions
from fmcib_ssl.augment.streams import derived_seeds, uniforms
from fmcib_ssl.augment.transform import BatchedTransform, Size, chosen, in_range, interval, size_of, within
from fmcib_ssl.augment.warp import warp
from fmcib_ssl.augment.work import Box, Linear, Pointwise, Step
from fmcib_ssl.types import PADDING_HU

#: Spans of the elastic field along each axis; a cubic B-spline has three more control points.
ELASTIC_SPANS = 3


class GeometryParams(NamedTuple):
    """Drawn by `RandomGeometry`.

    First the patch is turned: its axis `a` is axis `axes[a]` of the given patch. All that follows is in the turned
    patch. An output voxel `o`, in voxels from the middle of the view, negated along the axes in `flip`, displaced by
    the elastic field, is read at `middle of the box + R @ diag(box / view size / zoom) @ o`.
    """

    active: Bool[Tensor, " n"]  # always: at least the size is brought about here
    axes: Int64[Tensor, "n 3"]
    flip: Bool[Tensor, "n 3"]
    box_start: Int64[Tensor, "n 3"]
    box_size: Int64[Tensor, "n 3"]
    zoom: Float[Tensor, "n 3"]  # 1 where there is none
    angle: Float[Tensor, "n 3"]  # radians round z, y, x
    elastic: Float[Tensor, "n 3 c c c"]  # control points: displacement along z, y, x, output voxels
    warped: Bool[Tensor, " n"]  # rotated by an angle or bent: not a map along the axes

    @property
    def zoomed(self) -> Tensor:
        """Which views may read outside their box."""
        return (self.zoom != 1).any(1)


class RandomGeometry(BatchedTransform[GeometryParams]):
    """Crop, resize, flips, rotations, zoom and elastic shift, read from the patch in one trilinear interpolation.

    Views that are only cropped, resized, zoomed, flipped or turned by right angles are made by matrices along the axes,
    which is several times faster than the general case and exact where no voxel has to be interpolated. Such a view of
    a box reads nothing outside the box, as if the box had been cut out first.

    Args:
        size_zyx: voxels of a view; None is the patch's size.
        crop_edge: smallest and largest edge of the box over the patch's, within (0, 1]; one factor for all axes, the
            place is uniform over the patch.
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

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> GeometryParams:
        """Draw all parts; what a view has no part of is the identity."""
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

        axes, signs = right_angles(size_zyx)
        turn = 1 + (u[:, 8] * (len(axes) - 1)).long()
        turn *= (u[:, 7] < self.rotate90_prob) & (len(axes) > 1)  # the first one is the identity

        rotated = u[:, 9] < self.rotate_prob
        limit = math.radians(self.rotate_degrees)
        angle = within(u[:, 10:13], (-limit, limit)) * rotated[:, None]

        zoomed = u[:, 13] < self.zoom_prob
        log_zoom = within(u[:, 14:17], (math.log(self.zoom[0]), math.log(self.zoom[1])))

        bent = u[:, 17] < self.elastic_prob
        points = ELASTIC_SPANS + 3
        elastic = torch.zeros(num, 3, points, points, points)
        if bent.any():
            drawn = uniforms(derived_seeds(seeds[bent], "elastic"), 3 * points**3).view(-1, 3, points, points, points)
            largest = self.elastic_strength * torch.tensor(self.size_after(size_zyx)) / ELASTIC_SPANS
            elastic[bent] = ((2 * drawn - 1) * largest.view(3, 1, 1, 1)).float()
        return GeometryParams(
            active=torch.ones(num, dtype=torch.bool),
            axes=axes[turn],
            flip=flip ^ signs[turn],
            box_start=box_start,
            box_size=box_size,
            zoom=torch.where(zoomed[:, None], log_zoom.exp(), 1.0),
            angle=angle,
            elastic=elastic,
            warped=rotated | bent,
        )

    def steps(self, params: GeometryParams, size_zyx: Size, device: torch.device) -> Sequence[Step]:
        """Turn by right angles; then a map along the axes, or a warp."""
        steps: list[Step] = []
        every = list(range(len(params.active)))
        for axes in itertools.permutations(range(3)):
            turned = (params.axes == torch.tensor(axes)).all(1).nonzero()[:, 0].tolist()
            if axes != (0, 1, 2) and turned:
                steps.append(Pointwise(turned, partial(_turn, axes=axes)))
        plain = (~params.warped).nonzero()[:, 0].tolist()
        warped = params.warped.nonzero()[:, 0].tolist()
        if warped and self.size_after(size_zyx) != size_zyx:
            # Images of one size go in and out of a step: maps along the axes cannot be put off here.
            return [*steps, Pointwise(every, lambda images, which: self._resample(images, chosen(params, which)))]
        if plain:
            own = chosen(params, plain)
            steps.append(Linear(plain, self._maps(own, size_zyx, device), self._boxes_read(own, size_zyx)))
        if warped:
            maps = self._affine(chosen(params, warped), size_zyx)
            steps.append(Pointwise(warped, lambda images, which: self._warp(images, *(own[which] for own in maps))))
        return steps

    def _resample(self, images: Tensor, params: GeometryParams) -> Tensor:
        """Turned images to views, some by maps along the axes and some warped."""
        size = size_of(images)
        found = images.new_empty((len(images), 1, *self.size_after(size)))
        plain, warped = (~params.warped).nonzero()[:, 0], params.warped.nonzero()[:, 0]
        rows = plain.to(images.device, non_blocking=True)
        if len(plain):
            found.index_copy_(0, rows, self._maps(chosen(params, plain), size, images.device)(images[rows]))
        rows = warped.to(images.device, non_blocking=True)
        return found.index_copy_(0, rows, self._warp(images[rows], *self._affine(chosen(params, warped), size)))

    def _boxes_read(self, params: GeometryParams, size_zyx: Size) -> list[Box]:
        """The part of each turned image that its map along the axes reads."""
        num_out = torch.tensor(self.size_after(size_zyx))
        first, end = params.box_start, params.box_start + params.box_size
        reach = (num_out - 1) / 2 * params.box_size / num_out / params.zoom
        middle = first + (params.box_size - 1) / 2
        low, high = (middle - reach).floor().long().clamp_min(0), (middle + reach).floor().long() + 2
        zoomed = params.zoomed[:, None]
        low = torch.where(zoomed, low, torch.maximum(low, first))
        high = torch.minimum(high, torch.where(zoomed, torch.tensor(size_zyx), end))
        ends = torch.stack([low, high], dim=2).tolist()
        return [((z[0], z[1]), (y[0], y[1]), (x[0], x[1])) for z, y, x in ends]

    def _maps(self, params: GeometryParams, size_zyx: Size, device: torch.device) -> AxisMaps:
        own = chosen(params, slice(None), device)
        matrices = []
        for axis, (size, num_out) in enumerate(zip(size_zyx, self.size_after(size_zyx), strict=True)):
            start, length, zoom = own.box_start[:, axis, None], own.box_size[:, axis, None], own.zoom[:, axis, None]
            position = resize_positions(num_out, start[:, 0], length[:, 0])
            middle = start + (length - 1) / 2
            position = torch.where(zoom == 1, position, middle + (position - middle) / zoom)
            position = torch.where(own.flip[:, axis, None], position.flip(1), position)
            in_box = torch.minimum(torch.maximum(position, start), start + length - 1)
            free = position if self.outside_hu is not None else position.clamp(0, size - 1)
            matrices.append(reading_matrix(torch.where(own.zoomed[:, None], free, in_box), size))
        z, y, x = matrices
        # Where no view reads outside, there is nothing to take into account.
        return AxisMaps((z, y, x), self.outside_hu if params.zoomed.any() else None)

    def _affine(self, params: GeometryParams, size_zyx: Size) -> tuple[Tensor, Tensor, Tensor]:
        """What `warp` wants to know of turned images: matrix, middle, elastic field."""
        step = params.box_size / torch.tensor(self.size_after(size_zyx)) / params.zoom * (1 - 2 * params.flip.float())
        middle = params.box_start + (params.box_size - 1) / 2
        return rotation_matrices(params.angle) * step[:, None], middle, params.elastic

    def _warp(self, images: Tensor, matrix: Tensor, middle: Tensor, elastic: Tensor) -> Tensor:
        size = self.size_after(size_of(images))
        return warp(images, matrix, middle, elastic, size_zyx=size, outside_hu=self.outside_hu)


def _turn(images: Tensor, _: slice, axes: Sequence[int]) -> Tensor:
    return images.permute(0, 1, *(2 + axis for axis in axes))


@cache
def right_angles(size_zyx: Size) -> tuple[Int64[Tensor, "turns 3"], Bool[Tensor, "turns 3"]]:
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


def rotation_matrices(angle: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3 3"]:
    """Rotations round z, then y, then x, acting on columns (z, y, x); right-handed in (z, y, x)."""
    found = torch.eye(3).repeat(len(angle), 1, 1)
    for axis, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
        cosine, sine = angle[:, axis].cos(), angle[:, axis].sin()
        one = torch.eye(3).repeat(len(angle), 1, 1)
        one[:, a, a] = one[:, b, b] = cosine
        one[:, a, b], one[:, b, a] = -sine, sine
        found = one @ found
    return found
