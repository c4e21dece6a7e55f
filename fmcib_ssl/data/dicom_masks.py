"""Masks from DICOM SEG and RTSTRUCT files, by way of highdicom (`pip install "fmcib_ssl[dicom]"`).

A SEG brings voxels on a grid of its own, mostly the slices of the scan that are not empty. An RTSTRUCT brings polygons
in the planes of the scan's slices; they are drawn onto the scan's grid, a voxel belonging to a polygon if its centre
lies in it or on its edge (tools that trace masks draw through the centres). Where polygons of one ROI overlap in a
slice, the overlap is a hole, as DICOM has it for inner contours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from matplotlib.path import Path as Polygon

from fmcib_ssl.data.dicom_files import is_dicom, series_at
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.masks import Region
from fmcib_ssl.data.scans import ScanSource, read_header
from fmcib_ssl.data.tables import ScanError

try:
    import highdicom
except ImportError as error:  # pragma: no cover  # the tests install it
    raise ImportError('DICOM SEG and RTSTRUCT need highdicom: pip install "fmcib_ssl[dicom]"') from error

_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # bitmap, and label map
_RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
#: A contour may leave its slice by this part of the distance between slices.
MAX_OFF_SLICE = 0.25
_ON_EDGE = 0.01  # of a voxel: contours are written with a few decimals


def read_dicom_regions(path: Path, scan: ScanSource) -> list[Region]:
    """Segments of a SEG, on the SEG's own grid, or ROIs of an RTSTRUCT, drawn onto the scan's.

    Args:
        path: the file.
        scan: the scan it belongs to; if that is a DICOM series, its frame of reference must be the file's.

    Raises:
        ScanError: no such file, another kind of DICOM, another frame of reference, an ROI that is not drawn in the
            scan's slices, nothing marked.
    """
    try:
        dataset = pydicom.dcmread(path)
    except OSError as error:
        raise ScanError(path, f"cannot be opened: {error.strerror}") from error
    except pydicom.errors.InvalidDicomError as error:
        raise ScanError(path, "is no DICOM file") from error
    kind = dataset.get("SOPClassUID")
    if kind not in (*_SEG, _RTSTRUCT):
        raise ScanError(path, f"is a DICOM {getattr(kind, 'name', 'file of no kind')}, neither SEG nor RTSTRUCT")
    regions = _rois(dataset, path, scan) if kind == _RTSTRUCT else _segments(dataset, path, scan)
    if not any(region.mask_zyx.any() for region in regions):
        raise ScanError(path, "is an empty mask: no segment or ROI marks a voxel")
    return regions


def _segments(dataset: Any, path: Path, scan: ScanSource) -> list[Region]:
    _require_frame(dataset.get("FrameOfReferenceUID"), path, scan)
    segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
    regions = []
    for number in segmentation.segment_numbers:
        try:
            volume = segmentation.get_volume(segment_numbers=[number], combine_segments=False)
        except (RuntimeError, ValueError) as error:
            raise ScanError(path, f"is no regular volume: {error}") from error
        volume = volume.squeeze_channel()
        slices, rows, columns = volume.spatial_shape
        geometry = ScanGeometry(  # highdicom counts (slice, row, column), in LPS mm as we do
            size_xyz=(columns, rows, slices),
            spacing_mm_xyz=_triple(volume.spacing[::-1]),
            origin_lps_mm=_triple(volume.position),
            direction=tuple(_triple(row) for row in volume.direction[:, ::-1]),
        )
        label = str(segmentation.get_segment_description(number).segment_label)
        regions.append(Region(label, np.asarray(volume.array) > 0.5, geometry))
    return regions


def _rois(dataset: Any, path: Path, scan: ScanSource) -> list[Region]:
    geometry = read_header(*scan)
    rois = {int(roi.ROINumber): roi for roi in dataset.get("StructureSetROISequence", [])}
    regions = []
    for item in dataset.get("ROIContourSequence", []):
        roi = rois[int(item.ReferencedROINumber)]
        _require_frame(roi.get("ReferencedFrameOfReferenceUID"), path, scan)
        name = str(roi.get("ROIName", roi.ROINumber))
        mask = np.zeros(geometry.size_xyz[::-1], dtype=bool)
        for contour in item.get("ContourSequence", []):
            if str(contour.ContourGeometricType).startswith("CLOSED_PLANAR"):
                points = np.array(contour.ContourData, dtype=np.float64).reshape(-1, 3)
                _draw(mask, geometry.to_index_xyz(points), f"ROI {name!r}", path)
        regions.append(Region(name, mask, geometry))
    return regions


def _draw(mask: npt.NDArray[np.bool_], index_xyz: npt.NDArray[np.float64], name: str, path: Path) -> None:
    """Flip the voxels of one slice whose centres lie in a polygon."""
    depth = index_xyz[:, 2]
    k = round(float(depth.mean()))
    if np.abs(depth - k).max() > MAX_OFF_SLICE or not 0 <= k < mask.shape[0]:
        raise ScanError(
            path,
            f"{name} has a contour that lies in no slice of the scan (slices {depth.min():.2f} to {depth.max():.2f}; "
            f"the scan has 0 to {mask.shape[0] - 1}): does it belong to another scan?",
        )
    size_xy = np.array(mask.shape[:0:-1])
    low = np.clip(np.floor(index_xyz[:, :2].min(axis=0)), 0, size_xy).astype(int)
    high = np.clip(np.ceil(index_xyz[:, :2].max(axis=0)) + 1, low, size_xy).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]]
    outline = index_xyz[:, :2]
    before = np.roll(outline, 1, axis=0)
    if (before[:, 0] * outline[:, 1] - before[:, 1] * outline[:, 0]).sum() < 0:
        outline = outline[::-1]  # counterclockwise, for which a positive radius makes the polygon wider
    inside = Polygon(outline).contains_points(np.stack([x.ravel(), y.ravel()], axis=1), radius=_ON_EDGE)
    mask[k, low[1] : high[1], low[0] : high[0]] ^= inside.reshape(x.shape)


def _require_frame(frame_uid: Any, path: Path, scan: ScanSource) -> None:
    """Refuse a mask that says it belongs to another frame of reference than its DICOM series."""
    if frame_uid and (scan.path.is_dir() or is_dicom(scan.path)):
        expected = series_at(scan.path, scan.series_uid, any_modality=True)[0].header.get("FrameOfReferenceUID")
        if expected and expected != frame_uid:
            raise ScanError(
                path, f"belongs to the frame of reference {frame_uid}, the scan to {expected}: another scan's"
            )


def _triple(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
