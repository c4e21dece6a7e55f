"""Where a negative may be taken from: legal centres of a scan, found once on a coarse map, drawn from in O(1).

A strategy is a function from the coarse map of a scan to its `LegalCenters`. Here is `background_centers`: anywhere in
the body that shows none of the annotated lesions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int16
from scipy import ndimage

from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry

#: Edge of a cell of the coarse map, mm.
CELL_MM = 4.0
#: Between lung (below) and fat (above), HU.
BODY_THRESHOLD_HU = -500
#: At least this part of a negative is body. With less, air or padding would tell negatives from lesions.
MIN_BODY_FRACTION = 0.5


@dataclass(frozen=True, eq=False)
class LegalCenters:
    """Cells of a coarse map in which a negative may be centred, anywhere within the cell.

    Attributes:
        grid: the coarse map.
        cells: places in the flattened `(z, y, x)` map.
    """

    grid: PatchGrid
    cells: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.cells)

    def draw(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """A centre in LPS mm: a legal cell, each as likely, and a place in it.

        Raises:
            ValueError: there is no legal cell.
        """
        if not len(self):
            raise ValueError("no legal cell to draw from")
        cell = self.cells[rng.integers(len(self))]
        index_zyx = np.array(np.unravel_index(cell, self.grid.size_zyx)) + rng.uniform(-0.5, 0.5, size=3)
        x, y, z = (np.array(self.grid.origin_lps_mm) + index_zyx[::-1] * self.grid.spacing_mm).tolist()
        return x, y, z


def coarse_grid(scan: ScanGeometry, cell_mm: float = CELL_MM) -> PatchGrid:
    """A grid of cells along LPS that covers a scan, however it is turned."""
    lowest, highest = scan.bounds_lps_mm()
    x, y, z = np.ceil((highest - lowest) / cell_mm).astype(int).tolist()
    first = lowest + cell_mm / 2
    center = first + (np.array([x, y, z]) // 2) * cell_mm
    return PatchGrid((float(center[0]), float(center[1]), float(center[2])), (z, y, x), cell_mm)


def body_mask(coarse_hu: Int16[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    """The patient with everything inside, lungs too, without table and clothes.

    What is denser than -500 HU, opened, its largest piece, with holes filled axial slice by axial slice: in three
    dimensions the lungs are no hole, the windpipe leads out of them.
    """
    dense = ndimage.binary_opening(coarse_hu > BODY_THRESHOLD_HU)
    pieces, num_pieces = ndimage.label(dense)
    if num_pieces == 0:
        return np.zeros(coarse_hu.shape, dtype=bool)
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.stack([ndimage.binary_fill_holes(axial) for axial in body])


def background_centers(
    coarse_hu: Int16[np.ndarray, "z y x"],
    grid: PatchGrid,
    lesions_lps_mm: Float[np.ndarray, "lesions 3"],
    patch_extent_mm_xyz: tuple[float, float, float],
) -> LegalCenters:
    """Centres in the body whose patch is at least half body and shares nothing with the patch of any lesion.

    Wherever in its cell a centre is drawn, its patch and that of a lesion have no point in common; that the centre is
    in the body and the patch half in it holds to within a cell.

    Args:
        coarse_hu: the scan on `grid`.
        grid: as `coarse_grid` gives it.
        lesions_lps_mm: every annotated lesion of the scan.
        patch_extent_mm_xyz: edges of a patch, of the negative and of the lesions.
    """
    body = body_mask(coarse_hu)
    window_zyx = [max(1, 2 * round((extent / grid.spacing_mm - 1) / 2) + 1) for extent in patch_extent_mm_xyz[::-1]]
    fraction = ndimage.uniform_filter(body.astype(np.float32), window_zyx, mode="constant", cval=0.0)
    legal = body & (fraction >= MIN_BODY_FRACTION)
    axes_xyz = [
        first + grid.spacing_mm * np.arange(n) for first, n in zip(grid.origin_lps_mm, grid.size_xyz, strict=True)
    ]
    # Two patches overlap if their centres are nearer than a patch on all three axes; half a cell more for the draw.
    reach_xyz = [extent + grid.spacing_mm / 2 for extent in patch_extent_mm_xyz]
    for lesion in lesions_lps_mm:
        near_x, near_y, near_z = (
            np.flatnonzero(np.abs(axis - center) < reach)
            for axis, center, reach in zip(axes_xyz, lesion, reach_xyz, strict=True)
        )
        legal[np.ix_(near_z, near_y, near_x)] = False
    return LegalCenters(grid, np.flatnonzero(legal).astype(np.int32))
