"""Where a negative may be taken from: a coarse map of the scan, and strategies that draw a centre on it.

A scan is divided into cells of about 4 mm, each with whether it is in the patient and what the tissue round it is like.
The map is made once, by `prepare`, and memory-mapped. A draw proposes a fixed number of cells at random and takes the
first legal one (`hard`: the legal one that is most like the lesion). The first legal one of independent uniform
proposals is uniform over all that are legal. Only if none of them is, the map is searched as a whole, which gives an
exact answer or certainty that the scan has no place. So a draw looks at a few dozen cells, however large the scan.

Coordinates are voxels z, y, x of the grid that the map was made from.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int, Int16
from scipy import ndimage

from fmcib_ssl.io import open_regular
from fmcib_ssl.types import PADDING_HU

#: At least this part of a negative is body. With less, air or padding would tell negatives from lesions.
_MIN_BODY_FRACTION = 0.5
#: Cells proposed for each negative: if a quarter of them is legal, all fail once in a hundred million draws.
PROPOSALS_PER_NEGATIVE = 64

_Cells = Int[np.ndarray, "cells 3"]
#: Edge of a cell, mm; as near to it as whole voxels allow.
_CELL_MM = 4.0
#: Edge of the cube of cells whose voxels are the tissue at a cell.
_TISSUE_WINDOW_CELLS = 3
#: Between lung (below) and fat (above), HU.
_BODY_THRESHOLD_HU = -500

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
    cells["body"] = _body_mask(sums / counts)
    # Sums over the window, zero outside the scan, divided by the number of voxels that are there.
    window = [ndimage.uniform_filter(a, _TISSUE_WINDOW_CELLS, mode="constant") for a in (sums, squares, counts)]
    mean = window[0] / window[2]
    cells["mean_hu"] = np.rint(mean)
    cells["spread_hu"] = np.rint(np.sqrt(np.clip(window[1] / window[2] - mean**2, 0, None)))
    z, y, x = hu_zyx.shape
    return CoarseMap(cells, (z, y, x), spacing_mm)


def _body_mask(coarse_hu: npt.NDArray[np.float64] | npt.NDArray[np.int16]) -> Bool[np.ndarray, "z y x"]:
    """The patient with everything inside, lungs too, without table and clothes.

    What is denser than -500 HU, opened, its largest piece, with holes filled axial slice by axial slice: in three
    dimensions the lungs are no hole, the windpipe leads out of them.
    """
    dense = ndimage.binary_opening(coarse_hu > _BODY_THRESHOLD_HU)
    pieces, num_pieces = ndimage.label(dense)
    if num_pieces == 0:
        return np.zeros(coarse_hu.shape, dtype=bool)
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.stack([ndimage.binary_fill_holes(axial) for axial in body])


def _voxels_per_cell(spacing_mm: float) -> int:
    return max(1, round(_CELL_MM / spacing_mm))


@dataclass(frozen=True, eq=False)
class NegativeQuery:
    """What a negative is wanted for, in voxels of one scan.

    Attributes:
        coarse: map of the scan to draw from.
        patch_size_zyx: of the negative and of the lesions' patches.
        lesions_zyx: centres of all annotated lesions of that scan, rounded as their patches are.
        lesion_zyx: centre of the lesion that wants a negative; None if it lies in another scan.
        tissue_hu: mean and spread at that lesion, as `CoarseMap.tissue_at` gives them for its scan.
    """

    coarse: CoarseMap
    patch_size_zyx: npt.ArrayLike
    lesions_zyx: Float[np.ndarray, "lesions 3"] | Int[np.ndarray, "lesions 3"]
    lesion_zyx: npt.NDArray[np.float64] | npt.NDArray[np.int64] | None
    tissue_hu: Float[np.ndarray, " tissue"]

    def cell_centers(self, cells: _Cells) -> Float[np.ndarray, "cells 3"]:
        """Middle of each cell, in voxels."""
        edge = self.coarse.voxels_per_cell
        centers: npt.NDArray[np.float64] = cells * edge + (edge - 1) / 2
        return centers

    @property
    def window_zyx(self) -> list[int]:
        """Edges of the patch in cells, rounded to odd numbers."""
        edge = self.coarse.voxels_per_cell
        return [max(1, 2 * round((n / edge - 1) / 2) + 1) for n in np.asarray(self.patch_size_zyx).tolist()]

    def is_half_body(self, cell: npt.NDArray[np.int64]) -> bool:
        """Whether a patch centred on a cell is at least half body; what lies outside the scan is not."""
        window = self.window_zyx
        box = tuple(slice(max(0, c - w // 2), c + w // 2 + 1) for c, w in zip(cell.tolist(), window, strict=True))
        return bool(self.coarse.body[box].sum() >= _MIN_BODY_FRACTION * np.prod(window))


class MiningStrategy(Protocol):
    """Draws centres of negatives."""

    def draw(self, query: NegativeQuery, num: int, rng: np.random.Generator) -> Int[np.ndarray, "num 3"] | None:
        """Centres of `num` negatives, z, y, x in voxels; None where the scan has no legal place."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Anywhere in the scan, air and lesions included, the patch inside the scan where it fits: the published way."""

    def draw(self, query: NegativeQuery, num: int, rng: np.random.Generator) -> Int[np.ndarray, "num 3"]:
        """Each centre equally likely."""
        size, shape = np.ceil(query.patch_size_zyx).astype(int), np.array(query.coarse.shape_zyx)
        fits = shape >= size
        lowest = np.where(fits, size // 2, 0)
        return rng.integers(lowest, np.where(fits, shape - size + size // 2 + 1, shape), size=(num, 3))


@dataclass(frozen=True)
class Background:
    """In the body, at least half of the patch body, sharing no voxel with the patch of any annotated lesion.

    What is said of lesions holds for every place in a cell, what is said of the body to within a cell.
    """

    def draw(self, query: NegativeQuery, num: int, rng: np.random.Generator) -> Int[np.ndarray, "num 3"] | None:
        """Each legal cell equally likely, and each place in it."""
        proposed = self.propose(query, PROPOSALS_PER_NEGATIVE * num, rng)
        chosen: list[npt.NDArray[np.int64]] = []
        for cell in self.preferred(query, proposed[self.accepts(query, proposed)]):
            if query.is_half_body(cell):
                chosen.append(cell)
                if len(chosen) == num:
                    return self._place(query, np.stack(chosen), rng)
        legal = self.legal_cells(query)
        if len(legal) == 0:
            return None
        again = legal[rng.integers(len(legal), size=max(num, len(proposed)))]
        return self._place(query, self.preferred(query, again)[:num], rng)

    def propose(self, query: NegativeQuery, num: int, rng: np.random.Generator) -> _Cells:
        """Cells to consider, drawn independently."""
        return rng.integers(0, query.coarse.cells.shape, size=(num, 3))

    def accepts(self, query: NegativeQuery, cells: _Cells) -> Bool[np.ndarray, " cells"]:
        """Which cells are in the body and clear of lesions, wherever in the cell the centre will be."""
        accepted: npt.NDArray[np.bool_] = query.coarse.body[tuple(cells.T)].copy()
        centers = query.cell_centers(cells)
        # Two patches have a voxel in common if their centres are nearer than a patch on all three axes.
        reach = np.asarray(query.patch_size_zyx) + (query.coarse.voxels_per_cell - 1) / 2
        for lesion in query.lesions_zyx:
            accepted &= (np.abs(centers - lesion) >= reach).any(axis=1)
        return accepted

    def preferred(self, query: NegativeQuery, cells: _Cells) -> _Cells:
        """The cells in the order in which they are to be tried."""
        return cells

    def legal_cells(self, query: NegativeQuery) -> _Cells:
        """Every cell that may be drawn, by a search of the whole map."""
        fraction = ndimage.uniform_filter(query.coarse.body.astype(np.float32), query.window_zyx, mode="constant")
        # The windows are odd, so no fraction is exactly a half and rounding decides nothing.
        cells = np.argwhere(query.coarse.body & (fraction > _MIN_BODY_FRACTION))
        legal: npt.NDArray[np.int64] = cells[self.accepts(query, cells)]
        return legal

    @staticmethod
    def _place(query: NegativeQuery, cells: _Cells, rng: np.random.Generator) -> Int[np.ndarray, "num 3"]:
        """A random voxel of each cell."""
        edge = query.coarse.voxels_per_cell
        first: npt.NDArray[np.int64] = cells * edge
        return first + rng.integers(0, np.minimum(edge, np.array(query.coarse.shape_zyx) - first))


@dataclass(frozen=True)
class Near(Background):
    """As `Background`, in a shell round the lesion: the same region of the body, so much the same context.

    In another scan, where there is no lesion to be near to, it is `Background`.

    Attributes:
        inner_mm: least distance of the cell's centre from the lesion's.
        outer_mm: greatest distance.
    """

    inner_mm: float = 50.0
    outer_mm: float = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.inner_mm < self.outer_mm:
            raise ValueError(f"inner_mm={self.inner_mm}, outer_mm={self.outer_mm}: need 0 <= inner_mm < outer_mm")

    def propose(self, query: NegativeQuery, num: int, rng: np.random.Generator) -> _Cells:
        """Cells of the shell, each equally likely."""
        if query.lesion_zyx is None:
            return super().propose(query, num, rng)
        edge, spacing = query.coarse.voxels_per_cell, query.coarse.spacing_mm
        # A shell thicker by a cell: every cell whose centre is in the real one lies in this one as a whole.
        margin = edge * np.sqrt(3) / 2
        inner, outer = max(0.0, self.inner_mm / spacing - margin), self.outer_mm / spacing + margin
        radius = np.cbrt(rng.uniform(inner**3, outer**3, size=(num, 1)))
        direction = rng.normal(size=(num, 3))
        points = query.lesion_zyx + radius * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        cells: npt.NDArray[np.int64] = np.floor((points + 0.5) / edge).astype(np.int64)
        return cells[((cells >= 0) & (cells < query.coarse.cells.shape)).all(axis=1)]

    def accepts(self, query: NegativeQuery, cells: _Cells) -> Bool[np.ndarray, " cells"]:
        """As in `Background`, and in the shell."""
        accepted = super().accepts(query, cells)
        if query.lesion_zyx is not None:
            distance = np.linalg.norm(query.cell_centers(cells) - query.lesion_zyx, axis=1) * query.coarse.spacing_mm
            accepted &= (distance >= self.inner_mm) & (distance <= self.outer_mm)
        return accepted


@dataclass(frozen=True)
class Hard(Background):
    """As `Background`, but of many random places the one whose tissue is most like the lesion's.

    Alike means a small distance in (mean HU, standard deviation of HU), both over 12 mm.

    Attributes:
        num_candidates: cells considered for each negative; the more, the harder.
    """

    num_candidates: int = 256

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates={self.num_candidates} must be at least 1")

    def propose(self, query: NegativeQuery, num: int, rng: np.random.Generator) -> _Cells:
        """As many cells as are to be considered, anywhere."""
        return super().propose(query, num // PROPOSALS_PER_NEGATIVE * self.num_candidates, rng)

    def preferred(self, query: NegativeQuery, cells: _Cells) -> _Cells:
        """The most similar first."""
        tissue = query.coarse.cells[tuple(cells.T)]
        mean, spread = query.tissue_hu
        distance = np.hypot(tissue["mean_hu"] - mean, tissue["spread_hu"] - spread)
        return cells[np.argsort(distance, kind="stable")]


STRATEGIES: dict[str, Callable[[], MiningStrategy]] = {
    "uniform": Uniform,
    "background": Background,
    "near": Near,
    "hard": Hard,
}
