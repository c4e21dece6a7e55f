"""Read a CT from disk with its geometry, refuse what is not a CT, and crop a patch from it.

A decoded scan is a NumPy array and its geometry: no SimpleITK image outlives a call, so scans survive `fork` and can be
pickled, and every filter here runs on one thread. `dicom` and `image_files` read the formats.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.dicom import open_dicom
from fmcib_ssl.data.dicom_files import is_dicom
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.image_files import Affine, is_nifti, open_itk, open_nifti, rejecting
from fmcib_ssl.types import PADDING_HU, Array, ScanError

#: A scan in HU contains air or at least fat; one that is above this everywhere is not in HU.
_HIGHEST_MINIMUM_HU = -50
#: A value below this that many voxels share is what scanners write outside their field of view.
_PADDING_BELOW_HU = -1100
#: Air with lung, soft tissue with fat.
_AIR_HU = (-1100, -600)
_SOFT_TISSUE_HU = (-200, 300)
#: A few voxels of metal may be above the range of int16; a scan with more than this fraction is not in HU.
_MAX_CLIPPED = 0.01
#: Voxels that are sampled.
_NUM_SAMPLES = 2_000_000
#: Headers whose voxels may stand in another file: what names it.
_DETACHED = {
    ".mhd": re.compile(rb"^ElementDataFile *= *(.+?)\s*$", re.MULTILINE),
    ".nhdr": re.compile(rb"^data ?file: *(.+?)\s*$", re.MULTILINE | re.IGNORECASE),
}


class ScanSource(NamedTuple):
    """A scan to be read.

    Attributes:
        path: a file, or a folder of DICOM slices.
        series_uid: which series, if the folder holds several.
        any_modality: accept DICOM modalities other than CT.
        affine: which transform to use if a NIfTI header's two contradict each other.
    """

    path: Path
    series_uid: str | None = None
    any_modality: bool = False
    affine: Affine | None = None


class HuSummary(NamedTuple):
    """Lowest and highest value of a scan before clipping, and how many voxels above 32767 are read as 32767."""

    hu_min: float
    hu_max: float
    num_clipped: int


@dataclass(frozen=True, eq=False)
class Scan:
    """A decoded CT.

    Attributes:
        hu: `(z, y, x)`, int16 where the file's values are integers that fit, else float32.
        geometry: where its voxels are.
        summary: of its values, if it was read from a file.
    """

    hu: Array
    geometry: ScanGeometry
    summary: HuSummary | None = None

    def as_itk(self, lowest_hu: int) -> sitk.Image:
        """The scan as a SimpleITK image, with values below `lowest_hu` raised to it."""
        image = sitk.GetImageFromArray(np.maximum(self.hu, self.hu.dtype.type(lowest_hu)))
        image.SetSpacing(self.geometry.spacing_mm_xyz)
        image.SetOrigin(self.geometry.origin_lps_mm)
        image.SetDirection(np.ravel(self.geometry.direction).tolist())
        return image


def files_at(path: Path) -> list[Path]:
    """All files of a folder, or a file with what belongs to it."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    files = [path]
    if pattern := _DETACHED.get(path.suffix.lower()):
        with path.open("rb") as file:
            named = pattern.search(file.read(1 << 16))
        if named and (voxels := path.parent / named[1].decode("utf-8", "replace")).is_file():
            files.append(voxels)
    return files


def source_listing(path: Path) -> str:
    """Digest of the names, sizes and modification times of a scan's files, in a folder of everything in it.

    Cheap: no file is opened. It may change without the scan; then the files' SHA-256 tells.

    Raises:
        OSError: there is no such file.
    """
    lines = [f"{file.name} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files_at(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_header(
    path: Path | str, series_uid: str | None = None, any_modality: bool = False, affine: Affine | None = None
) -> ScanGeometry:
    """Geometry of a scan, without its voxels.

    Truncated NIfTI files are found too.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        any_modality: accept DICOM modalities other than CT.
        affine: which transform to use if a NIfTI header's two contradict each other.

    Raises:
        ScanError: no such file, not an image, empty, cut off, 2D, 4D, colour; no geometry, two that contradict each
            other, a direction that is not a rotation, absurd spacing; of DICOM: several series, missing slices, gantry
            tilt; any error of a library.
    """
    source = ScanSource(Path(path), series_uid, any_modality, affine)
    with rejecting(source.path):
        return _open(source)[0]


def read_scan(
    path: Path | str, series_uid: str | None = None, any_modality: bool = False, affine: Affine | None = None
) -> Scan:
    """Decode a scan.

    Args:
        path: a file, or a folder with the slices of a DICOM series.
        series_uid: which series, if the folder holds several.
        any_modality: accept DICOM modalities other than CT.
        affine: which transform to use if a NIfTI header's two contradict each other.

    Raises:
        ScanError: as `read_header`, and for damaged data, NaN or Inf, a constant image, values that are not HU.
    """
    source = ScanSource(Path(path), series_uid, any_modality, affine)
    values, geometry = read_volume(source)
    with rejecting(source.path):
        hu, summary = _as_hu(values, path)
    if summary.num_clipped:
        warnings.warn(f"{path}: {summary.num_clipped} voxels above 32767 HU are read as 32767", stacklevel=2)
    return Scan(hu, geometry, summary)


def read_volume(source: ScanSource) -> tuple[Array, ScanGeometry]:
    """Values of a file or series, `(z, y, x)`, HU or not, and their geometry.

    Raises:
        ScanError: as `read_header`, and for damaged data.
    """
    with rejecting(source.path):
        geometry, read_values = _open(source)
        values = read_values()
        if values.shape != geometry.size_xyz[::-1]:
            raise ScanError(source.path, f"holds {values.shape[::-1]} voxels, its header says {geometry.size_xyz}")
        return values, geometry


def crop_patch(
    scan: Scan,
    center_lps_mm: Sequence[float],
    size_zyx: tuple[int, int, int],
    spacing_mm: float = 1.0,
    padding_hu: int = PADDING_HU,
) -> Int16[np.ndarray, "z y x"]:
    """The patch of a scan round a point, by linear interpolation: cubic voxels along +x, +y, +z of LPS.

    Voxel `size // 2` of each axis has its centre exactly at the point.

    What lies outside the scan is `padding_hu`, up to the very edge of its outermost voxels: between their centres and
    their edges they continue with their own value, so scan and padding are never mixed. Values below `padding_hu`
    (what scanners write outside their field of view) are raised to it before interpolating.
    """
    resample = sitk.ResampleImageFilter()
    resample.SetNumberOfThreads(1)
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetDefaultPixelValue(padding_hu)
    resample.SetOutputPixelType(sitk.sitkFloat32)  # into int16 ITK truncates; we round
    resample.SetSize(size_zyx[::-1])
    resample.SetOutputSpacing([spacing_mm] * 3)
    resample.SetOutputOrigin([c - n // 2 * spacing_mm for c, n in zip(center_lps_mm, size_zyx[::-1], strict=True)])
    patch = sitk.GetArrayFromImage(resample.Execute(scan.as_itk(padding_hu)))
    limits = np.iinfo(np.int16)
    hu: npt.NDArray[np.int16] = np.clip(np.rint(patch), limits.min, limits.max).astype(np.int16)
    return hu


def _open(source: ScanSource) -> tuple[ScanGeometry, Callable[[], Array]]:
    """Geometry of a scan, and a function that reads its values, by format."""
    path = source.path
    if not path.is_dir() and path.stat().st_size == 0:
        raise ScanError(path, "is empty (0 bytes)")
    if path.is_dir() or is_dicom(path):
        return open_dicom(path, source.series_uid, source.any_modality)
    return open_nifti(path, source.affine) if is_nifti(path) else open_itk(path)


def _as_hu(values: Array, path: Path | str) -> tuple[Array, HuSummary]:
    """The values of a file as int16 or float32 within the range of int16, if they can be HU, and a summary of them.

    Raises:
        ScanError: NaN or Inf, a constant image, or values that are not HU.
    """
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ScanError(path, f"holds {np.count_nonzero(~np.isfinite(values))} voxels that are NaN or Inf")
    if lowest == highest:
        raise ScanError(path, f"is constant: every voxel is {lowest}")
    limits = np.iinfo(np.int16)
    num_clipped = int(np.count_nonzero(values > limits.max)) if highest > limits.max else 0
    # An odd step, so that sampling does not align with an axis.
    sample = values.reshape(-1)[:: max(1, values.size // _NUM_SAMPLES) | 1].astype(np.float32)
    tissue = _without_padding(sample)
    problem = _problem(tissue, float(lowest), float(highest))
    if num_clipped > _MAX_CLIPPED * values.size:
        problem = f"{num_clipped / values.size:.0%} of it lies above {limits.max}"
    if problem:
        reason = f"has values from {lowest:g} to {highest:g}, which is not CT in HU (air -1000, fat -100, water 0)"
        raise ScanError(path, f"{reason}: {problem}")
    if num_clipped or lowest < limits.min:
        values = np.clip(values, limits.min, limits.max)
    dtype = np.int16 if np.issubdtype(values.dtype, np.integer) else np.float32
    return values.astype(dtype, copy=False), HuSummary(float(lowest), float(highest), num_clipped)


def _without_padding(sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A sample of voxels without padding: values far below air that many voxels share."""
    below = sample[sample < _PADDING_BELOW_HU]
    if not below.size:
        return sample
    numbers, counts = np.unique(below, return_counts=True)
    return sample[~np.isin(sample, numbers[counts >= max(0.2 * below.size, 1e-3 * sample.size)])]


def _problem(tissue: npt.NDArray[np.float32], lowest: float, highest: float) -> str | None:
    """Why values cannot be HU, and what they may be; None if they can be HU."""

    def part(low: float, high: float) -> float:
        return float(np.count_nonzero((tissue >= low) & (tissue < high)) / tissue.size)

    if lowest > _HIGHEST_MINIMUM_HU or highest < lowest + 100 or not tissue.size:
        return "its rescale slope and intercept were not applied, or are not right"
    inf = float("inf")
    far_below, below = part(-inf, -1500), part(-inf, _PADDING_BELOW_HU)
    if far_below > 0.05 or (below > 0.05 and part(*_SOFT_TISSUE_HU) < 0.01):
        return f"{below:.0%} of it lies below air; is the intercept applied twice, or the unit a tenth of a HU?"
    if part(-600, inf) < 0.002 and np.median(tissue) < -920:
        return "nothing in it is denser than lung; is the intercept applied twice?"
    # Bone also has lower and higher values; inverted air, or soft tissue without its intercept, does not.
    dense = part(700, 1150)
    if dense > 0.05 and part(*_AIR_HU) < 0.02 and part(200, 700) < dense / 2 and part(1150, inf) < dense / 4:
        return f"{dense:.0%} of it is as dense as bone and none is air; is it inverted, or without its intercept?"
    if part(-inf, _HIGHEST_MINIMUM_HU) < 0.002 and part(300, inf) > 0.1:
        denser = f"{part(300, inf):.0%} is denser than soft tissue"
        return f"nothing in it is air or fat, and {denser}; apply the rescale slope and intercept, or is it no CT?"
    return None
