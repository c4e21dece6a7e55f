"""What every scan must be, whatever its format: a geometry that a patient can have, and values in HU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.tables import ScanError

#: Voxel edges that a CT of a patient can have, mm.
SPACING_RANGE_MM = (0.05, 25.0)
#: A scan in HU holds air or at least fat somewhere; one that stays above this is not in HU.
HIGHEST_MINIMUM_HU = -50

_FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or a folder of DICOM slices"


def checked_geometry(
    path: Path, size: Any, spacing: Any, origin: Any, direction: npt.NDArray[np.float64]
) -> ScanGeometry:
    """The geometry of a file, if a CT of a patient can have it."""
    lowest, highest = SPACING_RANGE_MM
    if not all(lowest <= s <= highest for s in spacing):
        raise ScanError(
            path,
            f"has a spacing of {tuple(round(float(s), 4) for s in spacing)} mm; "
            f"each must be between {lowest} and {highest} mm: is its header in another unit?",
        )
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        kind = "singular" if abs(np.linalg.det(direction)) < 1e-3 else "sheared (gantry tilt?)"
        raise ScanError(path, f"has a {kind} direction matrix {direction.round(4).tolist()}, not a rotation")
    if not np.isfinite(origin).all():
        raise ScanError(path, f"has the origin {tuple(origin)}")
    (nx, ny, nz), (sx, sy, sz), (x, y, z) = size, spacing, origin
    rows: list[list[float]] = direction.tolist()
    return ScanGeometry(
        size_xyz=(int(nx), int(ny), int(nz)),
        spacing_mm_xyz=(float(sx), float(sy), float(sz)),
        origin_lps_mm=(float(x), float(y), float(z)),
        direction=tuple((a, b, c) for a, b, c in rows),
    )


def as_hu(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """The values of a file as int16 or float32, if they can be HU."""
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ScanError(path, f"holds {np.count_nonzero(~np.isfinite(values))} voxels that are NaN or Inf")
    if lowest == highest:
        raise ScanError(path, f"is constant: every voxel is {lowest}")
    if lowest > HIGHEST_MINIMUM_HU or highest < lowest + 100:
        raise ScanError(
            path,
            f"has values from {lowest} to {highest}, which is not CT in HU (air -1000, fat -100, water 0): "
            "apply the rescale slope and intercept",
        )
    limits = np.iinfo(np.int16)
    if np.issubdtype(values.dtype, np.integer) and limits.min <= lowest and highest <= limits.max:
        return values.astype(np.int16, copy=False)
    return values.astype(np.float32, copy=False)


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
        return f"its content is not what its name says, or not a format we read; use {_FORMATS}"
    if "MetaImageIO" in text and "cannot be read" in text:
        return "it is cut off, or the file that holds its voxels is missing"
    if "orthonormal" in text:
        return (
            "its direction matrix is sheared (gantry tilt?), not a rotation; resample it to a rectangular volume first"
        )
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    last = re.sub(r"^(\[nrrd\] \w+: |\w+\(0x[0-9a-f]+\): )+", "", last).strip()
    return f"it is cut off ({last})" if re.match(r"expected \d+ bytes|fread got only", last) else last
