"""Smoothing, lower resolution and thicker slices: what a scanner's optics and protocol do to an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fmcib_ssl.augment.geometry import along_axes, reading_matrix, resize_positions
from fmcib_ssl.augment.views import BatchedTransform, P, Part, Size, active_rows, interval, within

Padding = Literal["border", "zeros"]


class AxisTransform(BatchedTransform[P]):
    """A linear transform along the axes: a subclass says what is drawn, and the matrices that follow from it."""

    def parts(self, params: P, size_zyx: Size, device: torch.device) -> Sequence[Part]:
        """The images that are active; the matrices of all are made at once."""
        own, rows = active_rows(params, device)
        if not rows:
            return []
        matrices = self.matrices(own, size_zyx)
        return [Part(rows, lambda images, which: along_axes(images, [m if m is None else m[which] for m in matrices]))]

    @abstractmethod
    def matrices(self, own: P, size_zyx: Size) -> Sequence[Float[Tensor, "m size size"] | None]:
        """A matrix for each image along z, y, x; None leaves an axis as it is.

        Args:
            own: parameters of the images that are changed, on their device.
            size_zyx: voxels of the images.
        """


class SmoothParams(NamedTuple):
    """Drawn by `RandomGaussianSmooth`."""

    active: Bool[Tensor, " n"]
    sigma_zyx: Float[Tensor, "n 3"]  # voxels


class RandomGaussianSmooth(AxisTransform[SmoothParams]):
    """Gaussian smoothing with a width of its own for each axis.

    A voxel of the kernel holds the integral of the normal density over it, up to 4 sigma, as in MONAI.

    Args:
        prob: probability that a view is smoothed.
        sigma: smallest and largest standard deviation, voxels.
        padding: what lies outside: `"border"` the nearest voxel; `"zeros"` 0 HU, as MONAI and the published recipe
            have it, which leaves a rim drawn towards water.

    Raises:
        ValueError: a number out of range, or another padding.
    """

    def __init__(self, prob: float, sigma: Sequence[float] = (0.25, 1.5), padding: Padding = "border") -> None:
        super().__init__(prob)
        self.sigma = interval("sigma", sigma, 1e-3)
        if padding not in ("border", "zeros"):
            raise ValueError(f"padding is {padding!r}; it must be 'border' or 'zeros'.")
        self.padding = padding

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> SmoothParams:
        """Draw one width for each axis."""
        active, drawn = self._draw(seeds, 3)
        return SmoothParams(active, within(drawn, self.sigma))

    def matrices(self, own: SmoothParams, size_zyx: Size) -> Sequence[Tensor]:
        """Rows of kernels."""
        return [self._matrix(own.sigma_zyx[:, axis], size) for axis, size in enumerate(size_zyx)]

    def _matrix(self, sigma: Tensor, size: int) -> Float[Tensor, "m size size"]:
        reach = int(max(4 * self.sigma[1], 0.5) + 0.5)  # of the widest kernel
        # MONAI's: the kernel of this sigma ends earlier, at a whole number of voxels.
        ends = ((4 * sigma).clamp_min(0.5) + 0.5).floor()[:, None]
        offset = torch.arange(-reach, reach + 1, device=sigma.device, dtype=torch.float32)
        per_sigma = 0.70710678 / sigma[:, None]
        kernel = 0.5 * ((per_sigma * (offset + 0.5)).erf() - (per_sigma * (offset - 0.5)).erf())
        kernel *= offset.abs() <= ends
        # Row i of the matrix is the kernel round i; on a line that goes on by `reach` on both sides first.
        wide = F.pad(kernel, (size - 1, size - 1)).unfold(1, size + 2 * reach, 1).flip(1)
        matrix = wide[:, :, reach : reach + size]
        if self.padding == "border":
            matrix = matrix.clone()
            matrix[:, :, 0] += wide[:, :, :reach].sum(2)
            matrix[:, :, -1] += wide[:, :, reach + size :].sum(2)
            matrix /= matrix.sum(2, keepdim=True)
        return matrix.contiguous()


class LowResolutionParams(NamedTuple):
    """Drawn by `RandomLowResolution`."""

    active: Bool[Tensor, " n"]
    zoom: Float[Tensor, " n"]


class RandomLowResolution(AxisTransform[LowResolutionParams]):
    """Lower resolution: nearest voxels of a coarser grid, resized back trilinearly, as in nnU-Net and MONAI.

    Args:
        prob: probability that a view is changed.
        zoom: smallest and largest size of the coarser grid as a fraction of the view's.

    Raises:
        ValueError: a number out of range.

    Source: Isensee et al. 2021, nnU-Net, Nature Methods 18.
    """

    def __init__(self, prob: float, zoom: Sequence[float] = (0.5, 1.0)) -> None:
        super().__init__(prob)
        self.zoom = interval("zoom", zoom, 0.05, 1)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> LowResolutionParams:
        """Draw one factor for all axes."""
        active, drawn = self._draw(seeds, 1)
        return LowResolutionParams(active, within(drawn[:, 0], self.zoom))

    def matrices(self, own: LowResolutionParams, size_zyx: Size) -> Sequence[Tensor]:
        """To the coarser grid and back."""
        return [self._matrix(own.zoom, size) for size in size_zyx]

    @staticmethod
    def _matrix(zoom: Tensor, size: int) -> Float[Tensor, "m size size"]:
        coarse = (size * zoom.double()).round().clamp_min(1).float()  # voxels of the coarser line
        # Read the coarser line of which only the first voxels exist ...
        positions = resize_positions(size, torch.zeros_like(coarse), coarse)
        last = coarse[:, None] - 1
        up = reading_matrix(torch.minimum(positions.clamp_min(0), last), size)
        # ... each of them one voxel of the fine line.
        nearest = (torch.arange(size, device=zoom.device) * (size / coarse)[:, None]).floor().clamp_max(size - 1)
        return torch.bmm(up, F.one_hot(nearest.long(), size).float())


class SliceThicknessParams(NamedTuple):
    """Drawn by `RandomSliceThickness`."""

    active: Bool[Tensor, " n"]
    thickness: Float[Tensor, " n"]  # voxels
    phase: Float[Tensor, " n"]  # of the first slice, 0 to 1


class RandomSliceThickness(AxisTransform[SliceThicknessParams]):
    """Thick slices along z: means over slabs next to each other, read linearly on the fine grid again.

    Where the slabs lie is drawn too. A slab that sticks out is the mean of its inside.

    Args:
        prob: probability that a view is changed.
        thickness: smallest and largest thickness of a slice, voxels, 1 or more.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, prob: float, thickness: Sequence[float] = (2.0, 5.0)) -> None:
        super().__init__(prob)
        self.thickness = interval("thickness", thickness, 1)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> SliceThicknessParams:
        """Draw thickness and phase."""
        active, drawn = self._draw(seeds, 2)
        return SliceThicknessParams(active, within(drawn[:, 0], self.thickness), drawn[:, 1].float())

    def matrices(self, own: SliceThicknessParams, size_zyx: Size) -> Sequence[Tensor | None]:
        """To slices and back, along z."""
        size, device = size_zyx[0], own.thickness.device
        thickness, phase = own.thickness[:, None], own.phase[:, None]
        # Slab k covers [(k - phase) * thickness, (k + 1 - phase) * thickness) of [0, size), whole or in part.
        num_slabs = int(size / self.thickness[0]) + 2
        low = (torch.arange(num_slabs, device=device) - phase) * thickness
        voxel = torch.arange(size, device=device)
        covered = torch.minimum(low[..., None] + thickness[..., None], voxel + 1.0) - torch.maximum(
            low[..., None], voxel.float()
        )
        covered = covered.clamp_min(0)
        means = covered / covered.sum(2, keepdim=True).clamp_min(1e-6)
        # The centre of slab k is at position k; the last slab that has an inside ends the line.
        position = (voxel + 0.5) / thickness + phase - 0.5
        last = (covered.sum(2) > 1e-3).float().cumsum(1).argmax(1, keepdim=True)
        first = (covered.sum(2) <= 1e-3)[:, :1].long()
        position = torch.minimum(position.clamp_min(0), last.float()).maximum(first.float())
        return [torch.bmm(reading_matrix(position, num_slabs), means), None, None]
