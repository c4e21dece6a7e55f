"""Where a scan lies, whatever its format: what a patient can have, and where two statements must agree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.tables import ScanError

#: Voxel edges that a CT of a patient can have, mm.
SPACING_RANGE_MM = (0.05, 25.0)
#: Two statements about one voxel's place may differ by this much: rounding.
MAX_CONFLICT_MM = 0.1
#: What can be read, for messages.
FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or DICOM (folder of slices, enhanced CT)"


def checked_geometry(
    path: Path, size: Any, spacing: Any, origin: Any, direction: npt.NDArray[np.float64]
) -> ScanGeometry:
    """The geometry of these parts, if a CT of a patient can have it."""
    (nx, ny, nz), (sx, sy, sz), (x, y, z) = size, spacing, origin
    rows: list[list[float]] = direction.tolist()
    geometry = ScanGeometry(
        size_xyz=(int(nx), int(ny), int(nz)),
        spacing_mm_xyz=(float(sx), float(sy), float(sz)),
        origin_lps_mm=(float(x), float(y), float(z)),
        direction=tuple((a, b, c) for a, b, c in rows),
    )
    return check_geometry(path, geometry)


def check_geometry(path: Path, geometry: ScanGeometry) -> ScanGeometry:
    """Refuse a geometry that no CT of a patient can have."""
    lowest, highest = SPACING_RANGE_MM
    spacing, direction = geometry.spacing_mm_xyz, np.array(geometry.direction)
    if not all(lowest <= s <= highest for s in spacing):
        raise ScanError(
            path,
            f"has a spacing of {tuple(round(s, 4) for s in spacing)} mm; "
            f"each must be between {lowest} and {highest} mm: is its header in another unit?",
        )
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        kind = "singular" if abs(np.linalg.det(direction)) < 1e-3 else "sheared (gantry tilt?)"
        raise ScanError(
            path,
            f"has a {kind} direction matrix {direction.round(4).tolist()}, not a rotation; "
            "resample it to a rectangular volume first",
        )
    if not np.isfinite(geometry.origin_lps_mm).all():
        raise ScanError(path, f"has the origin {geometry.origin_lps_mm}")
    return geometry


def check_agreement(path: Path, stated: Mapping[str, ScanGeometry], remedy: str) -> None:
    """Refuse a scan of which two statements put a corner voxel at two places.

    Args:
        path: the scan.
        stated: two geometries, by who says so.
        remedy: what to do, for the message.
    """
    (one, first), (other, second) = stated.items()
    distance_mm = np.linalg.norm(first.corners_lps_mm() - second.corners_lps_mm(), axis=1).max()
    if not distance_mm <= MAX_CONFLICT_MM:
        texts = (
            f"{name}: voxels of {numbers_text(g.spacing_mm_xyz, ' x ')} mm, the first at "
            f"({numbers_text(g.origin_lps_mm)}), the last at ({numbers_text(g.corners_lps_mm()[-1])}) LPS mm"
            for name, g in stated.items()
        )
        raise ScanError(
            path, f"its {one} and {other} are up to {distance_mm:.1f} mm apart ({'; '.join(texts)}){remedy}"
        )


def numbers_text(numbers: Iterable[float], separator: str = ", ") -> str:
    """Numbers for a message, with at most four digits after the point."""
    return separator.join(f"{round(float(number), 4):g}" for number in numbers)


def decoded(reader: Any, path: Path) -> npt.NDArray[Any]:
    """The voxels that a SimpleITK reader gives, `(z, y, x)`."""
    try:
        values: npt.NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
    except (RuntimeError, MemoryError) as error:
        raise ScanError(path, f"cannot be decoded: {shortened(error)}") from error
    return values


def shortened(error: BaseException) -> str:
    """What SimpleITK has to say, in a sentence."""
    text = str(error).rsplit("ERROR: ", 1)[-1]
    if "Unable to determine ImageIO reader" in text:
        return f"its content is not what its name says, or not a format we read; use {FORMATS}"
    if "MetaImageIO" in text and "cannot be read" in text:
        return "it is cut off, or the file that holds its voxels is missing"
    if "orthonormal" in text:
        return (
            "its direction matrix is sheared (gantry tilt?), not a rotation; resample it to a rectangular volume first"
        )
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    last = re.sub(r"^(\[nrrd\] \w+: |\w+\(0x[0-9a-f]+\): )+", "", last).strip()
    return f"it is cut off ({last})" if re.match(r"expected \d+ bytes|fread got only", last) else last
