"""A CT from DICOM: a folder of slices, or one file of many frames (enhanced CT).

The tags alone say where slices lie and what their values mean, and every slice must lie on one regular grid.
SimpleITK only decompresses: it inverts MONOCHROME1, takes one rescale for all frames, and knows frames in the file's
order only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from fmcib_ssl.data.dicom_files import DicomFile, numbers, read_stored_values, series_at, text
from fmcib_ssl.data.geometry import RESAMPLE, FloatArray, ScanGeometry, check_geometry, numbers_text
from fmcib_ssl.data.image_files import rejecting
from fmcib_ssl.types import Array, ScanError

#: A slice may lie this far from the regular grid, mm: rounding in the headers, jitter of the table.
_MAX_OFF_GRID_MM = 0.5
#: Along the normal the limit is this fraction of the slice distance, within these bounds, mm.
_MAX_OFF_DEPTH, _MAX_OFF_DEPTH_MM = 0.1, (0.1, _MAX_OFF_GRID_MM)
#: Rounding in headers: how far orientation vectors may be from unit length and right angles, and how much orientations
#: (radians) and pixel spacings (relative) of two slices may differ. At the corners of a slice this is up to 0.5 mm.
_MAX_COSINE_ERROR = 1e-3
#: RescaleTypes other than HU: optical and electron density, concentrations, atomic numbers.
_NOT_HU = ("OD", "ED", "EDW", "MGML", "Z_EFF", "PCT")
#: Functional groups of an enhanced CT: position, orientation, pixel spacing and rescale of a frame.
_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelMeasuresSequence", "PixelValueTransformationSequence"),
)


class _Slice(NamedTuple):
    """One frame of a file, as its header describes it."""

    file: Path
    frame: int
    size: tuple[int, int]  # columns, rows
    spacing_mm: FloatArray  # along a row, along a column
    position_lps_mm: FloatArray
    axes: FloatArray  # columns: direction of a row, of a column, their normal
    rescale: tuple[float, float] | None  # slope and intercept

    @property
    def name(self) -> str:
        return self.file.name + (f" frame {self.frame + 1}" if self.frame else "")


def open_dicom(path: Path, series_uid: str | None, any_modality: bool) -> tuple[ScanGeometry, Callable[[], Array]]:
    """Geometry of a series, from the headers of its slices, and a function that reads its HU `(z, y, x)`.

    Raises:
        ScanError: as `read_header`; when the values are read, voxels that cannot be decoded.
    """
    slices = [one for file in series_at(path, series_uid, any_modality) for one in _slices_of(file, any_modality)]
    if len(slices) < 2:
        kind = "holds one DICOM slice" if path.is_dir() else "is one DICOM slice"
        raise ScanError(path, f"{kind}; a volume needs at least two", "name the folder of the whole series")
    slices, geometry = _stacked(path, slices)
    return geometry, lambda: _read_values(path, slices, geometry)


def _read_values(path: Path, slices: list[_Slice], geometry: ScanGeometry) -> Array:
    hu: Array = np.empty(geometry.size_xyz[::-1], dtype=np.int16)
    by_file: dict[Path, list[int]] = {}  # a file, and the indices of its frames in the stack
    for k, one in enumerate(slices):
        by_file.setdefault(one.file, []).append(k)
    with tempfile.TemporaryDirectory() as scratch:
        for file, indices in by_file.items():
            with rejecting(file):
                frames = read_stored_values(file, [slices[k].frame for k in indices], Path(scratch))
                for k, stored in zip(indices, frames, strict=True):
                    values = _rescaled(stored, *(slices[k].rescale or (1.0, 0.0)))
                    hu = hu.astype(np.promote_types(hu.dtype, values.dtype), copy=False)
                    hu[k] = values
    if slices[0].rescale is None and hu.min() >= 0:
        reason = f"has no RescaleSlope and RescaleIntercept, and stored values from {hu.min()} to {hu.max()} are not HU"
        raise ScanError(path, reason, "export it with the rescale tags that it was made with, or leave it out")
    return hu


def _rescaled(stored: Array, slope: float, intercept: float) -> Array:
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
        # Per-frame groups override shared ones; a single-slice file has neither, only top-level tags.
        plane, orientation, measures, values = (
            next((level[group].value[0] for level in (own, shared) if level.get(group)), header) for group in _GROUPS
        )
        name = f"frame {frame + 1} " if num_frames > 1 else ""
        position = numbers(plane, "ImagePositionPatient", 3, path)
        vectors = numbers(orientation, "ImageOrientationPatient", 6, path)
        spacing = numbers(measures, "PixelSpacing", 2, path)
        if position is None or vectors is None or spacing is None:
            stated = {"ImagePositionPatient": position, "ImageOrientationPatient": vectors, "PixelSpacing": spacing}
            missing = next(keyword for keyword, value in stated.items() if value is None)
            raise ScanError(path, f"{name}has no {missing}: where its voxels lie in the patient is not known")
        if not (spacing > 0).all():
            reason = f"{name}has the PixelSpacing {text(measures, 'PixelSpacing')!r}"
            raise ScanError(path, f"{reason}: both must be above 0 mm")
        axes = _axes(vectors.reshape(2, 3), path, name)
        # DICOM states the distance between rows first.
        yield _Slice(path, frame, size, spacing[::-1], position, axes, _rescale(values, path, any_modality))


def _axes(vectors: FloatArray, path: Path, name: str) -> FloatArray:
    """Unit vectors, as columns, along a row, along a column and along their normal."""
    row, column = vectors
    lengths = np.linalg.norm(vectors, axis=1)
    if abs(row @ column) > _MAX_COSINE_ERROR or (np.abs(lengths - 1) > _MAX_COSINE_ERROR).any():
        angle = np.degrees(np.arccos(np.clip(row @ column / np.prod(lengths), -1, 1)))
        raise ScanError(
            path,
            f"{name}has the ImageOrientationPatient {numbers_text(vectors.ravel())}: sheared, or not of length 1; rows "
            f"and columns are {angle:.2f} degrees apart, {lengths[0]:.4f} and {lengths[1]:.4f} long",
        )
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


def _stacked(path: Path, slices: list[_Slice]) -> tuple[list[_Slice], ScanGeometry]:
    """Slices sorted along their normal, and the regular grid that they all lie on.

    Raises:
        ScanError: missing, duplicate or unequally spaced slices, gantry tilt, slices that differ in size, spacing,
            orientation or in having a rescale.
    """
    for one in slices:
        _check_alike(path, one, slices[0])
    slices = sorted(slices, key=lambda one: float(one.position_lps_mm @ slices[0].axes[:, 2]))
    first, last = slices[0], slices[-1]
    normal = first.axes[:, 2]  # the geometry is taken from this slice, so all others are compared with it
    positions = np.array([one.position_lps_mm for one in slices])
    step = _step_mm(path, slices, positions @ normal)
    off_grid = positions - positions[0] - step * np.arange(len(slices))[:, None] * normal
    off_mm = np.linalg.norm(off_grid, axis=1)
    if off_mm[-1] > _MAX_OFF_GRID_MM:
        angle = np.degrees(np.arctan2(off_mm[-1], step * (len(slices) - 1)))
        reason = f"gantry tilt of {angle:.1f} degrees: the slices drift sideways by {off_mm[-1]:.1f} mm"
        raise ScanError(path, reason, RESAMPLE)
    if off_mm.max() > _MAX_OFF_GRID_MM:
        at = int(off_mm.argmax())
        reason = f"{slices[at].name} lies {off_mm[at]:.2f} mm off the regular grid from {first.name} to {last.name}"
        raise ScanError(path, f"its slices are shifted: {reason}; {_MAX_OFF_GRID_MM} mm are allowed")
    size, spacing = (*first.size, len(slices)), (*first.spacing_mm, step)
    return slices, check_geometry(path, ScanGeometry.of(size, spacing, first.position_lps_mm, first.axes))


def _check_alike(path: Path, one: _Slice, first: _Slice) -> None:
    """Refuse a slice that differs from the first one in size, spacing, orientation or in having a rescale."""
    turned = np.arccos(np.clip((one.axes * first.axes).sum(axis=0).min(), -1, 1))
    differences = {
        "size": one.size != first.size,
        "spacing": not np.allclose(one.spacing_mm, first.spacing_mm, rtol=_MAX_COSINE_ERROR),
        f"orientation (by {np.degrees(turned):.1f} degrees)": turned > _MAX_COSINE_ERROR,
    }
    if differs := " and ".join(name for name, is_so in differences.items() if is_so):
        reason = f"its slices differ in {differs} ({one.name} from {first.name})"
        raise ScanError(path, f"{reason}: is a localizer among them?")
    if (one.rescale is None) != (first.rescale is None):
        without, has = (one, first) if one.rescale is None else (first, one)
        reason = f"{without.name} has no RescaleSlope and RescaleIntercept, {has.name} has"
        raise ScanError(path, f"{reason}: what its values mean is not known")


def _step_mm(path: Path, slices: Sequence[_Slice], depth_mm: FloatArray) -> float:
    """The distance between slices, if they are equally spaced along the normal."""
    steps = np.diff(depth_mm)
    if (steps < 0.01).any():
        at = int(np.argmin(steps))
        reason = f"duplicate slices at {depth_mm[at]:.2f} mm along the slice normal"
        remedy = "keep one of them; of several phases or energies keep one"
        raise ScanError(path, f"{reason}: {slices[at].name} and {slices[at + 1].name}", remedy)
    step = float((depth_mm[-1] - depth_mm[0]) / len(steps))
    off_mm = np.abs(depth_mm - depth_mm[0] - step * np.arange(len(depth_mm)))
    if off_mm.max() > np.clip(_MAX_OFF_DEPTH * step, *_MAX_OFF_DEPTH_MM):
        usual, at = float(np.median(steps)), int(np.argmax(off_mm))
        longest = int(np.argmax(np.abs(steps - usual)))
        raise ScanError(
            path,
            f"slices are missing or not equally spaced: {steps[longest]:.2f} mm from slice {longest + 1} to "
            f"{longest + 2} (at {depth_mm[longest]:.1f} mm), {usual:.2f} mm elsewhere; slice {at + 1} lies "
            f"{off_mm[at]:.2f} mm from its place on a regular grid",
        )
    return step
