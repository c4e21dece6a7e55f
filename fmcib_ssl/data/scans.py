"""Read a CT from disk with its geometry, refuse what is not one, and cut patches from it.

The only module of the package that needs SimpleITK. A decoded scan is a NumPy array and its geometry: no SimpleITK
image outlives a call, so scans may be held across `fork` and pickled, and every filter here runs on one thread.
"""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.tables import ScanError
from fmcib_ssl.types import PADDING_HU

#: Voxel edges that a CT of a patient can have, mm.
SPACING_RANGE_MM = (0.05, 25.0)
#: A scan in HU holds air or at least fat somewhere; one that stays above this is not in HU.
HIGHEST_MINIMUM_HU = -50
#: Slices of one series may drift sideways by this much, mm, over the whole stack: rounding in the headers.
MAX_DRIFT_MM = 1.0
#: A step between slices may differ from the mean step by this part of it.
MAX_STEP_DEVIATION = 0.1

_FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or a folder of DICOM slices"


class ScanSource(NamedTuple):
    """Where a scan is: a file, or a folder of DICOM slices and, if it holds several series, which one."""

    path: Path
    series_uid: str | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """A decoded CT.

    Attributes:
        hu: `(z, y, x)`, int16 where the file's values are integers that fit, else float32.
        geometry: where its voxels are.
    """

    hu: npt.NDArray[np.int16] | npt.NDArray[np.float32]
    geometry: ScanGeometry

    def thinned(self, spacing_mm: float) -> Scan:
        """Every n-th voxel of each axis, as far apart as they can be without exceeding `spacing_mm`; no copy."""
        x, y, z = (slice(None, None, max(1, int(spacing_mm / s))) for s in self.geometry.spacing_mm_xyz)
        return Scan(self.hu[z, y, x], self.geometry.part((x, y, z)))


def read_header(path: Path | str, series_uid: str | None = None) -> ScanGeometry:
    """Geometry of a scan, without its voxels.

    Finds what a header can tell, also NIfTI files that end too early, which ITK would fill with zeros.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.

    Raises:
        ScanError: no such file, not an image, empty, cut off, 2D, 4D, colour, a direction that is no rotation, absurd
            spacing; of DICOM: several series, missing slices, gantry tilt.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom_headers(path, series_uid)[1]
    return _read_file_header(path)[1]


def read_scan(path: Path | str, series_uid: str | None = None, verify: bool = False) -> Scan:
    """Decode a scan.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        verify: also test the checksum of a `.nii.gz`, which ITK does not; takes as long again as decoding.

    Raises:
        ScanError: as `read_header`, and for damaged data, NaN or Inf, a constant image, values that are not HU.
    """
    path = Path(path)
    reader: Any
    if path.is_dir():
        files, geometry = _read_dicom_headers(path, series_uid)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        reader.SetNumberOfThreads(1)
    else:
        reader, geometry = _read_file_header(path)
        if verify and path.name.lower().endswith(".gz"):
            _verify_gzip(path)
    try:
        values = sitk.GetArrayFromImage(reader.Execute())
    except (RuntimeError, MemoryError) as error:
        raise ScanError(path, f"cannot be decoded: {_shortened(error)}") from error
    if values.shape != geometry.size_xyz[::-1]:
        raise ScanError(path, f"holds {values.shape[::-1]} voxels, its header says {geometry.size_xyz}")
    return Scan(_as_hu(values, path), geometry)


def crop_patch(scan: Scan, grid: PatchGrid, padding_hu: int = PADDING_HU) -> Int16[np.ndarray, "z y x"]:
    """The patch of a scan on a grid, by linear interpolation of the voxels it needs and no others.

    What lies outside the scan is `padding_hu`, up to the very edge of its outermost voxels: between their centres and
    their edges they continue with their own value, so scan and padding are never mixed. Values below `padding_hu`
    (what scanners write outside their field of view) are raised to it before interpolating.
    """
    x, y, z = scan.geometry.region_of(grid)
    values = scan.hu[z, y, x]
    if values.size == 0:
        return np.full(grid.size_zyx, padding_hu, dtype=np.int16)
    geometry = scan.geometry.part((x, y, z))
    image = sitk.GetImageFromArray(np.maximum(values, values.dtype.type(padding_hu)))
    image.SetSpacing(geometry.spacing_mm_xyz)
    image.SetOrigin(geometry.origin_lps_mm)
    image.SetDirection(np.ravel(geometry.direction).tolist())
    resample = sitk.ResampleImageFilter()
    resample.SetNumberOfThreads(1)
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetDefaultPixelValue(padding_hu)
    resample.SetOutputPixelType(sitk.sitkFloat32)  # into int16 ITK truncates; we round
    resample.SetSize(grid.size_xyz)
    resample.SetOutputSpacing([grid.spacing_mm] * 3)
    resample.SetOutputOrigin(grid.origin_lps_mm)
    patch = sitk.GetArrayFromImage(resample.Execute(image))
    limits = np.iinfo(np.int16)
    hu: npt.NDArray[np.int16] = np.clip(np.rint(patch), limits.min, limits.max).astype(np.int16)
    return hu


def _read_file_header(path: Path) -> tuple[Any, ScanGeometry]:
    """A reader that stands before the voxels of a file, and the file's geometry."""
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ScanError(path, f"cannot be opened: {error.strerror}") from error
    if num_bytes == 0:
        raise ScanError(path, "is empty (0 bytes)")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetNumberOfThreads(1)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ScanError(path, f"cannot be read: {_shortened(error)}") from error
    size = reader.GetSize()
    if len(size) != 3 or min(size) < 2:
        hint = "; for DICOM name the folder of the series, not one slice" if len(size) == 3 else ""
        kind = "2D" if len(size) == 2 or min(size) < 2 else f"{len(size)}D"
        raise ScanError(path, f"is a {kind} image of size {size}, not a volume{hint}")
    if (components := reader.GetNumberOfComponents()) != 1:
        raise ScanError(path, f"has {components} values a voxel (colour or vectors), not one HU value")
    if reader.HasMetaDataKey("vox_offset"):
        _check_nifti_length(path, reader)
    return reader, _checked_geometry(
        path, size, reader.GetSpacing(), reader.GetOrigin(), np.reshape(reader.GetDirection(), (3, 3))
    )


def _check_nifti_length(path: Path, reader: Any) -> None:
    """Refuse a NIfTI file that ends before its last voxel.

    ITK reads such a file without a word and fills the rest with zeros, which is the HU of water.
    """
    with path.open("rb") as file:
        head, num_bytes = file.read(2), path.stat().st_size
        if head == b"\x1f\x8b":
            # The last four bytes of a gzip file are its uncompressed length; of one cut short they are noise.
            file.seek(-4, 2)
            num_bytes = int.from_bytes(file.read(4), "little")
    voxels = int(np.prod([int(n) for n in reader.GetSize()], dtype=np.int64))
    expected = int(float(reader.GetMetaData("vox_offset"))) + voxels * int(reader.GetMetaData("bitpix")) // 8
    if head == b"\x1f\x8b":
        if num_bytes != expected % 2**32:
            _verify_gzip(path)  # a file of several members, or with something after the voxels, is in order
    elif num_bytes < expected and not path.name.lower().endswith((".hdr", ".img")):
        raise ScanError(path, f"is cut off: {num_bytes} of {expected} bytes; copy it again")


def _verify_gzip(path: Path) -> None:
    try:
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass
    except (EOFError, OSError, zlib.error) as error:
        raise ScanError(path, f"is cut off or damaged ({error}); copy it again") from error


def _read_dicom_headers(folder: Path, series_uid: str | None) -> tuple[list[str], ScanGeometry]:
    """Files of one series from its first to its last slice, and its geometry."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise ScanError(folder, "is a folder without DICOM slices (folders inside it are not searched)")
    if series_uid is None and len(series) > 1:
        raise ScanError(
            folder,
            f"holds {len(series)} DICOM series; name one in a column `series_uid`: {', '.join(sorted(series))}",
        )
    if series_uid is not None and series_uid not in series:
        raise ScanError(folder, f"has no series {series_uid!r}; it holds {', '.join(sorted(series))}")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series_uid or series[0])
    if len(files) < 2:
        raise ScanError(folder, "holds one DICOM slice; a volume needs at least two")
    slices = [_read_slice_header(Path(file)) for file in files]
    first = slices[0]
    for file, one in zip(files, slices, strict=True):
        if one.size != first.size or not np.allclose(
            [*one.spacing, *one.axes.flat], [*first.spacing, *first.axes.flat], atol=1e-4
        ):
            raise ScanError(
                folder,
                f"its slices differ in size, spacing or orientation ({Path(file).name} from {Path(files[0]).name}): "
                "is a localizer among them?",
            )
    normal = first.axes[:, 2]
    positions = np.array([one.position_lps_mm for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    files, positions = [files[i] for i in order], positions[order]
    spacing_mm = _slice_distance_mm(folder, positions, normal)
    columns, rows = first.size
    geometry = _checked_geometry(
        folder, (columns, rows, len(files)), (*first.spacing, spacing_mm), positions[0], first.axes
    )
    return files, geometry


class _Slice(NamedTuple):
    size: tuple[int, int]
    spacing: tuple[float, float]
    position_lps_mm: tuple[float, float, float]
    axes: npt.NDArray[np.float64]


def _read_slice_header(file: Path) -> _Slice:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ScanError(file, f"cannot be read: {_shortened(error)}") from error
    if not reader.HasMetaDataKey("0020|0032"):
        raise ScanError(file, "has no ImagePositionPatient: where the slice lies is not known")
    if reader.GetNumberOfComponents() != 1:
        raise ScanError(file, "is a colour image, not a CT slice")
    return _Slice(
        reader.GetSize()[:2],
        reader.GetSpacing()[:2],
        reader.GetOrigin(),
        np.reshape(reader.GetDirection(), (3, 3)),
    )


def _slice_distance_mm(
    folder: Path, positions_lps_mm: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]
) -> float:
    """Distance between slices, if they stand one above the other at equal distances.

    Raises:
        ScanError: missing, doubled or unequally spaced slices, or a stack that is not at right angles (gantry tilt).
    """
    depth = positions_lps_mm @ normal
    steps = np.diff(depth)
    step = float(np.median(steps))
    if (steps < 0.01).any():
        at = int(np.argmin(steps))
        raise ScanError(folder, f"has two slices at one place ({depth[at]:.2f} mm along the slice normal)")
    wrong = np.flatnonzero(np.abs(steps - step) > MAX_STEP_DEVIATION * step)
    if wrong.size:
        at = int(wrong[0])
        raise ScanError(
            folder,
            f"slices are missing or not equally spaced: {steps[at]:.2f} mm from slice {at + 1} to {at + 2} "
            f"(at {depth[at]:.1f} mm), {step:.2f} mm elsewhere; {wrong.size} such step(s)",
        )
    shift = positions_lps_mm[-1] - positions_lps_mm[0]
    drift_mm = float(np.linalg.norm(shift - (shift @ normal) * normal))
    if drift_mm > MAX_DRIFT_MM:
        angle = np.degrees(np.arctan2(drift_mm, depth[-1] - depth[0]))
        raise ScanError(
            folder,
            f"gantry tilt of {angle:.1f} degrees: the slices drift sideways by {drift_mm:.1f} mm; "
            "resample the series to a rectangular volume first",
        )
    return float((depth[-1] - depth[0]) / (len(depth) - 1))


def _checked_geometry(
    path: Path, size: Any, spacing: Any, origin: Any, direction: npt.NDArray[np.float64]
) -> ScanGeometry:
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


def _as_hu(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
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


def _shortened(error: BaseException) -> str:
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
