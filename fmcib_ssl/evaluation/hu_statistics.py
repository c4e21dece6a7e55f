"""Hand-made statistics of a patch's HU values, without a mask: the rival that needs no training.

What a table of radiomics would hold if nobody had drawn the lesion: in shells round the patch's center the distribution
of intensity, gradient and Laplacian, and under Gaussian weights round it a histogram of HU.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from fmcib_ssl.types import Array

#: Borders of the shells, mm from the center.
SHELLS_MM = (0.0, 2.0, 3.5, 5.0, 7.0, 10.0, 20.0)
#: Standard deviations of the weights under which HU are counted, mm.
SIGMAS_MM = (1.5, 3.0, 5.0, 8.0)
#: Values are cut to the first and last of these, and counted in steps of the third, HU.
HU_RANGE = (-1000, 300, 50)
#: Of the derivatives, mm.
_SMOOTHING_MM = 1.0
_PERCENTILES = (5, 25, 50, 75, 95)
_IMAGES = ("intensity", "gradient", "laplacian")


def statistic_names() -> list[str]:
    """What each number is, in order: 126 of shells, as `gradient p95, 5 to 7 mm`; 104 of histograms."""
    of_shell = ["mean", "standard deviation", *(f"p{p}" for p in _PERCENTILES)]
    names = [
        f"{image} {statistic}, {low:g} to {high:g} mm"
        for low, high in pairwise(SHELLS_MM)
        for image in _IMAGES
        for statistic in of_shell
    ]
    low, high, step = HU_RANGE
    return names + [
        f"share of {hu} to {hu + step} HU, sigma {s:g} mm" for s in SIGMAS_MM for hu in range(low, high, step)
    ]


def hu_statistics(patches: npt.ArrayLike, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Array:
    """Compute them; the numbers mean the same for patches of any size and spacing.

    Args:
        patches: HU, `(n, 1, z, y, x)`.
        spacing_mm: of the voxels, z, y, x.

    Returns:
        float32 `(n, 230)`, in the order of `statistic_names`. Intensities are HU, gradients HU per mm, Laplacians
        HU per square mm, shares 0 to 1. A shell that no voxel of the patch is in has the numbers of the one inside it.
    """
    low, high, step = HU_RANGE
    hu = np.clip(np.asarray(patches, dtype=np.float32)[:, 0], low, high)
    axes = [(np.arange(size) - size // 2) * mm for size, mm in zip(hu.shape[1:], spacing_mm, strict=True)]
    radius = np.sqrt(sum(np.square(axis) for axis in np.meshgrid(*axes, indexing="ij")))
    images = hu, *_derivatives(hu, spacing_mm)
    columns: list[Array] = []
    shell = radius == 0
    for near, far in pairwise(SHELLS_MM):
        next_shell = (near <= radius) & (radius < far)
        shell = next_shell if next_shell.any() else shell
        for image in images:
            values = image[:, shell]
            columns += [values.mean(1), values.std(1), *np.percentile(values, _PERCENTILES, axis=1)]
    for sigma in SIGMAS_MM:
        weights = np.exp(-np.square(radius) / (2 * sigma**2))
        weights /= weights.sum()
        columns += [
            (((first <= hu) & (hu < first + step)) * weights).sum((1, 2, 3)) for first in range(low, high, step)
        ]
    return np.stack(columns, axis=1).astype(np.float32)


def _derivatives(hu: Array, spacing_mm: tuple[float, float, float]) -> tuple[Array, Array]:
    """Magnitude of the gradient, and Laplacian, of the smoothed patches."""
    sigma = (0.0, *(_SMOOTHING_MM / mm for mm in spacing_mm))

    def of_order(order: int) -> list[Array]:
        per_axis = (np.eye(3, dtype=int) * order).tolist()
        return [
            gaussian_filter(hu, sigma, order=(0, *axis)) / mm**order
            for axis, mm in zip(per_axis, spacing_mm, strict=True)
        ]

    return np.sqrt(sum(np.square(slope) for slope in of_order(1))), np.asarray(sum(of_order(2)))
