"""A table into a store: the voxels against the direct reader."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import odd_dicom
import pytest
import SimpleITK as sitk
from prepared import centers, direct_patch, run, scan_image, store_patch, write_table
from scipy.spatial.transform import Rotation

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.prepare_scan import resample
from fmcib_ssl.data.scans import Scan, ScanSource, crop_patch, read_scan
from fmcib_ssl.data.store import Store, StoreGrid, StoreSettings

AXES = [(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b]
FLIPS = [(x, y, z) for x in (False, True) for y in (False, True) for z in (False, True)]


def test_real_scans_give_the_patches_of_the_direct_reader(real_data: Path, tmp_path: Path) -> None:
    """At the lesions, at corners, across borders and outside: all to within a rounding."""
    ct = real_data / "ct"
    points = {
        "lung_tumours/lung1_image.nrrd": ["-21.859,-120.536,-611.496", "-145.9,-324.9,-779.2", "0,-150,-600"],
        "lung_tumours/lung2_image.nrrd": ["52.609,-95.868,-256.495", "149.9,-4,-58"],
        "dicom_series": ["0,-150,-100", "-143.4,-287.4,7.4"],
        "abdomen_flipped/example_ct_sm.nii.gz": [],
        "elastix_lung/3DCT_lung.mha": [],
    }
    sources = []
    rows = []
    for path, known in points.items():
        scan = read_scan(ct / path)
        lowest, highest = scan.geometry.bounds_lps_mm()
        drawn = np.random.default_rng(len(rows)).uniform(lowest, highest, (3, 3))
        for point in [*known, *(",".join(f"{v:.3f}" for v in p) for p in drawn)]:
            rows.append(f"{path},{point}")
            sources.append(ScanSource(ct / path))
    (tmp_path / "lesions.csv").write_text("\n".join(["image_path,coordX,coordY,coordZ", *rows]))
    table = read_annotations(tmp_path / "lesions.csv", image_root=ct)
    summary = run(table, tmp_path / "store", image_root=ct)
    assert (summary.num_made, summary.num_lesions, len(summary.rejected)) == (5, len(rows), 0)
    store = Store(tmp_path / "store")
    assert not re.search(r"[^\w.-]", "".join(store.scans.index))
    for lesion, source in enumerate(sources):
        patch, direct = store_patch(store, lesion), direct_patch(store, lesion, source)
        assert np.abs(patch.astype(int) - direct).max() <= 1, rows[lesion]
    for lesion, mask in ((0, "lung1_label.nrrd"), (6, "lung2_label.nrrd")):
        voxel = np.floor(centers(store)[lesion] + 0.5)
        point = store.grid(store.lesions["scan_id"][lesion]).to_lps_mm(voxel)
        labels = sitk.ReadImage(str(ct / "lung_tumours" / mask))
        assert labels.EvaluateAtPhysicalPoint(point.tolist(), sitk.sitkNearestNeighbor) > 0  # still in the tumour
    volumes = store.scans["body_volume_ml"]
    assert volumes.between(3_000, 60_000).all()
    assert store.scans["hu_min"].to_numpy().max() <= -1000


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.1, 2.6)])
def test_a_marked_voxel_is_in_the_centre_in_all_48_orientations(tmp_path: Path, spacing: Any) -> None:
    upright = scan_image(3, (24, 22, 14), spacing)
    marked = [16, 5, 4]
    upright[marked] = 3000
    x, y, z = upright.TransformIndexToPhysicalPoint(marked)
    for number, (order, flip) in enumerate((o, f) for o in AXES for f in FLIPS):
        sitk.WriteImage(sitk.Flip(sitk.PermuteAxes(upright, order), flip), str(tmp_path / f"{number:02}.nrrd"))
    table = write_table(tmp_path, [f"{number:02}.nrrd,{x},{y},{z}" for number in range(48)])
    run(table, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert len(store.lesions) == 48
    first = store_patch(store, 0, (20, 20, 20))
    for lesion in range(48):
        patch = store_patch(store, lesion, (20, 20, 20))
        assert np.unravel_index(patch.argmax(), patch.shape) == (10, 10, 10)
        assert np.abs(patch.astype(int) - first).max() <= 1
        direct = direct_patch(store, lesion, table.scan_of(lesion), (20, 20, 20))
        assert np.abs(patch.astype(int) - direct).max() <= 1
    if spacing == (1.0, 1.0, 1.0):
        assert first[10, 10, 10] == 3000  # grids coincide: nothing is interpolated
        np.testing.assert_allclose(centers(store) % 1, 0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 6, 7, 8, 9])
def test_up_to_the_last_voxel_a_store_is_what_the_direct_reader_gives(seed: int) -> None:
    """Any spacing, any direction, whole scans: also where a row of voxels would fall on the scan's very edge."""
    rng = np.random.default_rng(seed)
    spacing = [(0.7, 1.3, 2.5), (1.0, 0.5, 1.5), tuple(rng.uniform(0.5, 4, 3))][seed % 3]
    size = (15, int(rng.integers(5, 20)), 2 * int(rng.integers(4, 12)) + 1)
    direction = Rotation.random(random_state=rng).as_matrix() if seed >= 6 else np.diag([-1.0, 1, 1])[[2, 0, 1]]
    geometry = ScanGeometry.of(size, spacing, rng.uniform(-300, 300, 3), direction)
    scan = Scan(rng.integers(-2000, 2000, size[::-1]).astype(np.int16), geometry)
    grid = StoreGrid.of(geometry, 1.0)
    hu = resample(scan, grid, StoreSettings())
    margin = 3
    shape = tuple(n + 2 * margin for n in grid.shape_zyx)
    middle = grid.to_lps_mm(np.array([n // 2 - margin for n in shape], dtype=float))
    direct = crop_patch(scan, middle.tolist(), shape, 1.0)
    difference = np.abs(np.pad(hu, margin, constant_values=-1024).astype(int) - direct)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02  # halves, rounded up here and down there


@pytest.mark.parametrize(("name", "itk"), [("nearest", sitk.sitkNearestNeighbor), ("bspline", sitk.sitkBSpline)])
def test_other_interpolations_are_itks(tmp_path: Path, name: Any, itk: int) -> None:
    image = scan_image(1, (20, 18, 150), (1.3, 1.3, 1.0))  # higher than a slab of the resampling
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    run(write_table(tmp_path, ["a.nrrd,0,0,0"]), tmp_path / "store", settings=StoreSettings(0.83, name))
    store = Store(tmp_path / "store")
    grid = store.grid(store.lesions["scan_id"][0])
    expected = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32), grid.shape_zyx[::-1], sitk.Transform(), itk,
        grid.origin_lps_mm, (0.83, 0.83, 0.83), np.eye(3).ravel().tolist(), -1024.0,
    )  # fmt: skip
    hu = store.read_patch(store.lesions["scan_id"][0], (0, 0, 0), grid.shape_zyx)
    difference = np.abs(hu - np.maximum(sitk.GetArrayFromImage(expected), -1024))
    assert difference.max() <= 0.51
    assert store.settings.interpolation == name


def test_floats_and_values_below_air(tmp_path: Path) -> None:
    image = scan_image(2)
    hu = sitk.GetArrayFromImage(image).astype(np.float32) + 0.25
    hu[:, :, :5] = -3000  # outside the field of view
    hu[0, 0, -1] = 50_000.0
    floats = sitk.GetImageFromArray(hu)
    floats.CopyInformation(image)
    sitk.WriteImage(floats, str(tmp_path / "a.nrrd"))
    table = write_table(tmp_path, ["a.nrrd,10,0,0"])
    run(table, tmp_path / "store")
    store = Store(tmp_path / "store")
    whole = store.read_patch(store.lesions["scan_id"][0], (0, 0, 0), store.grid(store.lesions["scan_id"][0]).shape_zyx)
    assert whole.min() == -1024
    assert whole.max() == np.iinfo(np.int16).max  # clipped, not wrapped round
    assert np.abs(store_patch(store, 0).astype(int) - direct_patch(store, 0, table.scan_of(0))).max() <= 1
    scan = store.scans.iloc[0]
    assert (scan["hu_min"], scan["hu_max"]) == (-3000, 50_000)


def test_the_index(tmp_path: Path) -> None:
    for folder in ("P 1", "Pä2"):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(scan_image(len(folder), spacing=(1, 1, 1)), str(tmp_path / folder / "the scan é.nii.gz"))
    header = "image_path,coordX,coordY,coordZ,PatientID,split,stage,label,row,weight"
    rows = [
        "P 1/the scan é.nii.gz,1.5,2,3,001,train,IIb,1,x,0.5",
        "Pä2/the scan é.nii.gz,4,5,-6,002,test,,0,y,",
        "P 1/the scan é.nii.gz,-7,0,0.25,001,train,I,1,z,1.5",
    ]
    summary = run(write_table(tmp_path, rows, header), tmp_path / "my störe")
    store = Store(tmp_path / "my störe")
    assert "3 in the index" in str(summary)
    lesions, scans = store.lesions, store.scans
    assert lesions["row"].tolist() == [1, 2, 3]
    assert lesions["table_row"].tolist() == ["x", "y", "z"]  # the table's own column of that name
    assert lesions["label"].tolist() == [1, 0, 1]
    assert lesions["label"].dtype.kind == "i"
    assert lesions["weight"].iloc[[0, 2]].tolist() == [0.5, 1.5]
    assert lesions["stage"].isna().tolist() == [False, True, False]
    assert lesions[["coordX", "coordY", "coordZ"]].to_numpy().tolist() == [[1.5, 2, 3], [4, 5, -6], [-7, 0, 0.25]]
    assert (lesions[["center_x_lps_mm", "center_y_lps_mm", "center_z_lps_mm"]].to_numpy() ==
            lesions[["coordX", "coordY", "coordZ"]].to_numpy()).all()  # fmt: skip
    assert lesions["lesion_id"].nunique() == 3
    assert scans["num_lesions"].sort_values().tolist() == [1, 2]
    assert all(re.fullmatch(r"the_scan_e-[0-9a-f]{10}", scan_id) for scan_id in scans.index)
    first = scans.loc[lesions["scan_id"][0]]
    assert first["source"] == str(tmp_path / "P 1" / "the scan é.nii.gz")
    assert tuple(first["source_size_xyz"]) == (30, 26, 18) == tuple(first["shape_zyx"])[::-1]
    np.testing.assert_allclose(first["origin_lps_mm"], first["source_origin_lps_mm"], atol=1e-5)
    assert first["sha256"] == hashlib.sha256(Path(first["source"]).read_bytes()).hexdigest()
    assert read_scan(first["source"]).hu.max() == first["hu_max"]


def test_two_series_of_one_folder_are_two_scans(tmp_path: Path) -> None:
    for number, series in enumerate(("1.2.6", "1.2.7")):
        odd_dicom.write(tmp_path, odd_dicom.ct_series(odd_dicom.ct_hu() + number, series=series), series + "-{}.dcm")
    point = ",".join(f"{v:g}" for v in odd_dicom.positions()[2] + (2, 2, 0))
    rows = [f".,{point},1.2.6", f".,{point},1.2.7", f".,{point},"]
    table = write_table(tmp_path, rows, "image_path,coordX,coordY,coordZ,series_uid")
    summary = run(table, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert (len(store.scans), store.scans["series_uid"].nunique()) == (2, 2)
    difference = store_patch(store, 1, (3, 3, 3)).astype(int) - store_patch(store, 0, (3, 3, 3))
    assert np.abs(difference - 1).max() <= 1
    assert "holds 2 DICOM series" in summary.rejected["reason"][0]
    (tmp_path / "report.pdf").write_bytes(b"not a slice")
    assert run(table, tmp_path / "store").num_made == 0
    odd_dicom.write(tmp_path, odd_dicom.ct_series(odd_dicom.ct_hu() + 9, series="1.2.7"), "1.2.7-{}.dcm")
    assert run(table, tmp_path / "store").num_made == 1
