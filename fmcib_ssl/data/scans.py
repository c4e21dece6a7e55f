"""Read a CT from disk with its geometry, refuse what is not one, and cut a patch from it for a look.

A decoded scan is a NumPy array and its geometry: no SimpleITK image outlives a call, so scans may be held across `fork`
and pickled, and every filter here runs on one thread. `dicom`, `nifti` and `itk` read the formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from jaxtyping import Int16

from fmcib_ssl.data.dicom import open_dicom
from fmcib_ssl.data.dicom_files import is_dicom
from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.image_files import Affine, is_nifti, open_itk, open_nifti, shortened
from fmcib_ssl.types import PADDING_HU, ScanError

_Hu = npt.NDArray[np.int16] | npt.NDArray[np.float32]

#: A scan in HU holds air or at least fat somewhere; one that stays above this is not in HU.
_HIGHEST_MINIMUM_HU = -50
#: Values of one number below this are what scanners write outside their field of view.
_PADDING_BELOW_HU = -1100
#: Where the peaks of air (with lung) and soft tissue (with fat) are looked for.
_AIR_HU = (-1100, -600)
_SOFT_TISSUE_HU = (-200, 300)
#: Where they are in every CT in order; a peak elsewhere is worth a look.
_USUAL_AIR_HU = (-1050, -650)
_USUAL_SOFT_TISSUE_HU = (-150, 150)
#: A range that holds less than this part of a scan has no peak.
_MIN_PEAK = 0.1
#: Above the range of int16 are a few voxels of metal; a scan with more than this part of them is not in HU.
_MAX_CLIPPED = 0.01
#: Voxels that are looked at.
_NUM_SAMPLES = 2_000_000
_BIN_HU = 10


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


@dataclass(frozen=True)
class HuSummary:
    """The values of a scan.

    Attributes:
        hu_min: lowest.
        hu_max: highest, before clipping.
        air_peak_hu: commonest value of air and lung, to 10 HU; None if they are less than 10 % of the scan.
        soft_tissue_peak_hu: the same of soft tissue and fat.
        padding: part of the scan that is padding below -1100.
        num_clipped: voxels above 32767, which are read as 32767.
    """

    hu_min: float
    hu_max: float
    air_peak_hu: float | None
    soft_tissue_peak_hu: float | None
    padding: float
    num_clipped: int

    def unusual(self) -> str:
        """What is worth a look, or nothing."""
        notes = []
        for name, peak, (low, high) in (
            ("air", self.air_peak_hu, _USUAL_AIR_HU),
            ("soft tissue", self.soft_tissue_peak_hu, _USUAL_SOFT_TISSUE_HU),
        ):
            if peak is not None and not low <= peak <= high:
                notes.append(f"{name} at {peak:g} HU, usual is {low} to {high}")
        if self.air_peak_hu is None and self.soft_tissue_peak_hu is None:
            notes.append("neither air nor soft tissue")
        if self.num_clipped:
            notes.append(f"{self.num_clipped} voxels above 32767 HU are read as 32767")
        return "; ".join(notes)


@dataclass(frozen=True, eq=False)
class Scan:
    """A decoded CT.

    Attributes:
        hu: `(z, y, x)`, int16 where the file's values are integers that fit, else float32.
        geometry: where its voxels are.
        summary: of its values, if it was read from a file.
    """

    hu: _Hu
    geometry: ScanGeometry
    summary: HuSummary | None = None

    def as_itk(self, lowest_hu: int) -> sitk.Image:
        """The scan as an image of SimpleITK, values below `lowest_hu` raised to it."""
        image = sitk.GetImageFromArray(np.maximum(self.hu, self.hu.dtype.type(lowest_hu)))
        image.SetSpacing(self.geometry.spacing_mm_xyz)
        image.SetOrigin(self.geometry.origin_lps_mm)
        image.SetDirection(np.ravel(self.geometry.direction).tolist())
        return image


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
        return _open(source)[0]


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
        hu, summary = _as_hu(values, path)
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
    with _rejecting(source):
        geometry, read_values = _open(source, layered=layered)
        values = read_values()
        if values.shape[:3] != geometry.size_xyz[::-1]:
            raise ScanError(source.path, f"holds {values.shape[::-1]} voxels, its header says {geometry.size_xyz}")
        return values, geometry


def crop_patch(scan: Scan, grid: PatchGrid, padding_hu: int = PADDING_HU) -> Int16[np.ndarray, "z y x"]:
    """The patch of a scan on a grid, by linear interpolation.

    What lies outside the scan is `padding_hu`, up to the very edge of its outermost voxels: between their centres and
    their edges they continue with their own value, so scan and padding are never mixed. Values below `padding_hu`
    (what scanners write outside their field of view) are raised to it before interpolating.
    """
    resample = sitk.ResampleImageFilter()
    resample.SetNumberOfThreads(1)
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetDefaultPixelValue(padding_hu)
    resample.SetOutputPixelType(sitk.sitkFloat32)  # into int16 ITK truncates; we round
    resample.SetSize(grid.size_xyz)
    resample.SetOutputSpacing([grid.spacing_mm] * 3)
    resample.SetOutputOrigin(grid.origin_lps_mm)
    patch = sitk.GetArrayFromImage(resample.Execute(scan.as_itk(padding_hu)))
    limits = np.iinfo(np.int16)
    hu: npt.NDArray[np.int16] = np.clip(np.rint(patch), limits.min, limits.max).astype(np.int16)
    return hu


def _open(source: ScanSource, *, layered: bool = False) -> tuple[ScanGeometry, Callable[[], npt.NDArray[Any]]]:
    """Geometry of a scan, and what reads its values: each format's own."""
    path = source.path
    if not path.is_dir() and path.stat().st_size == 0:
        raise ScanError(path, "is empty (0 bytes)")
    if not path.is_dir() and is_nifti(path):
        return open_nifti(path, source.affine)
    if path.is_dir() or is_dicom(path):
        return open_dicom(path, source.series_uid, source.any_modality)
    return open_itk(path, layered=layered)


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


def _as_hu(values: npt.NDArray[Any], path: Path | str) -> tuple[_Hu, HuSummary]:
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
    # An odd step, so that no axis is sampled in its rhythm.
    sample = values.reshape(-1)[:: max(1, values.size // _NUM_SAMPLES) | 1].astype(np.float32)
    tissue = _without_padding(sample)
    problem = _problem(tissue, float(lowest), float(highest))
    if num_clipped > _MAX_CLIPPED * values.size:
        problem = f"{num_clipped / values.size:.0%} of it lies above {limits.max}"
    if problem:
        reason = f"has values from {lowest:g} to {highest:g}, which is not CT in HU (air -1000, fat -100, water 0)"
        raise ScanError(path, f"{reason}: {problem}")
    peaks, padding = (_peak(tissue, _AIR_HU), _peak(tissue, _SOFT_TISSUE_HU)), 1 - tissue.size / sample.size
    summary = HuSummary(float(lowest), float(highest), *peaks, padding, num_clipped)
    if num_clipped or lowest < limits.min:
        values = np.clip(values, limits.min, limits.max)
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int16, copy=False), summary
    return values.astype(np.float32, copy=False), summary


def _without_padding(sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A sample of voxels without those of a number far below air that many of them share."""
    below = sample[sample < _PADDING_BELOW_HU]
    if not below.size:
        return sample
    numbers, counts = np.unique(below, return_counts=True)
    return sample[~np.isin(sample, numbers[counts >= max(0.2 * below.size, 1e-3 * sample.size)])]


def _problem(tissue: npt.NDArray[np.float32], lowest: float, highest: float) -> str | None:
    """Why values cannot be HU, and what they may be; None if they can."""

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
    # Bone goes on above and below; air that is inverted, or soft tissue without its intercept, does not.
    dense = part(700, 1150)
    if dense > 0.05 and part(*_AIR_HU) < 0.02 and part(200, 700) < dense / 2 and part(1150, inf) < dense / 4:
        return f"{dense:.0%} of it is as dense as bone and none is air; is it inverted, or without its intercept?"
    if part(-inf, _HIGHEST_MINIMUM_HU) < 0.002 and part(300, inf) > 0.1:
        denser = f"{part(300, inf):.0%} is denser than soft tissue"
        return f"nothing in it is air or fat, and {denser}; apply the rescale slope and intercept, or is it no CT?"
    return None


def _peak(tissue: npt.NDArray[np.float32], within: tuple[int, int]) -> float | None:
    """The commonest value within a range, to 10 HU."""
    counts, edges = np.histogram(tissue, np.arange(within[0], within[1] + 1, _BIN_HU))
    if counts.sum() < _MIN_PEAK * tissue.size:
        return None
    smooth = np.convolve(counts, np.ones(5), mode="same")
    return float(edges[int(smooth.argmax())] + _BIN_HU / 2)
