"""A CT from a folder of DICOM slices: which files, in which order, and where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.scan_checks import checked_geometry, decoded, shortened
from fmcib_ssl.data.tables import ScanError

#: Slices of one series may drift sideways by this much, mm, over the whole stack: rounding in the headers.
MAX_DRIFT_MM = 1.0
#: A step between slices may differ from the mean step by this part of it.
MAX_STEP_DEVIATION = 0.1


def read_dicom_header(folder: Path, series_uid: str | None) -> ScanGeometry:
    """Geometry of a series, from the headers of its slices."""
    return _read_headers(folder, series_uid)[1]


def read_dicom_volume(folder: Path, series_uid: str | None) -> tuple[npt.NDArray[Any], ScanGeometry]:
    """Values of a series in HU, `(z, y, x)`, and its geometry."""
    files, geometry = _read_headers(folder, series_uid)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.SetNumberOfThreads(1)
    return decoded(reader, folder), geometry


def _read_headers(folder: Path, series_uid: str | None) -> tuple[list[str], ScanGeometry]:
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
    geometry = checked_geometry(
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
        raise ScanError(file, f"cannot be read: {shortened(error)}") from error
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
