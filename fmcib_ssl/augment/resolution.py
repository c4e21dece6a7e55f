"""Smoothing, lower resolution and thicker slices: what a scanner's optics and protocol do to an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fmcib_ssl.augment.geometry import along_axes, reading_matrix, resize_positions
from fmcib_ssl.augment.views import BatchedTransform, Params, Size, interval, within


class _AxisTransform(BatchedTransform):
    """A linear transform along the axes: a subclass says what is drawn, and the matrices that follow from it."""

    def prepare(self, own: Params, size_zyx: Size, device: torch.device) -> Params:
        """The matrices by the name of their axis."""
        return self.matrices(super().prepare(own, size_zyx, device), size_zyx)

    @abstractmethod
    def matrices(self, own: Params, size_zyx: Size) -> dict[str, Float[Tensor, "m size size"]]:
        """A matrix for each image along `"z"`, `"y"`, `"x"`; an axis without one stays as it is.

        Args:
            own: parameters of the images that are changed, on their device.
            size_zyx: voxels of the images.
        """

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Multiply along the axes."""
        return along_axes(images, [own.get(axis) for axis in "zyx"])


class RandomGaussianSmooth(_AxisTransform):
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

    def __init__(
        self, prob: float, sigma: Sequence[float] = (0.25, 1.5), padding: Literal["border", "zeros"] = "border"
    ) -> None:
        super().__init__(prob)
        self.sigma = interval("sigma", sigma, 1e-3)
        if padding not in ("border", "zeros"):
            raise ValueError(f"padding is {padding!r}; it must be 'border' or 'zeros'.")
        self.padding = padding

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw one width for each axis."""
        active, drawn = self._draw(seeds, 3)
        return {"active": active, "sigma_zyx": within(drawn, self.sigma)}

    def matrices(self, own: Params, size_zyx: Size) -> dict[str, Tensor]:
        """Rows of kernels."""
        sigmas = own["sigma_zyx"].unbind(1)
        return {axis: self._matrix(sigma, size) for axis, sigma, size in zip("zyx", sigmas, size_zyx, strict=True)}

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


class RandomLowResolution(_AxisTransform):
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

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw one factor for all axes."""
        active, drawn = self._draw(seeds, 1)
        return {"active": active, "zoom": within(drawn[:, 0], self.zoom)}

    def matrices(self, own: Params, size_zyx: Size) -> dict[str, Tensor]:
        """To the coarser grid and back."""
        return {axis: self._matrix(own["zoom"], size) for axis, size in zip("zyx", size_zyx, strict=True)}

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


class RandomSliceThickness(_AxisTransform):
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

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw thickness and phase."""
        active, drawn = self._draw(seeds, 2)
        thickness = within(drawn[:, 0], self.thickness)
        return {"active": active, "thickness": thickness, "phase": drawn[:, 1].float()}

    def matrices(self, own: Params, size_zyx: Size) -> dict[str, Tensor]:
        """To slices and back, along z."""
        size, device = size_zyx[0], own["thickness"].device
        thickness, phase = own["thickness"][:, None], own["phase"][:, None]
        # Slab k covers [(k - phase) * thickness, (k + 1 - phase) * thickness) of [0, size), whole or in part.
        num_slabs = int(size / self.thickness[0]) + 2
        low = (torch.arange(num_slabs, device=device) - phase) * thickness
        voxel = torch.arange(size, device=device)
        ends = torch.minimum(low[..., None] + thickness[..., None], voxel + 1.0)
        covered = (ends - torch.maximum(low[..., None], voxel.float())).clamp_min(0)
        means = covered / covered.sum(2, keepdim=True).clamp_min(1e-6)
        # The centre of slab k is at position k; the last slab that has an inside ends the line.
        position = (voxel + 0.5) / thickness + phase - 0.5
        last = (covered.sum(2) > 1e-3).float().cumsum(1).argmax(1, keepdim=True)
        first = (covered.sum(2) <= 1e-3)[:, :1].long()
        position = torch.minimum(position.clamp_min(0), last.float()).maximum(first.float())
        return {"z": torch.bmm(reading_matrix(position, num_slabs), means)}
