"""What a scan is like, coarsely: where the patient is, and what the tissue is like there.

A scan is divided into cells of about 4 mm. Made once (by `prepare`, or when a scan is read directly), the map is small
enough to be memory-mapped, and what is drawn from it costs the same however large the scan.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int16
from scipy import ndimage

from fmcib_ssl.io import open_regular
from fmcib_ssl.types import PADDING_HU

#: Edge of a cell, mm; as near to it as whole voxels allow.
CELL_MM = 4.0
#: Edge of the cube of cells whose voxels are the tissue at a cell.
TISSUE_WINDOW_CELLS = 3
#: Between lung (below) and fat (above), HU.
BODY_THRESHOLD_HU = -500

_CELL = np.dtype([("mean_hu", "<i2"), ("spread_hu", "<i2"), ("body", "?")])
_HEADER = np.dtype([("magic", "S8"), ("shape_zyx", "<i4", 3), ("reserved", "<i4"), ("spacing_mm", "<f8")])
_MAGIC = b"CELLS-01"


@dataclass(frozen=True, eq=False)
class CoarseMap:
    """What a scan is like, cell by cell.

    Attributes:
        cells: `(z, y, x)` records of `body` (bool), and of mean and standard deviation of the HU in the 3 x 3 x 3 cells
            round it, `mean_hu` and `spread_hu` (int16). Cell `k` of an axis has voxels `k * n` to `(k + 1) * n - 1`
            with `n = voxels_per_cell`.
        shape_zyx: of the scan, in voxels; the last cells may be cut off.
        spacing_mm: edge of a voxel.
    """

    cells: npt.NDArray[np.void]
    shape_zyx: tuple[int, int, int]
    spacing_mm: float

    @property
    def voxels_per_cell(self) -> int:
        """Edge of a cell in voxels."""
        return _voxels_per_cell(self.spacing_mm)

    @property
    def body(self) -> Bool[np.ndarray, "z y x"]:
        """The patient with everything inside, without table and clothes."""
        body: npt.NDArray[np.bool_] = self.cells["body"]
        return body

    @property
    def body_volume_ml(self) -> float:
        """Volume of the body, to whole cells."""
        return float(self.body.sum()) * (self.voxels_per_cell * self.spacing_mm) ** 3 / 1000

    def tissue_at(self, center_zyx: npt.ArrayLike) -> Float[np.ndarray, " tissue"]:
        """Mean and spread of HU round a voxel of the scan."""
        index = np.floor((np.asarray(center_zyx) + 0.5) / self.voxels_per_cell).astype(int)
        cell = self.cells[tuple(np.clip(index, 0, np.array(self.cells.shape) - 1))]
        return np.array([cell["mean_hu"], cell["spread_hu"]], dtype=np.float64)

    def to_bytes(self) -> bytes:
        """The content of a file for `open`: a header of 32 bytes, then the cells as they are, uncompressed."""
        return np.array((_MAGIC, self.shape_zyx, 0, self.spacing_mm), _HEADER).tobytes() + self.cells.tobytes()

    @classmethod
    def open(cls, path: Path) -> tuple[CoarseMap, mmap.mmap]:
        """Map a file into memory, which is given too: a draw then reads a few pages of it and nothing else.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is not what `to_bytes` gives, or cut off.
        """
        descriptor = open_regular(path)
        try:
            content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)  # outlives the descriptor
        finally:
            os.close(descriptor)
        header = np.frombuffer(content, _HEADER, count=1)[0]
        if header["magic"] != _MAGIC:
            raise ValueError("not a coarse map")
        z, y, x = header["shape_zyx"].tolist()
        spacing_mm = float(header["spacing_mm"])
        edge = _voxels_per_cell(spacing_mm)
        cells = np.frombuffer(content, _CELL, offset=_HEADER.itemsize).reshape([-(-n // edge) for n in (z, y, x)])
        return cls(cells, (z, y, x), spacing_mm), content


def build_coarse_map(hu_zyx: Int16[np.ndarray, "z y x"], spacing_mm: float) -> CoarseMap:
    """Make the coarse map of a scan on a grid along LPS with isotropic voxels.

    Args:
        hu_zyx: the scan. Values below -1024 HU count as -1024.
        spacing_mm: edge of a voxel.
    """
    edge = _voxels_per_cell(spacing_mm)
    starts = [np.arange(0, n, edge) for n in hu_zyx.shape]
    shape = tuple(len(s) for s in starts)
    sums, squares = np.empty(shape), np.empty(shape)
    for k, first in enumerate(starts[0]):  # a slab at a time: no second scan in memory
        slab = np.maximum(hu_zyx[first : first + edge], PADDING_HU).astype(np.float32)
        for total, power in ((sums, slab), (squares, slab * slab)):
            total[k] = np.add.reduceat(np.add.reduceat(power.sum(axis=0), starts[1], axis=0), starts[2], axis=1)
    counts = np.ones(shape)
    for axis, n in enumerate(hu_zyx.shape):
        length = np.diff(np.append(starts[axis], n))
        counts *= length.reshape([-1 if a == axis else 1 for a in range(3)])
    cells = np.empty(shape, _CELL)
    cells["body"] = body_mask(sums / counts)
    # Sums over the window, zero outside the scan, divided by the number of voxels that are there.
    window = [ndimage.uniform_filter(a, TISSUE_WINDOW_CELLS, mode="constant") for a in (sums, squares, counts)]
    mean = window[0] / window[2]
    cells["mean_hu"] = np.rint(mean)
    cells["spread_hu"] = np.rint(np.sqrt(np.clip(window[1] / window[2] - mean**2, 0, None)))
    z, y, x = hu_zyx.shape
    return CoarseMap(cells, (z, y, x), spacing_mm)


def body_mask(coarse_hu: npt.NDArray[np.float64] | npt.NDArray[np.int16]) -> Bool[np.ndarray, "z y x"]:
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


def _voxels_per_cell(spacing_mm: float) -> int:
    return max(1, round(CELL_MM / spacing_mm))
