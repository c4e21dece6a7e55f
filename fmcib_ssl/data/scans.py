"""Read a CT from disk with its geometry, refuse what is not one, and cut patches from it.

A decoded scan is a NumPy array and its geometry: no SimpleITK image outlives a call, so scans may be held across `fork`
and pickled, and every filter here runs on one thread. `dicom_scans`, `nifti_scans` and `itk_scans` read the formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.dicom_files import is_dicom
from fmcib_ssl.data.dicom_scans import read_dicom_header, read_dicom_volume
from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.hounsfield import HuSummary, as_hu
from fmcib_ssl.data.itk_scans import read_itk_header, read_itk_volume
from fmcib_ssl.data.nifti_scans import Affine, is_nifti, read_nifti_header, read_nifti_volume
from fmcib_ssl.data.scan_checks import shortened
from fmcib_ssl.data.tables import ScanError
from fmcib_ssl.types import PADDING_HU, Padding


class ScanSource(NamedTuple):
    """Where a scan is, and how it is to be read.

    Attributes:
        path: a file, or a folder of DICOM slices.
        series_uid: which series, if the folder holds several.
        any_modality: of DICOM, accept a modality that is not CT.
        affine: which transform, if a NIfTI header's two contradict each other.
    """

    path: Path
    series_uid: str | None = None
    any_modality: bool = False
    affine: Affine | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """A decoded CT.

    Attributes:
        hu: `(z, y, x)`, int16 where the file's values are integers that fit, else float32.
        geometry: where its voxels are.
        summary: of its values, if it was read from a file.
    """

    hu: npt.NDArray[np.int16] | npt.NDArray[np.float32]
    geometry: ScanGeometry
    summary: HuSummary | None = None

    def thinned(self, spacing_mm: float) -> Scan:
        """Every n-th voxel of each axis, as far apart as they can be without exceeding `spacing_mm`; no copy."""
        x, y, z = (slice(None, None, max(1, int(spacing_mm / s))) for s in self.geometry.spacing_mm_xyz)
        return Scan(self.hu[z, y, x], self.geometry.part((x, y, z)))


def read_header(
    path: Path | str, series_uid: str | None = None, any_modality: bool = False, affine: Affine | None = None
) -> ScanGeometry:
    """Geometry of a scan, without its voxels.

    Finds what a header can tell, also NIfTI files that end too early.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        any_modality: of DICOM, accept a modality that is not CT.
        affine: which transform, if a NIfTI header's two contradict each other.

    Raises:
        ScanError: no such file, not an image, empty, cut off, 2D, 4D, colour; no geometry, two that contradict each
            other, a direction that is no rotation, absurd spacing; of DICOM: several series, missing slices, gantry
            tilt; whatever else a library has to say of it.
    """
    source = ScanSource(Path(path), series_uid, any_modality, affine)
    with _rejecting(source):
        if _is_dicom(source):
            return read_dicom_header(source.path, series_uid, any_modality)
        return read_nifti_header(source.path, affine) if is_nifti(source.path) else read_itk_header(source.path)


def read_scan(
    path: Path | str, series_uid: str | None = None, any_modality: bool = False, affine: Affine | None = None
) -> Scan:
    """Decode a scan.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        any_modality: of DICOM, accept a modality that is not CT.
        affine: which transform, if a NIfTI header's two contradict each other.

    Raises:
        ScanError: as `read_header`, and for damaged data, NaN or Inf, a constant image, values that are not HU.
    """
    source = ScanSource(Path(path), series_uid, any_modality, affine)
    values, geometry = read_volume(source)
    with _rejecting(source):
        hu, summary = as_hu(values, path)
    if summary.num_clipped:
        warnings.warn(f"{path}: {summary.num_clipped} voxels above 32767 HU are read as 32767", stacklevel=2)
    return Scan(hu, geometry, summary)


def read_volume(source: ScanSource, *, layered: bool = False) -> tuple[npt.NDArray[Any], ScanGeometry]:
    """Values of a file or series as they are, `(z, y, x)`, HU or not, and where they lie.

    Args:
        source: what to read.
        layered: accept several values a voxel, as 3D Slicer stores segments that overlap: `(z, y, x, layers)`.

    Raises:
        ScanError: as `read_header`, and for damaged data.
    """
    path = source.path
    with _rejecting(source):
        if _is_dicom(source):
            values, geometry = read_dicom_volume(path, source.series_uid, source.any_modality)
        elif is_nifti(path):
            values, geometry = read_nifti_volume(path, source.affine)
        else:
            values, geometry = read_itk_volume(path, layered=layered)
        if values.shape[:3] != geometry.size_xyz[::-1]:
            raise ScanError(path, f"holds {values.shape[::-1]} voxels, its header says {geometry.size_xyz}")
        return values, geometry


def crop_patch(
    scan: Scan, grid: PatchGrid, padding_hu: int = PADDING_HU, padding: Padding = "constant"
) -> Int16[np.ndarray, "z y x"]:
    """The patch of a scan on a grid, by linear interpolation of the voxels it needs and no others.

    What lies outside the scan is `padding_hu`, up to the very edge of its outermost voxels: between their centres and
    their edges they continue with their own value, so scan and padding are never mixed. Values below `padding_hu`
    (what scanners write outside their field of view) are raised to it before interpolating.

    With `padding="edge"` the outermost voxels continue without an end; a patch that meets none of the scan is
    `padding_hu` all the same.
    """
    x, y, z = scan.geometry.region_of(grid)
    values = scan.hu[z, y, x]
    if values.size == 0:
        return np.full(grid.size_zyx, padding_hu, dtype=np.int16)
    geometry = scan.geometry.part((x, y, z))
    raised = np.maximum(values, values.dtype.type(padding_hu))
    if padding == "edge":
        lacking = scan.geometry.lacking_of(grid)
        raised = np.pad(raised, lacking[::-1], mode="edge")
        first_x, first_y, first_z = geometry.to_lps_mm([-low for low, _ in lacking]).tolist()
        geometry = replace(geometry, origin_lps_mm=(first_x, first_y, first_z))
    image = sitk.GetImageFromArray(raised)
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


def _is_dicom(source: ScanSource) -> bool:
    if source.path.is_dir():
        return True
    if source.path.stat().st_size == 0:
        raise ScanError(source.path, "is empty (0 bytes)")
    return not is_nifti(source.path) and is_dicom(source.path)


@contextmanager
def _rejecting(source: ScanSource) -> Iterator[None]:
    """Whatever a library makes of a broken file rejects this scan alone."""
    name = str(source.path)[:200]
    try:
        yield
    except ScanError:
        raise
    except MemoryError as error:
        raise ScanError(name, "needs more memory than there is", "read it on a larger machine") from error
    except OSError as error:
        raise ScanError(name, f"cannot be opened: {error.strerror or error}") from error
    except Exception as error:
        raise ScanError(name, f"cannot be read ({type(error).__name__}: {shortened(error)})") from error
