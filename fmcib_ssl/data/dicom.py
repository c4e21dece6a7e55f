"""A CT from DICOM: a folder of slices, or one file of many frames (enhanced CT).

The tags alone say where slices lie and what their values mean, and every slice must lie on one regular grid.
SimpleITK only decompresses: it inverts MONOCHROME1, takes one rescale for all frames, and knows frames in the file's
order only. Where it reads a slice's place, it must agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from pydicom.dataset import Dataset

from fmcib_ssl.data.dicom_files import DicomFile, numbers, read_stored_values, series_at, text
from fmcib_ssl.data.geometry import MAX_CONFLICT_MM, FloatArray, ScanGeometry, check_geometry
from fmcib_ssl.types import ScanError

#: A corner of a slice may lie this far from the regular grid, mm: rounding in the headers, jitter of the table.
_MAX_OFF_GRID_MM = 0.5
#: Along the normal it is this part of the distance between slices, but within these limits, mm.
_MAX_OFF_DEPTH, _MAX_OFF_DEPTH_MM = 0.1, (0.1, _MAX_OFF_GRID_MM)
#: How far lengths and scalar product of the orientation's vectors may be from 1 and 0: cosines are rounded.
_MAX_COSINE_ERROR = 1e-3
#: RescaleTypes that name something else than HU: optical and electron density, concentrations, atomic numbers.
_NOT_HU = ("OD", "ED", "EDW", "MGML", "Z_EFF", "PCT")
#: Of an enhanced CT: what says where a frame lies, how it is turned, how large its voxels are, what their values mean.
_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelMeasuresSequence", "PixelValueTransformationSequence"),
)


class _Slice(NamedTuple):
    """A frame of a file, by its header."""

    file: DicomFile
    frame: int
    size: tuple[int, int]  # columns, rows
    spacing_mm: FloatArray  # along a row, along a column
    position_lps_mm: FloatArray
    axes: FloatArray  # columns: direction of a row, of a column, their normal
    rescale: tuple[float, float] | None  # slope and intercept

    @property
    def name(self) -> str:
        return self.file.path.name + (f" frame {self.frame + 1}" if self.frame else "")

    def corners(self) -> FloatArray:
        """Centres of its corner voxels, `(4, 3)`, LPS mm."""
        return _corners(self.position_lps_mm, self.axes, self.spacing_mm, self.size)


def open_dicom(
    path: Path, series_uid: str | None, any_modality: bool
) -> tuple[ScanGeometry, Callable[[], npt.NDArray[Any]]]:
    """Geometry of a series, from the headers of its slices, and what reads its HU `(z, y, x)`, whole where they are.

    Raises:
        ScanError: as `read_header` has it for DICOM; when its values are read, voxels that cannot be decoded.
    """
    slices = [one for file in series_at(path, series_uid, any_modality) for one in _slices_of(file, any_modality)]
    if len(slices) < 2:
        kind = "holds one DICOM slice" if path.is_dir() else "is one DICOM slice"
        raise ScanError(path, f"{kind}; a volume needs at least two", "name the folder of the whole series")
    slices, geometry = _stacked(path, slices)
    return geometry, lambda: _read_values(path, slices, geometry)


def _read_values(path: Path, slices: list[_Slice], geometry: ScanGeometry) -> npt.NDArray[Any]:
    hu: npt.NDArray[Any] = np.empty(geometry.size_xyz[::-1], dtype=np.int16)
    by_file: dict[Path, list[int]] = {}  # where its frames lie in the stack
    for k, one in enumerate(slices):
        by_file.setdefault(one.file.path, []).append(k)
    with tempfile.TemporaryDirectory() as scratch:
        for own in by_file.values():
            file, frames = slices[own[0]].file, [slices[k].frame for k in own]
            try:
                for k, stored in zip(own, read_stored_values(file, frames, Path(scratch)), strict=True):
                    values = _rescaled(stored, *(slices[k].rescale or (1.0, 0.0)))
                    hu = hu.astype(np.promote_types(hu.dtype, values.dtype), copy=False)
                    hu[k] = values
            except (ScanError, MemoryError):
                raise
            except Exception as error:  # what pydicom and NumPy make of a damaged file
                raise ScanError(file.path, f"cannot be decoded: {type(error).__name__}: {error}") from error
    if slices[0].rescale is None and hu.min() >= 0:
        reason = f"has no RescaleSlope and RescaleIntercept, and stored values from {hu.min()} to {hu.max()} are not HU"
        raise ScanError(path, reason, "export it with the rescale tags that it was made with, or leave it out")
    return hu


def _rescaled(stored: npt.NDArray[Any], slope: float, intercept: float) -> npt.NDArray[Any]:
    """Stored values in HU: int16 where they are whole numbers that fit, else float32."""
    if slope.is_integer() and intercept.is_integer():
        values, limits = stored.astype(np.int64) * int(slope) + int(intercept), np.iinfo(np.int16)
        if limits.min <= values.min() and values.max() <= limits.max:
            return values.astype(np.int16)
    return (stored * np.float64(slope) + intercept).astype(np.float32)


def _slices_of(file: DicomFile, any_modality: bool) -> Iterator[_Slice]:
    """The slice of a file, or its frames."""
    path, header = file.path, file.header
    kind = text(header, "PhotometricInterpretation")
    if int(header.get("SamplesPerPixel", 1)) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ScanError(path, f"is a colour image ({kind or 'of no PhotometricInterpretation'}), not a CT slice")
    size = (int(header.Columns), int(header.Rows))
    if min(size) < 2:
        raise ScanError(path, f"has {size[0]} x {size[1]} pixels, not a CT slice")
    num_frames = int(text(header, "NumberOfFrames") or 1)
    groups = header.get("PerFrameFunctionalGroupsSequence") or [Dataset()]
    if len(groups) != num_frames:
        reason = f"has {num_frames} frames, and no PerFrameFunctionalGroupsSequence of so many"
        remedy = "export the series as single slices, or as enhanced CT"
        raise ScanError(path, f"{reason}: where they lie is not known", remedy)
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for frame, own in enumerate(groups):
        # What holds for a frame, or else for all; a plain slice has no such groups but the file itself.
        plane, orientation, measures, values = (
            next((level[group].value[0] for level in (own, shared) if level.get(group)), header) for group in _GROUPS
        )
        where = f"frame {frame + 1} " if num_frames > 1 else ""
        unknown = f"{where}has no ImagePositionPatient: where the slice lies is not known"
        position = _required(plane, "ImagePositionPatient", 3, path, unknown)
        spacing = _spacing_mm(measures, path, where)
        axes = _axes(orientation, path, where)
        one = _Slice(file, frame, size, spacing, position, axes, _rescale(values, path, any_modality))
        if num_frames == 1 and "PerFrameFunctionalGroupsSequence" not in header:
            _compare_with_itk(one)
        yield one


def _required(tags: Dataset, keyword: str, count: int, path: Path, unknown: str) -> FloatArray:
    if (values := numbers(tags, keyword, count, path)) is None:
        raise ScanError(path, unknown)
    return values


def _spacing_mm(tags: Dataset, path: Path, where: str) -> FloatArray:
    at_detector = " (ImagerPixelSpacing is that at the detector)" if "ImagerPixelSpacing" in tags else ""
    unknown = f"{where}has no PixelSpacing{at_detector}: how large its voxels are is not known"
    spacing = _required(tags, "PixelSpacing", 2, path, unknown)
    if not (spacing > 0).all():
        raise ScanError(path, f"{where}has the PixelSpacing {text(tags, 'PixelSpacing')!r}: both must be above 0 mm")
    return spacing[::-1]  # DICOM names the distance between rows first


def _axes(tags: Dataset, path: Path, where: str) -> FloatArray:
    keyword = "ImageOrientationPatient"
    unknown = f"{where}has no {keyword}: how the slice lies in the patient is not known"
    row, column = _required(tags, keyword, 6, path, unknown).reshape(2, 3)
    lengths = np.linalg.norm([row, column], axis=1)
    if abs(row @ column) > _MAX_COSINE_ERROR or (np.abs(lengths - 1) > _MAX_COSINE_ERROR).any():
        angle = np.degrees(np.arccos(np.clip(row @ column / np.prod(lengths), -1, 1)))
        reason = f"{where}has the {keyword} {text(tags, keyword)}: sheared, or not of length 1; rows and columns are"
        raise ScanError(path, f"{reason} {angle:.2f} degrees apart, {lengths[0]:.4f} and {lengths[1]:.4f} long")
    normal = np.cross(row, column)
    return np.stack([row / lengths[0], column / lengths[1], normal / np.linalg.norm(normal)], axis=1)


def _rescale(tags: Dataset, path: Path, any_modality: bool) -> tuple[float, float] | None:
    slope, intercept = (numbers(tags, keyword, 1, path) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if (kind := text(tags, "RescaleType")) in _NOT_HU and not any_modality:
        raise ScanError(path, f"has values of the RescaleType {kind}, not HU")
    if slope is not None and slope[0] == 0:
        raise ScanError(path, "has a RescaleSlope of 0")
    if slope is None and intercept is None:
        return None
    return (1.0 if slope is None else float(slope[0])), (0.0 if intercept is None else float(intercept[0]))


def _compare_with_itk(one: _Slice) -> None:
    """Refuse a slice that SimpleITK places elsewhere than its tags do, unless it cannot read them at all."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(one.file.path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return
    axes = np.reshape(reader.GetDirection(), (3, 3))
    by_itk = _corners(np.array(reader.GetOrigin()), axes, np.array(reader.GetSpacing()[:2]), reader.GetSize()[:2])
    apart_mm = np.linalg.norm(by_itk - one.corners(), axis=1)
    if (farthest_mm := apart_mm.max()) > MAX_CONFLICT_MM:
        at = int(apart_mm.argmax())
        places = [f"({', '.join(f'{v:.1f}' for v in corners[at])})" for corners in (one.corners(), by_itk)]
        reason = f"has a corner at {places[0]} LPS mm by its tags, but at {places[1]} by SimpleITK"
        raise ScanError(one.file.path, f"{reason}, {farthest_mm:.1f} mm apart: its header contradicts itself")


def _corners(origin: FloatArray, axes: FloatArray, spacing_mm: FloatArray, size: Sequence[int]) -> FloatArray:
    ends = [(i * (size[0] - 1), j * (size[1] - 1)) for j in (0, 1) for i in (0, 1)]
    corners: FloatArray = origin + (np.array(ends) * spacing_mm) @ axes[:, :2].T
    return corners


def _stacked(path: Path, slices: list[_Slice]) -> tuple[list[_Slice], ScanGeometry]:
    """Slices in the order of their normal, and the regular grid that they all lie on.

    Raises:
        ScanError: missing, duplicate or unequally spaced slices, gantry tilt, slices that differ in size, spacing,
            orientation or in having a rescale.
    """
    for one in slices:
        _check_alike(path, one, slices[0])
    slices = sorted(slices, key=lambda one: float(one.position_lps_mm @ slices[0].axes[:, 2]))
    first, last = slices[0], slices[-1]
    normal = first.axes[:, 2]  # from here on all is measured by the slice that the geometry is taken from
    depth = np.array([one.position_lps_mm @ normal for one in slices])
    step = _step_mm(path, slices, depth)
    off_grid = np.array([one.corners() - first.corners() for one in slices])  # (slices, 4 corners, 3)
    off_grid -= step * np.arange(len(slices))[:, None, None] * normal
    drift_mm = np.linalg.norm(off_grid[-1].mean(axis=0))
    if drift_mm > _MAX_OFF_GRID_MM:
        angle = np.degrees(np.arctan2(drift_mm, depth[-1] - depth[0]))
        reason = f"gantry tilt of {angle:.1f} degrees: the slices drift sideways by {drift_mm:.1f} mm"
        raise ScanError(path, reason, "resample the series to a rectangular volume first")
    off_mm = np.linalg.norm(off_grid, axis=2).max(axis=1)
    if off_mm.max() > _MAX_OFF_GRID_MM:
        at = int(off_mm.argmax())
        raise ScanError(
            path,
            f"its slices are shifted or not parallel: a corner of {slices[at].name} lies {off_mm[at]:.2f} mm off the "
            f"regular grid from {first.name} to {last.name}; {_MAX_OFF_GRID_MM} mm are allowed",
        )
    size, spacing = (*first.size, len(slices)), (*first.spacing_mm, step)
    return slices, check_geometry(path, ScanGeometry.of(size, spacing, first.position_lps_mm, first.axes))


def _check_alike(path: Path, one: _Slice, first: _Slice) -> None:
    """Refuse a slice that is no part of the stack that another belongs to."""
    turned = np.degrees(np.arccos(np.clip((one.axes * first.axes).sum(axis=0).min(), -1, 1)))
    differences = {
        "size": one.size != first.size,
        "spacing": not np.allclose(one.spacing_mm, first.spacing_mm, rtol=0.01),
        f"orientation (by {turned:.1f} degrees)": turned > 1,
    }
    if differs := " and ".join(name for name, is_so in differences.items() if is_so):
        reason = f"its slices differ in {differs} ({one.name} from {first.name})"
        raise ScanError(path, f"{reason}: is a localizer among them?")
    if (one.rescale is None) != (first.rescale is None):
        without, has = (one, first) if one.rescale is None else (first, one)
        reason = f"{without.name} has no RescaleSlope and RescaleIntercept, {has.name} has"
        raise ScanError(path, f"{reason}: what its values mean is not known")


def _step_mm(path: Path, slices: Sequence[_Slice], depth: FloatArray) -> float:
    """Distance between slices that stand, by their depth along the normal, at equal distances."""
    steps = np.diff(depth)
    if (steps < 0.01).any():
        at = int(np.argmin(steps))
        reason = f"has two slices at one place ({depth[at]:.2f} mm along the slice normal)"
        remedy = "keep one of them; of several phases or energies keep one"
        raise ScanError(path, f"{reason}: {slices[at].name} and {slices[at + 1].name}", remedy)
    step = float((depth[-1] - depth[0]) / len(steps))
    off_mm = np.abs(depth - depth[0] - step * np.arange(len(depth)))
    if off_mm.max() > np.clip(_MAX_OFF_DEPTH * step, *_MAX_OFF_DEPTH_MM):
        usual, at = float(np.median(steps)), int(np.argmax(off_mm))
        longest = int(np.argmax(np.abs(steps - usual)))
        raise ScanError(
            path,
            f"slices are missing or not equally spaced: {steps[longest]:.2f} mm from slice {longest + 1} to "
            f"{longest + 2} (at {depth[longest]:.1f} mm), {usual:.2f} mm elsewhere; slice {at + 1} lies "
            f"{off_mm[at]:.2f} mm from its place on a regular grid",
        )
    return step
