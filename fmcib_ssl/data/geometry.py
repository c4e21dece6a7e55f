"""Where the voxels of a scan lie in the patient.

Everything is in LPS millimetres (x to the patient's left, y to the back, z to the head), the frame of DICOM and of
SimpleITK. Index `(0, 0, 0)` is the *centre* of the first voxel, so a scan fills indices from -0.5 to size - 0.5.
A point is turned into an index only by the grid whose voxels are read with it; nothing is reoriented afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from fmcib_ssl.types import ScanError

FloatArray = npt.NDArray[np.float64]

#: Voxel edges that a CT of a patient can have, mm.
_SPACING_RANGE_MM = (0.05, 25.0)
#: What to do with a sheared scan.
RESAMPLE = "resample it to a rectangular volume first"
_CORNERS = np.array(list(itertools.product((0.0, 1.0), repeat=3)))


def ras_to_lps(points_ras_mm: ArrayLike) -> Float[np.ndarray, "*points 3"]:
    """RAS millimetres to LPS, and back: x and y change their sign."""
    return np.asarray(points_ras_mm, dtype=np.float64) * (-1.0, -1.0, 1.0)


@dataclass(frozen=True)
class ScanGeometry:
    """Where the voxels of a scan lie in the patient.

    Attributes:
        size_xyz: number of voxels.
        spacing_mm_xyz: distance between voxel centres along each index axis.
        origin_lps_mm: centre of voxel (0, 0, 0).
        direction: 3x3, rows; column `k` is the LPS unit vector of index axis `k`.
    """

    size_xyz: tuple[int, int, int]
    spacing_mm_xyz: tuple[float, float, float]
    origin_lps_mm: tuple[float, float, float]
    direction: tuple[tuple[float, float, float], ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))

    @classmethod
    def of(cls, size_xyz: ArrayLike, spacing: ArrayLike, origin: ArrayLike, direction: ArrayLike) -> ScanGeometry:
        """From any sequences of numbers, as libraries return them."""
        size, (sx, sy, sz), (x, y, z), rows = (np.asarray(a).tolist() for a in (size_xyz, spacing, origin, direction))
        return cls(tuple(size), (sx, sy, sz), (x, y, z), tuple(map(tuple, rows)))

    @classmethod
    def from_affine(cls, size_xyz: ArrayLike, index_to_lps_mm: FloatArray) -> ScanGeometry:
        """The geometry of a 4x4 (or 3x4) matrix from voxel indices to LPS mm, not checked."""
        spacing = np.linalg.norm(index_to_lps_mm[:3, :3], axis=0)
        direction = index_to_lps_mm[:3, :3] / np.where(spacing > 0, spacing, 1) + 0.0  # no minus before a zero
        return cls.of(size_xyz, spacing, index_to_lps_mm[:3, 3] + 0.0, direction)

    @property
    def _index_to_mm(self) -> FloatArray:
        return np.array(self.direction, dtype=np.float64) * self.spacing_mm_xyz

    def to_lps_mm(self, index_xyz: ArrayLike) -> Float[np.ndarray, "*points 3"]:
        """Position of a voxel's centre, or of a fractional index, in LPS mm."""
        points: FloatArray = np.asarray(index_xyz, dtype=np.float64) @ self._index_to_mm.T + self.origin_lps_mm
        return points

    def to_index_xyz(self, points_lps_mm: ArrayLike) -> Float[np.ndarray, "*points 3"]:
        """Fractional voxel index of a point, x, y, z. The inverse of `to_lps_mm`."""
        offset = np.asarray(points_lps_mm, dtype=np.float64) - self.origin_lps_mm
        index: FloatArray = offset @ np.linalg.inv(self._index_to_mm).T
        return index

    def contains(self, points_lps_mm: ArrayLike) -> Bool[np.ndarray, " *points"]:
        """Whether a point lies in a voxel of the scan, edges included."""
        index = self.to_index_xyz(points_lps_mm)
        edge = 0.5 + 1e-6  # the inverse of a direction is exact to rounding only
        return np.asarray(((index >= -edge) & (index <= np.array(self.size_xyz) - 1 + edge)).all(axis=-1))

    def distance_outside_mm(self, point_lps_mm: ArrayLike) -> float:
        """How far a point is from the nearest edge of the scan; 0 inside."""
        index = self.to_index_xyz(point_lps_mm)
        nearest = np.clip(index, -0.5, np.array(self.size_xyz) - 0.5)
        return float(np.linalg.norm(self._index_to_mm @ (index - nearest)))

    def corners_lps_mm(self, margin: float = 0.0) -> Float[np.ndarray, "8 3"]:
        """The eight corners, from the first voxel's to the last voxel's.

        Args:
            margin: how far beyond the centres of the corner voxels, in voxels; 0.5 is where the scan ends.
        """
        return self.to_lps_mm(_CORNERS * (np.array(self.size_xyz) - 1 + 2 * margin) - margin)

    def bounds_lps_mm(self) -> tuple[FloatArray, FloatArray]:
        """Lowest and highest x, y, z that a voxel of the scan reaches."""
        corners = self.corners_lps_mm(0.5)
        return corners.min(axis=0), corners.max(axis=0)


def check_geometry(path: Path, geometry: ScanGeometry) -> ScanGeometry:
    """Refuse a geometry that is impossible for a CT of a patient."""
    lowest, highest = _SPACING_RANGE_MM
    spacing, direction = geometry.spacing_mm_xyz, np.array(geometry.direction)
    if not all(lowest <= s <= highest for s in spacing):
        reason = f"has a spacing of {tuple(round(s, 4) for s in spacing)} mm"
        raise ScanError(
            path, f"{reason}; each must be between {lowest} and {highest} mm: is its header in another unit?"
        )
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        kind = "singular" if abs(np.linalg.det(direction)) < 1e-3 else "sheared (gantry tilt?)"
        reason = f"has a {kind} direction matrix {direction.round(4).tolist()}, not a rotation"
        raise ScanError(path, f"{reason}; {RESAMPLE}")
    if not np.isfinite(geometry.origin_lps_mm).all():
        raise ScanError(path, f"has the origin {geometry.origin_lps_mm}")
    return geometry


def numbers_text(numbers: Iterable[float], separator: str = ", ") -> str:
    """Numbers for a message, with at most four digits after the point."""
    return separator.join(f"{round(float(number), 4):g}" for number in numbers)
