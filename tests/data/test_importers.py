"""Published tables: on the real ones, and on synthetic scans where the imported point must hit a marked voxel."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from fmcib_ssl.data import importers
from fmcib_ssl.data.annotations import AnnotationsError, check_annotations, read_annotations
from fmcib_ssl.data.scans import crop_patch, read_scan

POINT = ["coordX", "coordY", "coordZ"]
MARK_HU = 3000
DL_INFO = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
)
#: The marked voxel: NumPy's row, column and slice of the file, all from 0.
ROW, COLUMN, SLICE = 44, 23, 9
FIRST, LAST, SPACING = 101, 130, (0.7, 0.7, 2.0)


@pytest.fixture
def deeplesion_file(tmp_path: Path) -> Path:
    """A NIfTI as the converter of DeepLesion's authors makes it: slices stacked last, and this affine."""
    slices = np.random.default_rng(0).integers(-1000, 200, (LAST - FIRST + 1, 64, 80)).astype(np.int16)
    slices[SLICE, ROW, COLUMN] = MARK_HU
    affine = np.array([[0, -SPACING[1], 0, 0], [-SPACING[0], 0, 0, 0], [0, 0, -SPACING[2], 0], [0, 0, 0, 1]])
    path = tmp_path / f"000012_03_01_{FIRST:03d}-{LAST:03d}.nii.gz"
    nib.save(nib.Nifti1Image(np.moveaxis(slices, 0, -1), affine), path)
    return path


def dl_info_row(ends: str = "14, 45, 34, 45, 24, 41, 24, 49", key: int = FIRST + SLICE) -> str:
    """DeepLesion's pixels count from 1: the diameters cross at column 24, row 45."""
    return (
        f'000012_03_01_{key:03d}.png,12,3,1,{key},"{ends}","9, 36, 39, 54","20, 8","0.3, 0.5, 0.6",5,0,'
        f'"{FIRST}, {LAST}","0.7, 0.7, 2","512, 512","-175, 275",F,61,2'
    )


def derived_table(path: Path) -> Path:
    """What the foundation-cancer-image-biomarker project makes of the same lesion, worked out as its code does."""
    image = sitk.ReadImage(str(path))
    centroid = (24.0, 45.0, float(LAST - (FIRST + SLICE) + 1))
    x, y, z = image.TransformIndexToPhysicalPoint([int(c) for c in centroid])
    row = {
        "Volume_fn": path.name,
        "Train_Val_Test": 2,
        "bbox": "[9, 36, 39, 54]",
        **{f"centroid_{axis}": c for axis, c in zip("xyz", centroid, strict=True)},
        **{f"lesion_diameters_{axis}": d for axis, d in zip("xyz", (14.0, 5.6, 14.0), strict=True)},
        **{f"spacing_{axis}": s for axis, s in zip("xyz", SPACING, strict=True)},
        "image_path": f"/mnt/data1/{path.name}",
        **dict(zip(POINT, (x, y, z), strict=True)),
    }
    pd.DataFrame([row]).to_csv(path.parent / "pretrain.csv")
    return path.parent / "pretrain.csv"


def imported_patch(rows: pd.DataFrame, folder: Path) -> np.ndarray:
    """From the imported table through the package's own reader to the patch."""
    rows.to_csv(folder / "lesions.csv", index=False)
    usable, _ = check_annotations(read_annotations(folder / "lesions.csv", folder))
    x, y, z = usable.centers_lps_mm[0].tolist()
    scan = usable.scan_of(0)
    return crop_patch(read_scan(*scan), (x, y, z), (9, 9, 9), 0.5)


def test_deeplesion_info_hits_the_marked_voxel(deeplesion_file: Path) -> None:
    (deeplesion_file.parent / "DL_info.csv").write_text(f"{DL_INFO}\n{dl_info_row()}\n")
    rows = importers.deeplesion(deeplesion_file.parent / "DL_info.csv")
    assert imported_patch(rows, deeplesion_file.parent)[4, 4, 4] == MARK_HU
    first = rows.iloc[0]
    assert (first["PatientID"], first["split"], first["Coarse_lesion_type"]) == ("000012", "val", 5)
    assert first["diameter_mm"] == pytest.approx(14.0)


def test_deeplesion_derived_table_hits_the_marked_voxel_and_its_own_point_does_not(deeplesion_file: Path) -> None:
    table = derived_table(deeplesion_file)
    rows = importers.deeplesion(table)
    assert imported_patch(rows, deeplesion_file.parent)[4, 4, 4] == MARK_HU
    as_published = pd.read_csv(table).assign(image_path=deeplesion_file.name)
    assert imported_patch(as_published, deeplesion_file.parent).max() < MARK_HU / 2


def test_recist_center_against_solving_for_the_crossing() -> None:
    ends = np.random.default_rng(1).uniform(0, 100, (200, 4, 2))
    num_crossing = 0
    for (p, q, r, s), center in zip(ends, importers.recist_center(ends), strict=True):
        along = np.linalg.solve(np.stack([q - p, r - s], axis=1), r - p)
        crosses = ((along >= 0) & (along <= 1)).all()
        num_crossing += crosses
        np.testing.assert_allclose(center, p + along[0] * (q - p) if crosses else (p + q + r + s) / 4)
    assert 20 < num_crossing < 180
    np.testing.assert_allclose(importers.recist_center([[[0, 0], [2, 0], [0, 1], [2, 1]]]), [[1, 0.5]])  # parallel


def test_deeplesion_names_what_it_cannot_read(tmp_path: Path) -> None:
    path, row = tmp_path / "DL_info.csv", dl_info_row()
    for rows, message in {
        f"{DL_INFO}\n{row}\n{dl_info_row(ends='1, 2, 3')}\n": r"row 2: Measurement_coordinates is .*expected 8 numbers",
        f"{DL_INFO}\n{dl_info_row(key=LAST + 1)}\n": "expected a key slice within the file",
        f"{DL_INFO}\n{row.replace(f',{FIRST + SLICE},', ',x,')}\n": "row 1: Key_slice_index is 'x'; expected a number",
        "a,b\n1,2\n": "lacks the columns 'Volume_fn'",
    }.items():
        path.write_text(rows)
        with pytest.raises(AnnotationsError, match=message):
            importers.deeplesion(path)


@pytest.mark.parametrize(
    ("name", "num_rows"), [("pretrain", 11467), ("task1_train", 2610), ("task1_val", 1220), ("task1_test", 1221)]
)
def test_real_deeplesion_tables(real_data: Path, name: str, num_rows: int) -> None:
    path = real_data / "annotations" / "deeplesion" / f"{name}.csv"
    published, rows = pd.read_csv(path), importers.deeplesion(path)
    assert len(rows) == len(published) == num_rows
    assert (rows["image_path"].to_numpy() == published["Volume_fn"].to_numpy()).all()
    # Each point lies in the box that DeepLesion gives the lesion, and in a slice of its file.
    box = published["bbox"].str.strip("[]").str.split(",", expand=True).astype(float).to_numpy() - 1
    spacing = published[["spacing_x", "spacing_y", "spacing_z"]].to_numpy()
    pixel = rows[POINT].to_numpy() / spacing * (1, 1, -1)
    assert (pixel[:, :2] >= box[:, :2]).all()
    assert (pixel[:, :2] <= box[:, 2:]).all()
    first, last = published["Volume_fn"].str.extract(r"_(\d+)-(\d+)\.nii\.gz$").to_numpy(int).T
    num_slices = last - first + 1
    assert (pixel[:, 2] > -1e-6).all()
    assert (pixel[:, 2] < num_slices - 1 + 1e-6).all()
    # The published point has x and y swapped, no fraction, counts from 1, and its slices from the end.
    swapped = published[["coordY", "coordX"]].to_numpy() / spacing[:, :2]
    assert ((pixel[:, :2] - swapped > -1.001) & (pixel[:, :2] - swapped < 0.001)).all()
    np.testing.assert_allclose(pixel[:, 2] - published["coordZ"] / spacing[:, 2], num_slices, atol=1e-4)
    assert rows["PatientID"].str.fullmatch(r"\d{6}").all()


def test_luna16_finds_files_and_hits_the_marked_voxel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 200, (30, 60, 70)).astype(np.int16)
    voxels[11, 40, 20] = MARK_HU
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.7, 0.7, 1.5))
    image.SetOrigin((-160.0, -170.0, -300.0))
    (tmp_path / "subset3").mkdir()
    sitk.WriteImage(image, str(tmp_path / "subset3" / "1.2.3.mhd"))
    x, y, z = image.TransformIndexToPhysicalPoint((20, 40, 11))
    (tmp_path / "annotations.csv").write_text(
        f"seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,{x},{y},{z},5\n1.2.4,0,0,0,5\n"
    )
    rows = importers.luna16(tmp_path / "annotations.csv", tmp_path)
    assert rows["image_path"].tolist() == ["subset3/1.2.3.mhd", "1.2.4.mhd"]
    assert "1 of 2 series are not under" in caplog.text
    assert imported_patch(rows.iloc[:1], tmp_path)[4, 4, 4] == MARK_HU


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("annotations", 1186), ("task2_train", 338), ("task2_val", 169), ("task2_test", 170)],
)
def test_real_luna16_tables(real_data: Path, name: str, num_rows: int) -> None:
    """Their points, where a crop of the nodule is at hand, against the centroid of its mask in LPS."""
    path = real_data / "annotations" / "luna16" / f"{name}.csv"
    rows = importers.luna16(path)
    assert len(rows) == len(pd.read_csv(path)) == num_rows
    assert (rows["image_path"] == rows["seriesuid"] + ".mhd").all()
    assert not any(str(column).startswith("Unnamed") for column in rows)
    crops = pd.read_csv(real_data / "lidc_crops" / "voi_index.csv")
    pairs = rows.reset_index().merge(crops, on="seriesuid")
    offset = pairs[POINT].to_numpy() - pairs[["lps_x", "lps_y", "lps_z"]].to_numpy()
    nearest = pd.Series(np.linalg.norm(offset, axis=1)).groupby(pairs["row"]).min()
    assert (nearest < 5).mean() > 0.8  # the others have no crop
    assert nearest.median() < 1.5


def test_real_lung1_table(real_data: Path) -> None:
    rows = importers.lung1(real_data / "annotations" / "lung1" / "annotations.csv")
    assert len(rows) == 421
    assert (rows["image_path"] == rows["PatientID"] + "/CT.nrrd").all()
    assert {"Survival.time", "deadstatus.event", "Histology"} <= set(rows)


def test_real_lidc_crops(real_data: Path, tmp_path: Path) -> None:
    """Every file has its row, the one bad mask is flagged, and all are accepted, by point and without."""
    root = real_data / "lidc_crops"
    rows = importers.lidc_crops(root / "voi_index.csv")
    assert sorted(rows["image_path"]) == sorted(f"image/{file.name}" for file in (root / "image").iterdir())
    assert len(rows) == 994
    assert rows.loc[rows["suspect"], "image_path"].tolist() == ["image/LIDC-IDRI-0332_R_1.nii.gz"]
    for table in (rows, rows.drop(columns=POINT)):
        table.to_csv(tmp_path / "lesions.csv", index=False)
        assert len(check_annotations(read_annotations(tmp_path / "lesions.csv", root))[0]) == 994


#: Tables of each data set; another importer than its own refuses them, and says whose they are.
SHIPPED = {
    "deeplesion/pretrain.csv": "deeplesion",
    "deeplesion/task1_val.csv": "deeplesion",
    "luna16/annotations.csv": "luna16",
    "luna16/luna16_training_annotations.csv": "luna16",
    "luna16/task2_test.csv": "luna16",
    "lung1/annotations.csv": "lung1",
    "../lidc_crops/voi_index.csv": "lidc_crops",
}


@pytest.mark.parametrize("source", importers.IMPORTERS)
@pytest.mark.parametrize("table", SHIPPED)
def test_a_table_of_another_data_set_is_refused_by_name(table: str, source: str, real_data: Path) -> None:
    path, owner = real_data / "annotations" / table, SHIPPED[table]
    if source == owner:
        assert len(importers.IMPORTERS[source](path))
        return
    with pytest.raises(AnnotationsError, match=f"looks like a table of {owner}.* give source={owner}"):
        importers.IMPORTERS[source](path)


@pytest.mark.parametrize(("source", "column"), [("luna16", "seriesuid"), ("lung1", "LUNG1-")])
def test_a_table_of_ones_own_is_no_published_one(source: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("image_path,PatientID,coordX,coordY,coordZ\nP1/CT.nrrd,P1,1,2,3\n")
    with pytest.raises(AnnotationsError, match=f"row 1.*expected .*{column}"):
        importers.IMPORTERS[source](path)


#: Tables with the columns of the published ones that are read, and what becomes of their first row.
PLAIN = {
    "dlcs": (
        "patient-id,nodule_id,ct_nifti_file,coordX,coordY,coordZ,w,h,d,Malignant_lbl,benchmark_split\n"
        "DLCS_0001,DLCS_0001_01,DLCS_0001.nii.gz,-106.5,-63.8,-211.7,4.4,4.5,4.3,0,train\n",
        {"image_path": "DLCS_0001.nii.gz", "PatientID": "DLCS_0001", "coordX": -106.5, "malignancy": 0,
         "split": "train", "diameter_mm": 4.5},
    ),
    "luna25": (
        "PatientID,SeriesInstanceUID,StudyDate,CoordX,CoordY,CoordZ,LesionID,AnnotationID,NoduleID,label,Age,Gender\n"
        "100012,1.2.840.113654.2.55.1,19990102,-106.5,-63.8,-211.7,1,100012_1_19990102,100012_1,1,61,Male\n",
        {"image_path": "1.2.840.113654.2.55.1.mha", "PatientID": "100012", "coordX": -106.5, "malignancy": 1},
    ),
    "c4kc_kits": (
        "patient_id,radiographic_size,vital_status,vital_days_after_surgery,Series UID,coordX,coordY,coordZ\n"
        "KiTS-00169,3.5,dead,233,1.3.6.1,-106.5,46.9,1287.6\n",
        {"image_path": "1.3.6.1", "PatientID": "KiTS-00169", "coordX": -106.5, "event": 1, "radiographic_size": 3.5},
    ),
    "colorectal_liver": (
        "Series UID,Patient-ID,max_tumor_size,overall_survival_months,vital_status,mask_path,coordX,coordY,coordZ\n"
        "1.3.6.2,CRLM-CT-1001,1.1,117.4,0,[Path('a')],-106.5,-35.5,-156.9\n",
        {"image_path": "1.3.6.2", "PatientID": "CRLM-CT-1001", "coordX": -106.5, "event": 0, "max_tumor_size": 1.1},
    ),
    "nsclc_radiogenomics": (
        "Case ID,Survival Status,Survival.time,image_path,mask_path,coordX,coordY,coordZ,deadstatus.event\n"
        "R01-001,Alive,3078,/theirs/R01-001.nrrd,/theirs/SEG/Heart.nrrd,-106.5,-145.0,-66.1,0\n",
        {"image_path": "R01-001.nrrd", "PatientID": "R01-001", "coordX": -106.5, "event": 0, "Survival.time": 3078},
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", PLAIN)
def test_a_table_that_only_names_its_columns_otherwise(source: str, tmp_path: Path) -> None:
    text, expected = PLAIN[source]
    path = tmp_path / "table.csv"
    path.write_text(text)
    rows = importers.IMPORTERS[source](path)
    assert rows.iloc[0][list(expected)].to_dict() == expected
    assert list(rows)[:4] == ["image_path", *POINT]
    assert "mask_path" not in rows  # of its authors' machine
    with pytest.raises(AnnotationsError, match=f"looks like a table of {source}"):
        importers.luna16(path)
    head, row = text.splitlines()
    path.write_text(f"{head.replace('coordX', 'x').replace('CoordX', 'x')}\n{row}\n")
    with pytest.raises(AnnotationsError, match="oordX"):
        importers.IMPORTERS[source](path)


def test_the_tables_are_those_that_are_tested() -> None:
    assert set(importers.IMPORTERS) == {*PLAIN, "deeplesion", "luna16", "lung1", "lidc_crops"}
