"""A table into a store: the voxels against the direct reader, and what is done again, set aside or refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from fmcib_ssl.data import prepare as prepare_module
from fmcib_ssl.data import prepare_plan, prepare_scan
from fmcib_ssl.data.annotations import BadRowsError, LesionTable, read_annotations
from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.prepare import Shard, Summary, merge, prepare
from fmcib_ssl.data.prepare_scan import checksum, resample
from fmcib_ssl.data.scans import Scan, ScanSource, crop_patch, read_scan
from fmcib_ssl.data.store import Store, StoreError, StoreGrid, StoreSettings, patch_start
from fmcib_ssl.data.store_lock import claim_store
from fmcib_ssl.data.tables import ScanError

PATCH = (50, 50, 50)
AXES = [(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b]
FLIPS = [(x, y, z) for x in (False, True) for y in (False, True) for z in (False, True)]


def scan_image(seed: int = 0, size: tuple[int, int, int] = (30, 26, 18), spacing: Any = (1.0, 1.2, 2.0)) -> sitk.Image:
    """Noise in HU, with its middle at LPS (0, 0, 0)."""
    hu = np.random.default_rng(seed).integers(-1000, 400, size[::-1]).astype(np.int16)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin([-(n - 1) / 2 * s for n, s in zip(size, spacing, strict=True)])
    return image


def write_table(folder: Path, rows: list[str], header: str = "image_path,coordX,coordY,coordZ") -> LesionTable:
    path = folder / "lesions.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return read_annotations(path)


def three_scans(folder: Path) -> LesionTable:
    for seed, name in enumerate("abc"):
        sitk.WriteImage(scan_image(seed), str(folder / f"{name}.nrrd"))
    return write_table(folder, ["a.nrrd,1,2,3", "b.nrrd,-4,0,5", "a.nrrd,-6,5,-7", "c.nrrd,0,0,0"])


def run(table: LesionTable, store: Path, **options: Any) -> Summary:
    return prepare(table, store, num_workers=0, **options)


def centers(store: Store) -> np.ndarray:
    return store.lesions[["center_z", "center_y", "center_x"]].to_numpy()


def store_patch(store: Store, lesion: int, size: tuple[int, int, int] = PATCH) -> np.ndarray:
    start = patch_start(centers(store)[lesion], size)
    return store.read_patch(store.lesions["scan_id"][lesion], start, size)


@lru_cache(maxsize=1)
def decoded(source: ScanSource) -> Scan:
    return read_scan(*source)


def direct_patch(store: Store, lesion: int, source: ScanSource, size: tuple[int, int, int] = PATCH) -> np.ndarray:
    """What the direct reader cuts round the centre of the store's voxel that holds a lesion."""
    voxel = np.floor(centers(store)[lesion] + 0.5)
    x, y, z = store.grid(store.lesions["scan_id"][lesion]).to_lps_mm(voxel).tolist()
    return crop_patch(decoded(source), PatchGrid((x, y, z), size, store.settings.spacing_mm))


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store but the lock and the file times."""
    files = {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".lock")}


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


@pytest.mark.parametrize("seed", range(12))
def test_up_to_the_last_voxel_a_store_is_what_the_direct_reader_gives(seed: int) -> None:
    """Any spacing, any direction, whole scans: also where a row of voxels would fall on the scan's very edge."""
    rng = np.random.default_rng(seed)
    spacing = [(0.7, 1.3, 2.5), (1.0, 0.5, 1.5), tuple(rng.uniform(0.5, 4, 3))][seed % 3]
    size = (15, int(rng.integers(5, 20)), 2 * int(rng.integers(4, 12)) + 1)
    direction = Rotation.random(random_state=rng).as_matrix() if seed >= 6 else np.diag([-1.0, 1, 1])[[2, 0, 1]]
    rows = tuple(map(tuple, direction.tolist()))
    geometry = ScanGeometry(size, spacing, tuple(rng.uniform(-300, 300, 3).tolist()), rows)
    scan = Scan(rng.integers(-2000, 2000, size[::-1]).astype(np.int16), geometry)
    grid = StoreGrid.of(geometry, 1.0)
    hu = resample(scan, grid, StoreSettings())
    margin = 3
    shape = tuple(n + 2 * margin for n in grid.shape_zyx)
    middle = grid.to_lps_mm(np.array([n // 2 - margin for n in shape], dtype=float))
    direct = crop_patch(scan, PatchGrid(tuple(middle.tolist()), shape, 1.0))
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


def test_names_outlive_a_move_of_the_archive(tmp_path: Path) -> None:
    for root in ("here", "there"):
        (tmp_path / root / "deep").mkdir(parents=True)
        sitk.WriteImage(scan_image(), str(tmp_path / root / "deep" / "a.nrrd"))
    write_table(tmp_path, ["deep/a.nrrd,1,2,3"])
    stores = []
    for root in ("here", "there"):
        table = read_annotations(tmp_path / "lesions.csv", image_root=tmp_path / root)
        run(table, tmp_path / f"store of {root}", image_root=tmp_path / root)
        stores.append(Store(tmp_path / f"store of {root}").lesions[["lesion_id", "scan_id"]])
    pd.testing.assert_frame_equal(stores[0], stores[1])


def test_the_second_run_reads_no_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = three_scans(tmp_path)
    first = run(table, tmp_path / "store")
    before = content(tmp_path / "store")

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a finished scan is opened")

    monkeypatch.setattr(prepare_scan, "read_scan", refuse)
    monkeypatch.setattr(prepare_plan, "check_annotations", refuse)
    again = run(table, tmp_path / "store")
    assert (first.num_made, again.num_made, again.num_scans, again.num_lesions) == (3, 0, 3, 4)
    assert content(tmp_path / "store") == before


def test_a_changed_source_is_made_anew_and_a_touched_one_is_not(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    patches = [store_patch(Store(tmp_path / "store"), i) for i in range(4)]
    sitk.WriteImage(scan_image(99), str(tmp_path / "b.nrrd"))  # other voxels, the same size
    os.utime(tmp_path / "a.nrrd")
    assert run(table, tmp_path / "store").num_made == 1
    decoded.cache_clear()
    store = Store(tmp_path / "store")
    assert [np.array_equal(store_patch(store, i), patches[i]) for i in range(4)] == [True, False, True, True]
    assert np.abs(store_patch(store, 1).astype(int) - direct_patch(store, 1, table.scan_of(1))).max() <= 1
    assert run(table, tmp_path / "store").num_made == 0
    (tmp_path / "c.nrrd").rename(tmp_path / "to tape.nrrd")
    assert run(table, tmp_path / "store").num_lesions == 4  # a source that is gone is no reason to lose a scan


def test_the_voxels_of_a_header_in_another_file_count(tmp_path: Path) -> None:
    sitk.WriteImage(scan_image(0), str(tmp_path / "a.mhd"))
    table = write_table(tmp_path, ["a.mhd,1,2,3"])
    run(table, tmp_path / "store")
    header = (tmp_path / "a.mhd").read_bytes()
    sitk.WriteImage(scan_image(1), str(tmp_path / "a.mhd"))
    assert (tmp_path / "a.mhd").read_bytes() == header
    assert run(table, tmp_path / "store").num_made == 1


def test_a_damaged_store_is_mended(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    before = content(tmp_path / "store")
    names = sorted(Store(tmp_path / "store").scans.index)
    (tmp_path / "store" / "scans" / f"{names[0]}.b2nd").write_bytes(b"half")
    (tmp_path / "store" / "scans" / f"{names[1]}.cells").unlink()
    (tmp_path / "store" / "scans" / f"{names[2]}.json").unlink()
    assert run(table, tmp_path / "store").num_made == 3
    assert content(tmp_path / "store") == before


def test_changed_rows_change_the_index_and_no_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(three_scans(tmp_path), tmp_path / "store")
    monkeypatch.setattr(prepare_scan, "read_scan", None)
    table = write_table(tmp_path, ["b.nrrd,-4,0,5", "a.nrrd,1,2,4", "a.nrrd,999,0,0"])
    summary = run(table, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert (summary.num_made, summary.num_scans, summary.num_lesions) == (0, 2, 2)
    assert store.lesions["coordZ"].tolist() == [5, 4]
    assert len(store.scans) == 2
    assert summary.rejected["row"].tolist() == [3]


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    with pytest.raises(StoreError, match=r"other settings \(spacing_mm=1.0 there, 2.0 asked for\): ask for the same"):
        run(table, tmp_path / "store", settings=StoreSettings(2.0))
    with pytest.raises(StoreError, match=r"not a store and not empty \(it has 'a.nrrd'\): choose another"):
        run(table, tmp_path)
    with pytest.raises(StoreError, match=r"lesions.csv.* cannot be written: .*choose another store=DIR"):
        run(table, tmp_path / "lesions.csv")


def test_shards_and_merge_give_what_one_run_gives(tmp_path: Path) -> None:
    for seed in range(7):
        sitk.WriteImage(scan_image(seed, (12, 12, 12)), str(tmp_path / f"{seed}.nrrd"))
    rows = [f"{i % 8}.nrrd,{i},0,0" for i in range(5)] + ["5.nrrd,0,0,0", "6.nrrd,500,0,0", "7.nrrd,0,0,0", ",1,2,3"]
    table = write_table(tmp_path, rows)
    whole = run(table, tmp_path / "whole")
    shards = [run(table, tmp_path / "parts", shard=Shard(i, 3)) for i in (1, 2)]
    with pytest.raises(StoreError, match=r"is not complete.*merge=true"):
        Store(tmp_path / "parts")
    with pytest.raises(StoreError, match=r"(?s)\d of 8 scans are not finished:.*not prepared\nRun their shards again"):
        merge(table, tmp_path / "parts")
    shards.append(run(table, tmp_path / "parts", shard=Shard(3, 3)))
    assert sum(shard.num_scans for shard in shards) == whole.num_scans == 8
    merged = merge(table, tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert (merged.num_lesions, merged.num_set_aside) == (6, 2) == (whole.num_lesions, whole.num_set_aside)
    pd.testing.assert_frame_equal(merged.rejected, whole.rejected)
    assert whole.rejected["row"].tolist() == [7, 8, 9]

    sitk.WriteImage(scan_image(50, (12, 12, 12)), str(tmp_path / "0.nrrd"))
    with pytest.raises(StoreError, match=r"1 of 8 scans are not finished:\n.*0\.nrrd: its files have changed"):
        merge(table, tmp_path / "parts")
    with pytest.raises(StoreError, match=r"shard=4/3: the first of 3 is 1/3, there is no 4"):
        Shard(4, 3)


def test_two_runs_on_one_store_are_refused(tmp_path: Path) -> None:
    table, store = three_scans(tmp_path), tmp_path / "store"
    with (
        claim_store(store, StoreSettings(), None),
        pytest.raises(StoreError, match=rf"another run \(process {os.getpid()}"),
    ):
        run(table, store)
    with claim_store(store, StoreSettings(), (1, 2)):
        with pytest.raises(StoreError, match="being written by another run"):
            run(table, store, shard=Shard(1, 2))
        with pytest.raises(StoreError, match="being written by another run"):
            merge(table, store)
        run(table, store, shard=Shard(2, 2))
    run(table, store)


def test_bad_rows_may_refuse_the_whole_table(tmp_path: Path) -> None:
    three_scans(tmp_path)
    table = write_table(tmp_path, ["a.nrrd,1,2,3", "nothing.nrrd,0,0,0", ",1,1,1"])
    with pytest.raises(BadRowsError, match=r"(?s)2 of 3 rows.*row 2: nothing.nrrd.*row 3.*image_path is empty"):
        run(table, tmp_path / "store", on_bad_row="refuse")
    assert pd.read_csv(tmp_path / "store" / "rejected.csv")["row"].tolist() == [2, 3]
    assert not list((tmp_path / "store" / "scans").iterdir())


def test_a_table_without_a_good_row(tmp_path: Path) -> None:
    table = write_table(tmp_path, ["nothing.nrrd,0,0,0"])
    with pytest.raises(BadRowsError, match=r"no row can be used; see .*rejected\.csv"):
        run(table, tmp_path / "store")
    assert len(pd.read_csv(tmp_path / "store" / "rejected.csv")) == 1


def test_whatever_a_scan_does_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = three_scans(tmp_path)
    errors = {"a.nrrd": MemoryError(), "b.nrrd": ZeroDivisionError("from some library")}

    def read(path: Path, *args: Any, **options: Any) -> Any:
        if path.name in errors:
            raise errors[path.name]
        return read_scan(path, *args, **options)

    monkeypatch.setattr(prepare_scan, "read_scan", read)
    summary = run(table, tmp_path / "store")
    assert (summary.num_made, summary.num_set_aside, summary.num_lesions) == (1, 2, 1)
    reasons = dict(zip(summary.rejected["row"], summary.rejected["reason"], strict=True))
    assert set(reasons) == {1, 2, 3}
    assert "more memory than there is" in reasons[1]
    assert "ZeroDivisionError: from some library" in reasons[2]
    errors.clear()  # the next night
    summary = run(table, tmp_path / "store")
    assert (summary.num_made, summary.num_set_aside, summary.num_lesions) == (2, 0, 4)
    assert not list((tmp_path / "store" / "scans").glob("*.rejected.json"))


def test_a_full_disk_stops_the_run_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, store = three_scans(tmp_path), tmp_path / "store"
    fsync = os.fsync

    def full_after_one_scan(descriptor: int) -> None:
        if list((store / "scans").glob("*.json")):
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full_after_one_scan)
    with pytest.raises(StoreError, match="cannot be written: No space left on device; make room, then run"):
        run(table, store)
    finished = list((store / "scans").glob("*.json"))
    assert len(finished) == 1
    monkeypatch.undo()
    assert run(table, store).num_made == 2
    assert not list(store.rglob("*.tmp"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = three_scans(tmp_path)
    (tmp_path / "store").mkdir(mode=0o500)
    if os.access(tmp_path / "store", os.W_OK):  # root may do anything

        def refuse(*_args: object, **_options: object) -> None:
            raise PermissionError(13, os.strerror(13))

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="cannot be written: Permission denied; make it writable, or"):
        run(table, tmp_path / "store")


def write_bad_inputs(folder: Path) -> dict[str, str]:
    """A file for each way in which a scan can be bad, and what is to be said of it."""
    good = scan_image()
    hu = sitk.GetArrayFromImage(good)

    def write(name: str, values: np.ndarray, *, vector: bool = False) -> sitk.Image:
        image = sitk.GetImageFromArray(values, isVector=vector)
        sitk.WriteImage(image, str(folder / name))
        return image

    with_nan, with_inf = hu.astype(np.float32), hu.astype(np.float32)
    with_nan[3, 4, 5], with_inf[3, 4, 5] = np.nan, np.inf
    write("nan.nrrd", with_nan)
    write("inf.nrrd", with_inf)
    write("constant.nrrd", np.full_like(hu, -1000))
    write("mr.nrrd", np.abs(hu))
    write("flat.nii", hu[0])
    write("four.nii", np.stack([hu, hu]))
    write("colour.nrrd", np.stack([hu] * 3, -1), vector=True)
    sitk.WriteImage(good, str(folder / "good.nii.gz"))
    whole = (folder / "good.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    sitk.WriteImage(scan_image(0, (60, 60, 60)), str(folder / "damaged.nii.gz"))
    damaged = bytearray((folder / "damaged.nii.gz").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 50] = bytes(50)
    (folder / "damaged.nii.gz").write_bytes(damaged)
    (folder / "empty.nii.gz").touch()
    shutil.copy(folder / "good.nii.gz", folder / "really nifti.nrrd")
    sitk.WriteImage(good, str(folder / "metres.mha"))
    text = (folder / "metres.mha").read_bytes()
    (folder / "metres.mha").write_bytes(re.sub(rb"ElementSpacing = .*", b"ElementSpacing = 0.0006 0.0006 0.002", text))
    (folder / "singular.mha").write_bytes(
        re.sub(rb"TransformMatrix = .*", b"TransformMatrix = 1 0 0 1 0 0 0 0 1", text)
    )
    (folder / "no slices").mkdir()
    return {
        "missing.nii.gz": "cannot be opened: No such file",
        "truncated.nii.gz": "cut off or damaged",
        "damaged.nii.gz": "cut off or damaged",
        "empty.nii.gz": r"is empty \(0 bytes\)",
        "really nifti.nrrd": "content is not what its name says",
        "flat.nii": "is a 2D image",
        "four.nii": "is a 4D image",
        "colour.nrrd": "3 values a voxel",
        "nan.nrrd": "NaN or Inf",
        "inf.nrrd": "NaN or Inf",
        "constant.nrrd": "is constant",
        "mr.nrrd": "not CT in HU",
        "metres.mha": "spacing of .*0.0006",
        "singular.mha": "direction matrix|singular",
        "no slices": "without DICOM slices",
    }


def test_every_bad_input_is_named_with_row_file_and_remedy(tmp_path: Path) -> None:
    expected = write_bad_inputs(tmp_path)
    rows = [f"{name},0,0,0" for name in expected]
    outside, doubled, text, nan = (len(rows) + k for k in (2, 3, 4, 5))
    rows += [
        "good.nii.gz,0,0,0",
        "good.nii.gz,0,0,80",
        "good.nii.gz,0,0,0",
        'good.nii.gz,"1,5",0,0',
        "good.nii.gz,0,,0",
    ]
    summary = run(write_table(tmp_path, rows), tmp_path / "store")
    assert summary.num_lesions == 1
    written = pd.read_csv(tmp_path / "store" / "rejected.csv").set_index("row")
    assert written.index.tolist() == [row for row in range(1, len(rows) + 1) if row != outside - 1]
    for row, (name, reason) in enumerate(expected.items(), start=1):
        assert written["image_path"][row] == name
        assert str(tmp_path / name) == written["value"][row]
        assert re.search(reason, written["reason"][row]), (name, written["reason"][row])
    assert "62.0 mm outside the scan" in written["reason"][outside]
    assert "same scan and point as row" in written["reason"][doubled]
    assert "is not a finite number" in written["reason"][text]
    assert "is missing" in written["reason"][nan]
    assert written["remedy"].str.len().min() > 10
    assert Store(tmp_path / "store").lesions["row"].tolist() == [outside - 1]


def test_gzip_files_of_several_members_are_in_order(tmp_path: Path) -> None:
    """As parallel compressors write them; half of one is found, wherever the cut is."""
    sitk.WriteImage(scan_image(), str(tmp_path / "plain.nii"))
    data = (tmp_path / "plain.nii").read_bytes()
    parts = [gzip.compress(data[i : i + 5000]) for i in range(0, len(data), 5000)]
    (tmp_path / "a.nii.gz").write_bytes(b"".join(parts))
    expected = hashlib.sha256((tmp_path / "a.nii.gz").read_bytes()).hexdigest()
    assert checksum([tmp_path / "a.nii.gz"], verify=True) == expected
    for cut in (3, len(parts[0]) + 1, len(b"".join(parts)) - 1):
        (tmp_path / "cut.nii.gz").write_bytes(b"".join(parts)[:cut])
        with pytest.raises(ScanError, match=r"cut\.nii\.gz: is cut off or damaged"):
            checksum([tmp_path / "cut.nii.gz"], verify=True)
        checksum([tmp_path / "cut.nii.gz"])


def test_two_series_of_one_folder_are_two_scans(real_data: Path, tmp_path: Path) -> None:
    """Copies of a real series under another series number, in the same folder."""
    pydicom = pytest.importorskip("pydicom")
    slices = sorted((real_data / "ct" / "dicom_series").glob("*.dcm"))
    chosen = sorted(slices, key=lambda p: pydicom.dcmread(p, stop_before_pixels=True).ImagePositionPatient[2])[:12]
    uids = []
    for number in range(2):
        uid = pydicom.uid.generate_uid()
        for file in chosen:
            data = pydicom.dcmread(file)
            data.SeriesInstanceUID = uid
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
            data.RescaleIntercept = data.RescaleIntercept + number
            data.save_as(tmp_path / f"{number}-{file.name}")
        uids.append(uid)
    z = float(pydicom.dcmread(chosen[5], stop_before_pixels=True).ImagePositionPatient[2])
    rows = [f".,0,-150,{z},{uid}" for uid in uids] + [f".,0,-150,{z},"]
    table = write_table(tmp_path, rows, "image_path,coordX,coordY,coordZ,series_uid")
    summary = run(table, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert (len(store.scans), store.scans["series_uid"].nunique()) == (2, 2)
    difference = store_patch(store, 1).astype(int) - store_patch(store, 0)
    assert np.abs(difference[15:35, 10:40, 10:40] - 1).max() <= 1
    assert "holds 2 DICOM series" in summary.rejected["reason"][0]
    (tmp_path / "report.pdf").write_bytes(b"not a slice")
    assert run(table, tmp_path / "store").num_made == 0
    data.RescaleIntercept = -1000
    data.save_as(tmp_path / f"1-{file.name}")
    assert run(table, tmp_path / "store").num_made == 1


@pytest.mark.parametrize("by_point", [False, True])
def test_crops_of_lesions(real_data: Path, tmp_path: Path, by_point: bool) -> None:
    """Files that hold one lesion and little else: each is in the store or in the list."""
    index = pd.read_csv(real_data / "lidc_crops" / "voi_index.csv").iloc[::30]
    rows = index.assign(image_path=index["file"], cropped=True)
    rows = rows.rename(columns={"lps_x": "coordX", "lps_y": "coordY", "lps_z": "coordZ"})
    columns = ["image_path", "cropped", *(["coordX", "coordY", "coordZ"] if by_point else []), "patient_id", "texture"]
    rows[columns].to_csv(tmp_path / "crops.csv", index=False)
    root = real_data / "lidc_crops" / "image"
    table = read_annotations(tmp_path / "crops.csv", image_root=root)
    summary = run(table, tmp_path / "store", image_root=root)
    store = Store(tmp_path / "store")
    accounted = sorted([*store.lesions["row"], *summary.rejected["row"]])
    assert accounted == list(range(1, len(index) + 1))
    assert len(store.lesions) > 0.9 * len(index)
    for lesion in range(0, len(store.lesions), 5):
        row = int(store.lesions["row"][lesion]) - 1
        patch, direct = store_patch(store, lesion), direct_patch(store, lesion, table.scan_of(row))
        assert np.abs(patch.astype(int) - direct).max() <= 1
        point = store.lesions[["center_x_lps_mm", "center_y_lps_mm", "center_z_lps_mm"]].to_numpy()[lesion]
        image = sitk.ReadImage(str(table.scan_of(row).path))
        middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
        expected = index[["lps_x", "lps_y", "lps_z"]].to_numpy()[row] if by_point else middle
        np.testing.assert_allclose(point, expected, atol=1e-4)


def test_the_sidecar_is_plain_json(tmp_path: Path) -> None:
    run(three_scans(tmp_path), tmp_path / "store")
    sidecar = json.loads(next((tmp_path / "store" / "scans").glob("a-*.json")).read_text())
    assert [lesion["row"] for lesion in sidecar["lesions"]] == [1, 3]
    assert sidecar["source"]["num_bytes"] == (tmp_path / "a.nrrd").stat().st_size
    assert prepare_module.LESION_COLUMNS[0] == "lesion_id"
