"""Lesions from masks: a point, a volume and a diameter for every connected component of a mask.

A mask is a file of whole numbers (NIfTI, NRRD, MetaImage), or a DICOM SEG or RTSTRUCT file, read by way of highdicom
(`pip install "fmcib_ssl[dicom]"`). A region is what a mask gives one name: a label value, a DICOM segment, an ROI. A
region of two pieces is two lesions.

A SEG brings voxels on a grid of its own, mostly the slices of the scan that are not empty. An RTSTRUCT brings polygons
in the planes of the scan's slices; they are drawn onto the scan's grid, a voxel belonging to a polygon if its centre
lies in it or on its edge (tools that trace masks draw through the centres). Where polygons of one ROI overlap in a
slice, the overlap is a hole, as DICOM has it for inner contours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pydicom
from matplotlib.path import Path as Polygon
from scipy import ndimage
from tqdm import tqdm

from fmcib_ssl.data.annotations import (
    COORDINATE_COLUMNS,
    MASK_COLUMN,
    PATH_COLUMN,
    SERIES_COLUMN,
    resolve_path,
    scan_source,
)
from fmcib_ssl.data.dicom_files import is_dicom, series_at
from fmcib_ssl.data.geometry import FloatArray, ScanGeometry, numbers_text
from fmcib_ssl.data.image_files import rejecting
from fmcib_ssl.data.scans import ScanSource, read_header, read_volume
from fmcib_ssl.data.tables import REJECTED_COLUMNS, OnBadRow, read_table, refuse_or_skip, require_columns
from fmcib_ssl.io import num_cores
from fmcib_ssl.types import ScanError

_logger = logging.getLogger(__name__)

#: A mask's voxel centres may be off the scan's by this fraction of a voxel: rounding in the headers.
_MAX_GRID_SHIFT = 0.1
#: A contour may leave its slice by this fraction of the slice distance.
_MAX_OFF_SLICE = 0.25
_ON_EDGE = 0.01  # of a voxel: contours are written with a few decimals
_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # bitmap, and label map
_RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
_TOUCHING = ndimage.generate_binary_structure(3, 3)  # pieces that share a corner are one lesion


class Region(NamedTuple):
    """The voxels of one label value, DICOM segment or ROI."""

    name: str
    mask_zyx: npt.NDArray[np.bool_]
    geometry: ScanGeometry


def read_regions(path: Path | str, scan: ScanSource) -> list[Region]:
    """The regions of a mask file, in the order of their label, segment or ROI number.

    Of a DICOM SEG they are its segments on its own grid, of an RTSTRUCT its ROIs, drawn onto the scan's.

    Args:
        path: a mask file; a DICOM file must be a SEG or an RTSTRUCT.
        scan: the scan that it belongs to; if that is a DICOM series, its frame of reference must be the file's.

    Raises:
        ScanError: the mask cannot be read, is empty, or holds values that are no labels; another kind of DICOM, another
            frame of reference, an ROI that is not drawn in the scan's slices.
        ImportError: a SEG, and the library for it is not installed.
    """
    path = Path(path)
    if is_dicom(path):
        with rejecting(path):
            return _dicom_regions(path, scan)
    if path.is_dir():
        raise ScanError(path, "is a folder; name the mask file itself")
    labels, geometry = read_volume(ScanSource(path, affine=scan.affine))
    values = np.unique(labels[labels != 0])  # most are 0: leaving them out first saves the sorting
    if values.size == 0:
        raise ScanError(path, "is an empty mask: every voxel is 0")
    if not (np.isfinite(values).all() and (values == np.rint(values)).all() and values[0] > 0):
        reason = f"is no mask: values from {values[0]:g} to {values[-1]:g}, not labels 0, 1, 2, ...; threshold it first"
        raise ScanError(path, reason)
    return [Region(f"{value:g}", labels == value, geometry) for value in values]


def _dicom_regions(path: Path, scan: ScanSource) -> list[Region]:
    dataset = pydicom.dcmread(path)
    kind = dataset.get("SOPClassUID")
    if kind not in (*_SEG, _RTSTRUCT):
        raise ScanError(path, f"is a DICOM {getattr(kind, 'name', 'file of no kind')}, neither SEG nor RTSTRUCT")
    regions = _rois(dataset, path, scan) if kind == _RTSTRUCT else _segments(dataset, path, scan)
    if not any(region.mask_zyx.any() for region in regions):
        raise ScanError(path, "is an empty mask: no segment or ROI marks a voxel")
    return regions


def _require_frame(frame_uid: Any, path: Path, scan: ScanSource) -> None:
    """Refuse a mask that says it belongs to another frame of reference than its DICOM series."""
    if frame_uid and (scan.path.is_dir() or is_dicom(scan.path)):
        expected = series_at(scan.path, scan.series_uid, any_modality=True)[0].header.get("FrameOfReferenceUID")
        if expected and expected != frame_uid:
            reason = f"belongs to the frame of reference {frame_uid}, the scan to {expected}: another scan's"
            raise ScanError(path, reason)


def _segments(dataset: Any, path: Path, scan: ScanSource) -> list[Region]:
    try:
        import highdicom  # noqa: PLC0415  # an optional library
    except ImportError as error:
        raise ImportError('DICOM SEG needs highdicom: pip install "fmcib_ssl[dicom]"') from error
    _require_frame(dataset.get("FrameOfReferenceUID"), path, scan)
    segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
    regions = []
    for number in segmentation.segment_numbers:
        volume = segmentation.get_volume(segment_numbers=[number], combine_segments=False).squeeze_channel()
        # highdicom counts (slice, row, column), in LPS.
        size, spacing, axes = volume.spatial_shape[::-1], volume.spacing[::-1], volume.direction[:, ::-1]
        label = str(segmentation.get_segment_description(number).segment_label)
        geometry = ScanGeometry.of(size, spacing, volume.position, axes)
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


def _draw(mask: npt.NDArray[np.bool_], index_xyz: FloatArray, name: str, path: Path) -> None:
    """Flip the voxels of one slice whose centres lie in a polygon."""
    outline, depth = index_xyz[:, :2], index_xyz[:, 2]
    k = round(float(depth.mean()))
    if np.abs(depth - k).max() > _MAX_OFF_SLICE or not 0 <= k < mask.shape[0]:
        raise ScanError(
            path,
            f"{name} has a contour that lies in no slice of the scan (slices {depth.min():.2f} to {depth.max():.2f}; "
            f"the scan has 0 to {mask.shape[0] - 1}): does it belong to another scan?",
        )
    size_xy = np.array(mask.shape[:0:-1])
    low = np.clip(np.floor(outline.min(axis=0)), 0, size_xy).astype(int)
    high = np.clip(np.ceil(outline.max(axis=0)) + 1, low, size_xy).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]]
    before = np.roll(outline, 1, axis=0)
    if (before[:, 0] * outline[:, 1] - before[:, 1] * outline[:, 0]).sum() < 0:
        outline = outline[::-1]  # counterclockwise, for which a positive radius makes the polygon wider
    inside = Polygon(outline).contains_points(np.stack([x.ravel(), y.ravel()], axis=1), radius=_ON_EDGE)
    mask[k, low[1] : high[1], low[0] : high[0]] ^= inside.reshape(x.shape)


def find_lesions(region: Region) -> pd.DataFrame:
    """Every connected component of a region, the largest first. Voxels that share a corner are connected.

    The diameter is that of the ball of equal volume. RECIST's, the longest in a slice, is larger for all other shapes.
    The point is the mean of the voxels; of a curved lesion it may lie outside.
    """
    # Only the bounding box of the region is searched; an empty region has none.
    box = (ndimage.find_objects(region.mask_zyx.astype(np.uint8)) or [(slice(0, 1),) * 3])[0]
    pieces, num_pieces = ndimage.label(region.mask_zyx[box], _TOUCHING)
    counts = np.bincount(pieces.ravel(), minlength=num_pieces + 1)[1:]
    centers_zyx = np.reshape(ndimage.center_of_mass(pieces > 0, pieces, np.arange(1, num_pieces + 1)), (-1, 3))
    points = region.geometry.to_lps_mm((centers_zyx + [s.start for s in box])[:, ::-1])
    lesions = pd.DataFrame(points, columns=list(COORDINATE_COLUMNS))
    lesions["region"] = region.name
    lesions["volume_mm3"] = counts * float(np.prod(region.geometry.spacing_mm_xyz))
    lesions["diameter_mm"] = (6 * lesions["volume_mm3"] / np.pi) ** (1 / 3)
    return lesions.iloc[np.argsort(-counts, kind="stable")]


def _check_grid(mask: ScanGeometry, scan: ScanGeometry, path: Path) -> None:
    """Refuse a mask whose voxels are not voxels of its scan; it may be a part of the scan, or stored flipped."""
    index = scan.to_index_xyz(mask.corners_lps_mm())
    steps = scan.to_index_xyz(mask.to_lps_mm(np.eye(3))) - scan.to_index_xyz(mask.origin_lps_mm)
    on_voxels = np.abs(index - np.rint(index)).max() <= _MAX_GRID_SHIFT
    one_by_one = np.allclose(np.sort(np.abs(steps), axis=1), [0, 0, 1], atol=_MAX_GRID_SHIFT)
    inside = (index >= -_MAX_GRID_SHIFT).all() and (index <= np.array(scan.size_xyz) - 1 + _MAX_GRID_SHIFT).all()
    if not (on_voxels and one_by_one and inside):
        grids = [
            f"{numbers_text(g.size_xyz, ' x ')} voxels of {numbers_text(g.spacing_mm_xyz, ' x ')} mm"
            for g in (mask, scan)
        ]
        raise ScanError(
            path,
            f"is on another grid than its scan: {grids[0]}, the scan {grids[1]}; its first voxel lies at "
            f"({numbers_text(index[0])}) of the scan's. Save it with the scan's geometry; if its own header is right, "
            "mask_grid=own takes the point from that",
        )


def lesions_from_masks(
    path: Path | str,
    image_root: Path | str | None = None,
    *,
    path_prefix: str | None = None,
    names: str | None = None,
    min_volume_mm3: float = 0.0,
    mask_grid: Literal["scan", "own"] = "scan",
    on_bad_row: OnBadRow = "refuse",
    rejected_csv: Path | str | None = None,
) -> pd.DataFrame:
    """One row for each lesion of the masks that a table names, with its point in LPS mm.

    The table has `image_path, mask_path`, optionally `series_uid` and `modality`; further columns are repeated for each
    lesion of the row. Added are `coordX, coordY, coordZ` (in place of what stood there), `region`, `volume_mm3`,
    `diameter_mm`.

    Args:
        path: the CSV file.
        image_root: where relative paths of images and masks start; the folder of the CSV file by default.
        path_prefix: beginning of the paths in the table, to be replaced by `image_root`.
        names: regular expression that the whole name of a region must match, upper or lower case; the name is the
            label value, the DICOM segment's label or the ROI's name. All regions by default; a DICOM file with several
            (organs, mostly) is refused without it.
        min_volume_mm3: smaller pieces are left out, and counted in the log.
        mask_grid: "scan" refuses a mask whose voxels are not the scan's; "own" trusts its own header.
        on_bad_row: "refuse" raises if there is any row without a lesion; "skip" continues without it.
        rejected_csv: where to write such rows.

    Raises:
        AnnotationsError: a table that cannot be used.
        BadRowsError: rows that give no lesion and `on_bad_row="refuse"`, or no row that can be used.
    """
    path = Path(path)
    rows = read_table(path, text=(PATH_COLUMN, SERIES_COLUMN, MASK_COLUMN))
    require_columns(path, rows, (PATH_COLUMN, MASK_COLUMN))
    root = Path(image_root) if image_root is not None else path.parent

    def of_row(row: dict[Hashable, Any]) -> pd.DataFrame | ScanError:
        image, mask = (resolve_path(row[column], root, path_prefix) for column in (PATH_COLUMN, MASK_COLUMN))
        try:
            if image is None or mask is None:
                raise ScanError(PATH_COLUMN if image is None else MASK_COLUMN, "is empty; fill it in")
            return _lesions_of(mask, scan_source(image, row), names, min_volume_mm3, mask_grid)
        except ScanError as error:
            return error

    records = rows.to_dict("records")
    with ThreadPoolExecutor(min(num_cores(), 4)) as pool:
        results = list(tqdm(pool.map(of_row, records), "Reading masks", len(records), unit="mask", disable=None))
    lesions: list[dict[Hashable, Any]] = []
    problems = []
    for number, row, result in zip(rows.index, records, results, strict=True):
        if isinstance(result, ScanError):
            remedy = result.remedy or "correct the mask or its path, or leave out the row"
            problems.append((number, row[PATH_COLUMN], result.path, result.reason, remedy))
        else:
            lesions += [row | lesion for lesion in result.to_dict("records")]
    rejected = pd.DataFrame(problems, columns=list(REJECTED_COLUMNS))
    refuse_or_skip(rejected, path, len(rows), on_bad_row, rejected_csv)
    return pd.DataFrame(lesions)


def _lesions_of(
    mask: Path, scan: ScanSource, names: str | None, min_volume_mm3: float, mask_grid: Literal["scan", "own"]
) -> pd.DataFrame:
    """The connected components of a mask that are lesions."""
    geometry = read_header(*scan)
    regions = read_regions(mask, scan)
    listing = ", ".join(region.name for region in regions)
    if names is not None:
        regions = [region for region in regions if re.fullmatch(names, region.name, re.IGNORECASE)]
        if not regions:
            raise ScanError(mask, f"has no region of the name {names!r}; it has {listing}")
    elif len(regions) > 1 and is_dicom(mask):
        raise ScanError(mask, f"has {len(regions)} regions ({listing}); say which with names=")
    if mask_grid == "scan":
        for region in regions:
            _check_grid(region.geometry, geometry, mask)
    pieces = pd.concat([find_lesions(region) for region in regions])
    lesions = pieces[pieces["volume_mm3"] >= min_volume_mm3]
    if num_left_out := len(pieces) - len(lesions):
        _logger.info("%s: %d pieces below %g mm3 left out", mask, num_left_out, min_volume_mm3)
    if lesions.empty:
        raise ScanError(mask, f"holds no lesion of {min_volume_mm3:g} mm3 or more")
    return lesions
