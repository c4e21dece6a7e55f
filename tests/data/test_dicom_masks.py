"""DICOM SEG written by highdicom, and RTSTRUCT contours whose centres and areas are known from geometry."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from odd_dicom import ct_series, save, write
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from fmcib_ssl.data.masks import find_lesions, lesions_from_masks, read_regions
from fmcib_ssl.data.scans import ScanSource
from fmcib_ssl.data.tables import BadRowsError
from fmcib_ssl.types import ScanError

hd = pytest.importorskip("highdicom")

POINT = ["coordX", "coordY", "coordZ"]
FRAME, RTSTRUCT = "1.2.4", "1.2.840.10008.5.1.4.1.1.481.3"
#: A patient who lies prone and a little turned: rows run to the right, columns to the front.
ANGLE = np.radians(10)
ROW = np.array([-np.cos(ANGLE), np.sin(ANGLE), 0])
COLUMN = np.array([-np.sin(ANGLE), -np.cos(ANGLE), 0])
SHAPE, SPACING, ORIGIN = (12, 40, 48), (3.0, 0.8, 0.8), np.array([20.0, 30.0, -100.0])


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT series of 12 slices."""
    hu = np.random.default_rng(0).integers(-1000, 1000, SHAPE)
    places = np.stack([at(0, 0, k) for k in range(SHAPE[0])])
    slices = ct_series(hu, places, orientation=(*ROW, *COLUMN), spacing=SPACING[1:], signed=True, intercept=0)
    return write(tmp_path_factory.mktemp("dicom") / "series", slices)


def slices_of(series: Path) -> list[Dataset]:
    return sorted((pydicom.dcmread(file) for file in series.iterdir()), key=lambda one: int(one.InstanceNumber))


def write_seg(path: Path, sources: list[Dataset], masks: dict[str, np.ndarray]) -> Path:
    code = hd.sr.CodedConcept("49755003", "SCT", "Morphologically abnormal structure")
    segments = [
        hd.seg.SegmentDescription(
            segment_number=i,
            segment_label=name,
            segmented_property_category=code,
            segmented_property_type=code,
            algorithm_type="MANUAL",
        )
        for i, name in enumerate(masks, start=1)
    ]
    seg = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.stack(list(masks.values()), axis=-1).astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
    )
    seg.save_as(path)
    return path


def write_rtstruct(path: Path, frame: str, rois: dict[str, list[np.ndarray]]) -> Path:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = RTSTRUCT, generate_uid(), "RTSTRUCT"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, polygons) in enumerate(rois.items(), start=1):
        roi, contours = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, frame
        contours.ReferencedROINumber, contours.ContourSequence = number, []
        for points in polygons:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{v:.3f}" for v in points.ravel()]
            contours.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(contours)
    return save(dataset, path)


def circle(column: float, row: float, k: float, radius_mm: float) -> np.ndarray:
    """A circle in the plane of a slice, LPS mm."""
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)[:, None]
    around = radius_mm * (np.cos(angles) * ROW + np.sin(angles) * COLUMN)
    return at(column, row, k) + around


def at(column: float, row: float, k: float) -> np.ndarray:
    """DICOM's own equation for the place of a pixel (PS3.3 C.7.6.2.1.1)."""
    return ORIGIN + ROW * SPACING[2] * column + COLUMN * SPACING[1] * row + np.array([0, 0, SPACING[0]]) * k


def table(folder: Path, series: Path, mask: Path, **options: object) -> object:
    (folder / "masks.csv").write_text(f"image_path,mask_path\n{series},{mask}\n")
    return lesions_from_masks(folder / "masks.csv", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_of_a_seg(series: Path, tmp_path: Path, reverse: bool) -> None:
    """Also where the file lists its frames from the last slice to the first, and leaves out empty ones."""
    tumour, organ = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    tumour[3:6, 10:15, 20:26] = True
    tumour[9, 30, 40] = True
    organ[2:10, 20:35, 5:15] = True
    order = slice(None, None, -1 if reverse else 1)
    path = write_seg(tmp_path / "seg.dcm", slices_of(series)[order], {"Tumour": tumour[order], "Organ": organ[order]})
    regions = read_regions(path, ScanSource(series))
    assert [region.name for region in regions] == ["Tumour", "Organ"]
    lesions = find_lesions(regions[0])
    np.testing.assert_allclose(lesions[POINT], [at(22.5, 12, 4), at(40, 30, 9)], atol=1e-3)
    assert lesions["volume_mm3"].iloc[0] == pytest.approx(3 * 5 * 6 * 0.8 * 0.8 * 3)
    with pytest.raises(BadRowsError, match=r"has 2 regions \(Tumour, Organ\); say which with names="):
        table(tmp_path, series, path)
    rows = table(tmp_path, series, path, names="tum.*")  # the grid check accepts the part of the scan that a SEG holds
    assert len(rows) == 2  # type: ignore[arg-type]


def test_rois_of_an_rtstruct(series: Path, tmp_path: Path) -> None:
    """A cylinder of circles, one of them with a hole."""
    circles = [circle(20, 15, k, 6.0) for k in (4, 5, 6)]
    hollow = [circle(24.3, 19.6, 8, 12.0), circle(24.3, 19.6, 8, 7.0)]
    path = write_rtstruct(tmp_path / "rt.dcm", FRAME, {"GTV-1": circles, "Ring": hollow})
    solid, ring = read_regions(path, ScanSource(series))
    for roi, center, volume_mm3 in (
        (solid, at(20, 15, 5), np.pi * 6**2 * 3 * SPACING[0]),
        (ring, at(24.3, 19.6, 8), np.pi * (12**2 - 7**2) * SPACING[0]),
    ):
        lesion = find_lesions(roi)
        np.testing.assert_allclose(lesion[POINT], [center], atol=0.05)
        assert lesion["volume_mm3"].item() == pytest.approx(volume_mm3, rel=0.05)
    assert len(table(tmp_path, series, path, names="GTV.*")) == 1  # type: ignore[arg-type]


def test_every_voxel_of_a_polygon_and_no_other(series: Path, tmp_path: Path) -> None:
    """Against the sign of the cross products, a test of convex polygons that knows no library."""
    corners = np.array([[5.3, 6.2], [22.7, 9.4], [17.1, 30.9]])  # column, row
    polygon = np.array([at(column, row, 7) for column, row in corners])
    path = write_rtstruct(tmp_path / "without suffix", FRAME, {"triangle": [polygon]})
    (region,) = read_regions(path, ScanSource(series))
    row, column = np.mgrid[: SHAPE[1], : SHAPE[2]]
    inside = np.ones(SHAPE[1:], bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (x1 - x0) * (row - y0) - (y1 - y0) * (column - x0) >= 0
    np.testing.assert_array_equal(region.mask_zyx[7], inside)
    assert region.mask_zyx.sum() == inside.sum() > 100


@pytest.mark.parametrize("order", [1, -1])
def test_voxels_on_the_edge_belong_to_it(series: Path, tmp_path: Path, order: int) -> None:
    """Contours traced through the centres of a mask's outermost voxels give the mask back, whichever way round."""
    corners = [(5, 7), (15, 7), (15, 20), (5, 20)][::order]
    path = write_rtstruct(
        tmp_path / "rt.dcm", FRAME, {"box": [np.array([at(column, row, 2) for column, row in corners])]}
    )
    (region,) = read_regions(path, ScanSource(series))
    expected = np.zeros(SHAPE, bool)
    expected[2, 7:21, 5:16] = True
    np.testing.assert_array_equal(region.mask_zyx, expected)


@pytest.mark.parametrize(
    ("frame", "center", "message"),
    [
        (FRAME, (20, 15, 30), r"'GTV' has a contour that lies in no slice of the scan \(slices 30.00"),
        (FRAME, (20, 15, 4.5), "lies in no slice"),
        ("1.2.5", (20, 15, 4), "belongs to the frame of reference"),
        (FRAME, (-100, 15, 4), "is an empty mask"),
    ],
)
def test_rois_that_do_not_belong_to_the_scan(
    series: Path, tmp_path: Path, frame: str, center: tuple[float, float, float], message: str
) -> None:
    path = write_rtstruct(tmp_path / "a.dcm", frame, {"GTV": [circle(*center, 5.0)]})
    with pytest.raises(ScanError, match=message):
        read_regions(path, ScanSource(series))


def test_files_that_are_no_dicom_masks(series: Path, tmp_path: Path) -> None:
    (tmp_path / "text.dcm").write_text("no dicom")
    for path, message in {
        next(series.iterdir()): r"is a DICOM CT Image Storage, neither SEG nor RTSTRUCT",
        tmp_path / "text.dcm": "cannot be read .InvalidDicomError",
        tmp_path / "none.dcm": "cannot be opened",
    }.items():
        with pytest.raises(ScanError, match=message):
            read_regions(path, ScanSource(series))


def test_without_the_libraries_the_error_says_what_to_install(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seg = write_seg(tmp_path / "seg.dcm", slices_of(series), {"Tumour": np.ones(SHAPE, bool)})
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match=r'pip install "fmcib_ssl\[dicom\]"'):
        read_regions(seg, ScanSource(series))
