"""Read a CT from disk with its geometry, refuse what is not one, and cut patches from it.

A decoded scan is a NumPy array and its geometry: no SimpleITK image outlives a call, so scans may be held across `fork`
and pickled, and every filter here runs on one thread. DICOM is read in `dicom_scans`; everything else here.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.dicom_files import is_dicom
from fmcib_ssl.data.dicom_scans import read_dicom_header, read_dicom_volume
from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.scan_checks import as_hu, checked_geometry, decoded, shortened
from fmcib_ssl.data.tables import ScanError
from fmcib_ssl.types import PADDING_HU


class ScanSource(NamedTuple):
    """Where a scan is: a file, or a folder of DICOM slices and, if it holds several series, which one."""

    path: Path
    series_uid: str | None = None
    any_modality: bool = False  # read DICOM that says to be no CT


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


def read_header(path: Path | str, series_uid: str | None = None, any_modality: bool = False) -> ScanGeometry:
    """Geometry of a scan, without its voxels.

    Finds what a header can tell, also NIfTI files that end too early, which ITK would fill with zeros.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        any_modality: of DICOM, accept a modality that is not CT.

    Raises:
        ScanError: no such file, not an image, empty, cut off, 2D, 4D, colour, a direction that is no rotation, absurd
            spacing; of DICOM: several series, another modality, slices that are missing, damaged or not on a regular
            grid, tags without which place or values are not known.
    """
    path = Path(path)
    if path.is_dir() or is_dicom(path):
        return read_dicom_header(path, series_uid, any_modality)
    return _read_file_header(path)[1]


def read_scan(
    path: Path | str, series_uid: str | None = None, any_modality: bool = False, *, verify: bool = False
) -> Scan:
    """Decode a scan.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        any_modality: of DICOM, accept a modality that is not CT.
        verify: also test the checksum of a `.nii.gz`, which ITK does not; takes as long again as decoding.

    Raises:
        ScanError: as `read_header`, and for damaged data, NaN or Inf, a constant image, values that are not HU.
    """
    path = Path(path)
    if path.is_dir() or is_dicom(path):
        values, geometry = read_dicom_volume(path, series_uid, any_modality)
    else:
        reader, geometry = _read_file_header(path)
        if verify and path.name.lower().endswith(".gz"):
            _verify_gzip(path)
        values = decoded(reader, path)
    if values.shape != geometry.size_xyz[::-1]:
        raise ScanError(path, f"holds {values.shape[::-1]} voxels, its header says {geometry.size_xyz}")
    return Scan(as_hu(values, path), geometry)


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
        raise ScanError(path, f"cannot be read: {shortened(error)}") from error
    size = reader.GetSize()
    if len(size) != 3 or min(size) < 2:
        hint = "; for DICOM name the folder of the series, not one slice" if len(size) == 3 else ""
        kind = "2D" if len(size) == 2 or min(size) < 2 else f"{len(size)}D"
        raise ScanError(path, f"is a {kind} image of size {size}, not a volume{hint}")
    if (components := reader.GetNumberOfComponents()) != 1:
        raise ScanError(path, f"has {components} values a voxel (colour or vectors), not one HU value")
    if reader.HasMetaDataKey("vox_offset"):
        _check_nifti_length(path, reader)
    return reader, checked_geometry(
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
