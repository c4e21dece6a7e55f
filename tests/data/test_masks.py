"""Lesions from masks, against SimpleITK's own connected components and label statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from odd_images import NRRD_GEOMETRY, SIZE, write_nrrd

from fmcib_ssl.data.annotations import AnnotationsError, BadRowsError, check_annotations, read_annotations
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.masks import Region, find_lesions, lesions_from_masks, read_regions
from fmcib_ssl.data.scans import ScanSource
from fmcib_ssl.types import ScanError

ANGLE = np.radians(20)
OBLIQUE = ((np.cos(ANGLE), 0.0, np.sin(ANGLE)), (0.0, -1.0, 0.0), (np.sin(ANGLE), 0.0, -np.cos(ANGLE)))


def image_of(values: np.ndarray, geometry: ScanGeometry) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(geometry.spacing_mm_xyz)
    image.SetOrigin(geometry.origin_lps_mm)
    image.SetDirection(np.ravel(geometry.direction).tolist())
    return image


POINT = ["coordX", "coordY", "coordZ"]


def test_lesions_equal_simpleitk_label_statistics() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((12, 20, 16)) > 0.9  # pieces that touch by corners and edges too
    geometry = ScanGeometry((16, 20, 12), (0.7, 0.8, 2.5), (-10.0, 30.0, 5.0), OBLIQUE)
    labels = sitk.ConnectedComponent(image_of(mask.astype(np.uint8), geometry), True)
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(labels)
    expected = {
        (statistics.GetPhysicalSize(n), *statistics.GetCentroid(n), 2 * statistics.GetEquivalentSphericalRadius(n))
        for n in statistics.GetLabels()
    }
    lesions = find_lesions(Region("1", mask, geometry))
    assert len(lesions) == len(expected) > 10
    assert lesions["volume_mm3"].is_monotonic_decreasing
    rows = lesions[["volume_mm3", *POINT, "diameter_mm"]].to_numpy()
    # Equal volumes sort by rounding noise of the next value: compare as sets of rounded rows.
    assert {tuple(np.round(row, 4)) for row in rows} == {tuple(np.round(row, 4)) for row in expected}


def test_diameter_of_a_ball() -> None:
    z, y, x = np.mgrid[-15:16, -15:16, -15:16]
    geometry = ScanGeometry((31, 31, 31), (0.5,) * 3, (0,) * 3)
    ball = find_lesions(Region("ball", x**2 + y**2 + z**2 <= 12**2, geometry))
    assert ball["diameter_mm"].item() == pytest.approx(12, rel=0.02)
    np.testing.assert_allclose(ball[POINT], [[7.5, 7.5, 7.5]])
    assert find_lesions(Region("none", np.zeros((31, 31, 31), bool), geometry)).empty


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A flipped scan with a mask of two labels; label 1 has two pieces, one of a single voxel."""
    geometry = ScanGeometry((40, 30, 20), (1.0, 1.0, 2.0), (100, -50, 7), ((-1, 0, 0), (0, -1, 0), (0, 0, 1)))
    rng = np.random.default_rng(0)
    scan = image_of(rng.integers(-1000, 1000, (20, 30, 40)).astype(np.int16), geometry)
    mask = np.zeros((20, 30, 40), np.uint8)
    mask[4:7, 10:15, 20:27] = 1
    mask[15, 2, 3] = 1
    mask[10:12, 20:24, 30:34] = 2
    (tmp_path / "with blank").mkdir()
    sitk.WriteImage(scan, str(tmp_path / "with blank" / "scan.nii.gz"))
    sitk.WriteImage(image_of(mask, geometry), str(tmp_path / "mask.nrrd"))
    return tmp_path


def of_table(folder: Path, *masks: str, **options: object) -> pd.DataFrame:
    lines = [f"with blank/scan.nii.gz,{mask},P{i}" for i, mask in enumerate(masks)]
    (folder / "masks.csv").write_text("\n".join(["image_path,mask_path,patient", *lines]) + "\n")
    return lesions_from_masks(folder / "masks.csv", **options)  # type: ignore[arg-type]


def test_table_of_masks_becomes_table_of_points(archive: Path) -> None:
    rows = of_table(archive, "mask.nrrd")
    assert rows["region"].tolist() == ["1", "1", "2"]
    assert rows["volume_mm3"].tolist() == [3 * 5 * 7 * 2, 2, 2 * 4 * 4 * 2]
    assert rows["patient"].tolist() == ["P0"] * 3
    # by hand: x = 100 - i, y = -50 - j, z = 7 + 2 k
    np.testing.assert_allclose(rows[POINT], [[77, -62, 17], [97, -52, 37], [68.5, -71.5, 28]], atol=1e-4)
    rows.to_csv(archive / "points.csv", index=False)
    assert len(check_annotations(read_annotations(archive / "points.csv"))[0]) == 3


def test_regions_and_small_pieces_can_be_left_out(archive: Path) -> None:
    assert len(of_table(archive, "mask.nrrd", names="2")) == 1
    assert of_table(archive, "mask.nrrd", min_volume_mm3=3)["region"].tolist() == ["1", "2"]
    with pytest.raises(BadRowsError, match=r"has no region of the name 'GTV'; it has 1, 2"):
        of_table(archive, "mask.nrrd", names="GTV")
    with pytest.raises(BadRowsError, match=r"holds no lesion of 1e\+06 mm3 or more"):
        of_table(archive, "mask.nrrd", min_volume_mm3=1e6)


def test_bad_masks_are_listed_together(archive: Path) -> None:
    good = sitk.ReadImage(str(archive / "mask.nrrd"))
    sitk.WriteImage(good * 0, str(archive / "empty.nrrd"))
    sitk.WriteImage(sitk.Cast(good, sitk.sitkFloat32) * 0.4, str(archive / "soft.nrrd"))
    (archive / "zero.nrrd").touch()
    bad = ["empty.nrrd", "soft.nrrd", "zero.nrrd", "none.nrrd", "", "with blank"]
    with pytest.raises(BadRowsError) as error:
        of_table(archive, *bad, "mask.nrrd", rejected_csv=archive / "rejected.csv")
    reasons = [
        "every voxel is 0",
        "values from 0.4 to 0.8, not labels",
        "is empty",
        "No such file",
        "is empty",
        "is a folder",
    ]
    for row, reason in enumerate(reasons, start=1):
        assert f"row {row}: with blank/scan.nii.gz" in str(error.value)
        assert reason in str(error.value).splitlines()[row]
    assert len(pd.read_csv(archive / "rejected.csv")) == len(bad)
    assert len(of_table(archive, *bad, "mask.nrrd", on_bad_row="skip")) == 3
    (archive / "t.csv").write_text("image_path,label\na,1\n")
    with pytest.raises(AnnotationsError, match="lacks the columns 'mask_path'"):
        lesions_from_masks(archive / "t.csv")


def test_a_mask_must_be_on_the_voxels_of_its_scan(archive: Path) -> None:
    mask = sitk.ReadImage(str(archive / "mask.nrrd"))
    expected = of_table(archive, "mask.nrrd")
    sitk.WriteImage(mask[2:35, 1:28, 3:17], str(archive / "part.nrrd"))
    sitk.WriteImage(sitk.Flip(mask, (True, False, True)), str(archive / "flipped.nrrd"))
    sitk.WriteImage(sitk.PermuteAxes(mask, (2, 0, 1)), str(archive / "permuted.nrrd"))
    for name in ("part.nrrd", "flipped.nrrd", "permuted.nrrd"):
        pd.testing.assert_frame_equal(
            of_table(archive, name).drop(columns="mask_path"), expected.drop(columns="mask_path"), check_exact=False
        )
    without = sitk.GetImageFromArray(sitk.GetArrayFromImage(mask))  # saved without its geometry
    finer = sitk.Resample(mask, (80, 60, 40), sitk.Transform(), 1, mask.GetOrigin(), (0.5, 0.5, 1), mask.GetDirection())
    shifted = sitk.Image(mask)
    shifted.SetOrigin((100.4, -50, 7))
    coarser = mask[::2, ::2, ::2]  # each of its voxels is one of the scan's, but too large
    for name, image in {"without": without, "finer": finer, "shifted": shifted, "coarser": coarser}.items():
        sitk.WriteImage(image, str(archive / f"{name}.nrrd"))
        with pytest.raises(BadRowsError, match=r"is on another grid than its scan[\s\S]*mask_grid=own"):
            of_table(archive, f"{name}.nrrd")
    own = of_table(archive, "finer.nrrd", mask_grid="own", names="2")
    assert own["volume_mm3"].tolist() == pytest.approx([64], rel=0.3)
    np.testing.assert_allclose(own[POINT], [[68.5, -71.5, 28]], atol=1)


def test_points_of_the_real_masks(real_data: Path) -> None:
    published = pd.read_csv(real_data / "ct" / "annotations.csv")
    rows = lesions_from_masks(real_data / "ct" / "annotations.csv", real_data)
    assert len(rows) == len(published)
    np.testing.assert_allclose(rows[POINT], published[POINT], atol=1e-3)


def test_centroids_of_the_real_crops(real_data: Path) -> None:
    index = pd.read_csv(real_data / "lidc_crops" / "voi_index.csv").iloc[::25]
    for _, row in index.iterrows():
        scan = real_data / "lidc_crops" / "image" / row["file"]
        (region,) = read_regions(real_data / "lidc_crops" / "nodule_mask" / row["file"], ScanSource(scan))
        pieces = find_lesions(region)
        volumes = pieces["volume_mm3"].to_numpy()
        assert volumes.sum() == pytest.approx(row["mask_voxels"] * row["sx"] * row["sy"] * row["sz"])
        center = volumes @ pieces[POINT].to_numpy() / volumes.sum()
        np.testing.assert_allclose(center, row[["lps_x", "lps_y", "lps_z"]].to_numpy(float), atol=2e-3)


def test_overlapping_segments_of_3d_slicer_are_refused(tmp_path: Path) -> None:
    """They are layers of one file, of which a label is no region."""
    directions = f"none {NRRD_GEOMETRY['space directions']}"
    layers = {"space_directions": directions, "kinds": "list domain domain domain"}
    write_nrrd(tmp_path / "both.seg.nrrd", np.zeros((2, *SIZE), np.uint8), **layers)
    with pytest.raises(ScanError, match=r"2 values a voxel \(.*overlapping segments\)"):
        read_regions(tmp_path / "both.seg.nrrd", ScanSource(tmp_path / "scan.nii.gz"))
