"""An encoder for patches that are centred on a lesion's point: it pools round that point, and after every stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fmcib_ssl.types import Preprocessing

#: Windows (lowest, highest HU): lung with ground glass, soft tissue, calcium.
WINDOWS_HU = ((-1000.0, 400.0), (-160.0, 240.0), (0.0, 1500.0))


class ConcentricResNet(nn.Module):
    """A small ResNet whose features are statistics of all its stages, most of them taken round the patch's centre.

    A patch is centred on the lesion, and most of it is not lesion: a mean over the whole patch says more about vessels
    and chest wall than about a nodule of 6 mm. So every channel of every stage is averaged with Gaussian weights of
    several widths round the voxel `size // 2`, which holds the lesion's point, and over the whole patch; its maximum is
    kept too. The first stages' features keep density, which a network's last stage gives up.

    The patch is first cut into windows of intensity, one channel each, so that 100 HU of soft tissue are no smaller
    a difference to the network than 500 HU of bone.

    Features: for each stage of width `w`, `w` maxima, then `(len(sigmas) + 1) * w` means.

    Args:
        widths: channels of the stem and of each residual block after it; each halves the grid.
        sigmas: widths of the Gaussian weights, voxels.
        windows_hu: lowest and highest HU of each window; values beyond are clamped.
        hu_offset: of the preprocessing, which is undone to get HU.
        hu_scale: likewise.

    Raises:
        ValueError: no width, a width that is not positive, or a window or sigma of no extent.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        *,
        sigmas: Sequence[float] = (2.0, 5.0),
        windows_hu: Sequence[Sequence[float]] = WINDOWS_HU,
        hu_offset: float = Preprocessing.hu_offset,
        hu_scale: float = Preprocessing.hu_scale,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths={list(widths)}: need the channels of at least one stage, all positive.")
        if any(sigma <= 0 for sigma in sigmas):
            raise ValueError(f"sigmas={list(sigmas)}: widths of Gaussian weights are positive, in voxels.")
        if not windows_hu or any(len(window) != 2 or window[0] >= window[1] for window in windows_hu):
            raise ValueError(f"windows_hu={[list(w) for w in windows_hu]}: each is (lowest, highest) in HU.")
        self.sigmas = tuple(sigmas)
        self.windows_hu = tuple((float(low), float(high)) for low, high in windows_hu)
        self.hu_offset, self.hu_scale = hu_offset, hu_scale
        self.stem = nn.Sequential(
            nn.Conv3d(len(self.windows_hu), widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm3d(widths[0]),
            nn.ReLU(),
        )
        self.blocks = nn.ModuleList(_Block(before, after) for before, after in pairwise(widths))
        # Weights in this layout make a CPU's convolutions choose it, and run a quarter faster.
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, patches: Float[Tensor, "batch 1 z y x"]) -> Float[Tensor, "batch features"]:
        """Features of preprocessed patches whose lesion is in the voxel `size // 2`."""
        size_zyx = patches.shape[2:]
        grid = self.stem(self._windows(patches))
        features = [*self._pooled(grid, size_zyx, 2)]
        for number, block in enumerate(self.blocks, start=2):
            grid = block(grid)
            features += self._pooled(grid, size_zyx, 2**number)
        return torch.cat(features, dim=1)

    def _windows(self, patches: Tensor) -> Tensor:
        """Each window from -2 to 2: the spread that convolutions are initialised for."""
        hu = patches * self.hu_scale - self.hu_offset
        windows = [(hu.clamp(low, high) - (low + high) / 2) * (4 / (high - low)) for low, high in self.windows_hu]
        return torch.cat(windows, dim=1)

    def _pooled(self, grid: Tensor, size_zyx: Sequence[int], stride: int) -> tuple[Tensor, Tensor]:
        """Maxima and weighted means of a stage, whose cell `i` is centred on voxel `i * stride` along each axis."""
        squares = [
            (torch.arange(cells, device=grid.device, dtype=torch.float32) * stride - size // 2).square()
            for cells, size in zip(grid.shape[2:], size_zyx, strict=True)
        ]
        squared = (squares[0][:, None, None] + squares[1][:, None] + squares[2]).flatten()
        # A softmax and not a plain quotient: a sigma far below the stride would give 0 / 0.
        weights = [torch.softmax(-squared / (2 * sigma**2), dim=0) for sigma in self.sigmas]
        weights.append(torch.full_like(squared, 1 / len(squared)))
        flat = grid.flatten(2)
        means = flat @ torch.stack(weights, dim=1).to(flat.dtype)
        return flat.amax(dim=2), means.flatten(1)


class _Block(nn.Module):
    """A residual block that halves the grid."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(after)
        self.conv2 = nn.Conv3d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(after)
        self.shortcut = nn.Sequential(nn.Conv3d(before, after, 1, stride=2, bias=False), nn.BatchNorm3d(after))

    def forward(self, grid: Tensor) -> Tensor:
        """Halve the grid."""
        change = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(grid)))))
        return F.relu(cast(Tensor, self.shortcut(grid)) + change)
