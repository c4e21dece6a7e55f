"""Every class of bad row, with the message a user sees."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from fmcib_ssl.data import annotations
from fmcib_ssl.data.annotations import (
    AnnotationsError,
    BadRowsError,
    LesionTable,
    ScanReport,
    check_annotations,
    inspect_scans,
    read_annotations,
)
from fmcib_ssl.data.scans import ScanSource, read_scan
from fmcib_ssl.types import ScanError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two scans: x -100..-60, y 200..240, z 0..60; the second the same in another folder."""
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 40, 40)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1, 1, 3))
    image.SetOrigin((-100, 200, 0))
    (tmp_path / "sub folder").mkdir()
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "sub folder" / "b.nrrd"))
    return tmp_path


def table(folder: Path, *lines: str, header: str = "image_path,coordX,coordY,coordZ", **options: object) -> LesionTable:
    (folder / "lesions.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return read_annotations(folder / "lesions.csv", **options)  # type: ignore[arg-type]


def check(folder: Path, *lines: str, **options: object) -> tuple[LesionTable, pd.DataFrame]:
    return check_annotations(table(folder, *lines), **options)  # type: ignore[arg-type]


GOOD = "a.nii.gz,-80,220,30"


def test_columns_paths_and_points(archive: Path) -> None:
    lesions = table(
        archive,
        "a.nii.gz,-80,220.5,30,P 1,0",
        '"sub folder/b.nrrd",-81,221,31,"P, 2",1',
        header="image_path,coordX,coordY,coordZ,patient,label",
    )
    usable, rejected = check_annotations(lesions, check="full")
    assert rejected.empty
    assert [s.path for s in usable.scans if s] == [archive / "a.nii.gz", archive / "sub folder" / "b.nrrd"]
    np.testing.assert_array_equal(usable.centers_lps_mm, [[-80, 220.5, 30], [-81, 221, 31]])
    assert usable.rows["patient"].tolist() == ["P 1", "P, 2"]
    assert usable.rows["label"].tolist() == [0, 1]
    assert usable.rows.index.tolist() == [1, 2]


def test_image_root_and_path_prefix(archive: Path) -> None:
    elsewhere = archive / "tables"
    elsewhere.mkdir()
    assert table(elsewhere, GOOD, image_root=archive).scan_of(0).path == archive / "a.nii.gz"
    moved = table(elsewhere, "/mnt/data1/CT/a.nii.gz,-80,220,30", image_root=archive, path_prefix="/mnt/data1/CT")
    assert moved.scan_of(0).path == archive / "a.nii.gz"
    absolute = table(elsewhere, f"{archive}/a.nii.gz,-80,220,30")
    assert absolute.scan_of(0).path == archive / "a.nii.gz"


def test_ras_points(archive: Path) -> None:
    lesions = table(archive, "a.nii.gz,80,-220,30", coordinates="ras")
    np.testing.assert_array_equal(lesions.centers_lps_mm, [[-80, 220, 30]])
    assert len(check_annotations(lesions)[0]) == 1
    with pytest.raises(BadRowsError, match=r"looks like LPS[\s\S]*coordinates=lps"):
        check_annotations(table(archive, GOOD, coordinates="ras"))
    with pytest.raises(AnnotationsError, match=r"coordinates='itk' is not one of 'lps', 'ras', 'voxel'"):
        table(archive, GOOD, coordinates="itk")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_spreadsheets_do_to_a_table(archive: Path, separator: str) -> None:
    lines = ["image_path , coordX,coordY ,coordZ,series_uid", " a.nii.gz, -80,220,30 ,", "", "a.nii.gz,-70,220,30,"]
    text = "\r\n".join(lines).replace(",", separator)
    (archive / "lesions.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    lesions = read_annotations(archive / "lesions.csv")
    assert lesions.rows.index.tolist() == [1, 3]  # the blank line counts
    np.testing.assert_array_equal(lesions.centers_lps_mm, [[-80, 220, 30], [-70, 220, 30]])
    assert lesions.scans == (ScanSource(archive / "a.nii.gz"),) * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"Image_Path,coordX,y,coordZ\n",
            r"lacks the columns 'image_path' \(rename 'Image_Path'\?\), 'coordY'.*it has",
        ),
        (b"image_path,coordX,coordY,coordZ\n", r"has a header and no rows"),
        (b"image_path,coordX,coordY,coordZ\n\n,,,\n", r"has a header and no rows"),
        (b"", r"lacks the columns"),
        (b"image_path,coordX,coordY,coordZ,coordX\n", r"duplicate columns: 'coordX'"),
        (b"image_path,coordX,coordY,coordZ\na b,1,2,3\na, b,1,2,3\n", r"row 2 .* has 5 fields, the header has 4"),
        (b"PK\x03\x04\xff\xfe\x00", r"is not a CSV file in UTF-8"),
        (b"image_path,mask_path\na,b\n", r"lacks the columns 'coordX'.*fmcib-ssl import-annotations source=masks"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "lesions.csv").write_bytes(content)
    with pytest.raises(AnnotationsError, match=message):
        read_annotations(tmp_path / "lesions.csv")
    with pytest.raises(AnnotationsError, match=r"none\.csv: cannot be opened: No such file"):
        read_annotations(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gone.nii.gz,-80,220,30", r"row 2: gone\.nii\.gz: .*/gone\.nii\.gz: cannot be opened: No such file"),
        (",-80,220,30", r"row 2: .*image_path is empty"),
        ("a.nii.gz,-80,,30", r"row 2: a\.nii\.gz: coordY=nan: is missing"),
        ("a.nii.gz,-80,abc,30", r"row 2: a\.nii\.gz: coordY=abc: is not a finite number"),
        ("a.nii.gz,inf,220,30", r"coordX=inf: is not a finite number"),
        ('a.nii.gz,-80,220,"30,5"', r"coordZ=30,5: is not a finite number"),
        ("a.nii.gz,-80,220,70", r"coordZ=70.*: the point is 11\.5 mm outside the scan, which reaches from \(-100\.5, "),
        ("a.nii.gz,80,-220,30", r"outside the scan.*looks like RAS"),
        ("flat.nii.gz,1,1,1", r"row 2: flat\.nii\.gz: .*is a 2D image"),
        ("a.nii.gz,-80.0,220.0,30.0", r"row 2: .*the same scan and point as row 1"),
    ],
)
def test_a_bad_row_is_named(archive: Path, line: str, message: str) -> None:
    sitk.WriteImage(sitk.Image([10, 10], sitk.sitkInt16), str(archive / "flat.nii.gz"))
    with pytest.raises(BadRowsError, match=r"1 of 2 rows cannot be used[\s\S]*on_bad_row=skip") as error:
        check(archive, GOOD, line)
    assert pd.Series(str(error.value)).str.contains(message).item(), str(error.value)
    usable, rejected = check(archive, GOOD, line, on_bad_row="skip")
    assert usable.rows.index.tolist() == [1]
    assert rejected["row"].tolist() == [2]
    assert (rejected["remedy"].str.len() > 0).all()


def test_full_check_finds_what_headers_cannot(archive: Path) -> None:
    path = archive / "sub folder" / "b.nrrd"
    path.write_bytes(path.read_bytes()[:-3000])
    lines = (GOOD, "sub folder/b.nrrd,-80,220,30")
    assert len(check(archive, *lines)[0]) == 2
    with pytest.raises(BadRowsError, match=r"row 2: sub folder/b\.nrrd: .*it is cut off"):
        check(archive, *lines, check="full")


def test_all_bad_rows_are_listed_together(archive: Path) -> None:
    lines = [GOOD, *(f"gone{i}.nrrd,1,2,3" for i in range(30))]
    with pytest.raises(BadRowsError) as error:
        check(archive, *lines, rejected_csv=archive / "rejected.csv")
    message = str(error.value)
    assert "30 of 31 rows cannot be used" in message
    assert message.count("No such file") == 20
    assert f"... and 10 more; all are in {archive / 'rejected.csv'}" in message
    assert "image_root" in message
    written = pd.read_csv(archive / "rejected.csv")
    assert written.columns.tolist() == ["row", "image_path", "value", "reason", "remedy"]
    assert written["row"].tolist() == list(range(2, 32))
    assert str(pickle.loads(pickle.dumps(error.value))) == message
    with pytest.raises(BadRowsError, match=r"No row is left"):
        check(archive, "gone.nrrd,1,2,3", on_bad_row="skip")


def test_each_scan_is_opened_once_and_the_same_in_processes(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive / "bad.nrrd").write_text("NRRD0004")
    scans = [ScanSource(archive / name) for name in ("a.nii.gz", "bad.nrrd", "sub folder/b.nrrd")]
    for how in ("headers", "full"):
        results, expected = inspect_scans(scans, how, num_workers=2), read_scan(scans[0].path)
        assert results[scans[0]] == ScanReport(expected.geometry, expected.summary if how == "full" else None)
        assert isinstance(results[scans[1]], ScanError) and "bad.nrrd" in str(results[scans[1]])
        assert isinstance(results[scans[2]], ScanReport)
    opened: list[Path] = []
    original = annotations.read_header
    monkeypatch.setattr(annotations, "read_header", lambda path, *how: opened.append(path) or original(path, *how))
    check(archive, *(f"a.nii.gz,{-80 + i},220,30" for i in range(9)), "sub folder/b.nrrd,-80,220,30")
    assert sorted(opened) == [archive / "a.nii.gz", archive / "sub folder" / "b.nrrd"]


def killed_by_one(_: str, scan: ScanSource) -> ScanReport:
    if scan.path.name == "b.nrrd":
        os.kill(os.getpid(), signal.SIGKILL)
    return ScanReport(read_scan(*scan).geometry)


def test_a_scan_that_kills_its_process_is_one_scan(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "_inspect", killed_by_one)
    scans = [ScanSource(archive / name) for name in ("a.nii.gz", "sub folder/b.nrrd")]
    good, killed = inspect_scans(scans, "headers", num_workers=2).values()
    assert isinstance(good, ScanReport)
    assert "killed twice" in str(killed)


def test_voxel_indices(archive: Path) -> None:
    """Against SimpleITK's own way from an index to a point, on a flipped and turned scan."""
    image = sitk.ReadImage(str(archive / "a.nii.gz"))
    image.SetDirection((0, -1, 0, -1, 0, 0, 0, 0, -1))
    sitk.WriteImage(image, str(archive / "turned.nii.gz"))
    lesions = table(archive, "turned.nii.gz,3,30.5,12", "a.nii.gz,0,39,19", coordinates="voxel")
    usable, _ = check_annotations(lesions)
    expected = [
        sitk.ReadImage(str(archive / name)).TransformContinuousIndexToPhysicalPoint(index)
        for name, index in (("turned.nii.gz", (3, 30.5, 12)), ("a.nii.gz", (0.0, 39.0, 19.0)))
    ]
    np.testing.assert_allclose(usable.centers_lps_mm, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "coordinates", "message"),
    [
        ("a.nii.gz,3,30,-5", "voxel", r"no voxel of the scan, which has 40 x 40 x 20[\s\S]*i, j, k from 0"),
        ("a.nii.gz,12,30,39", "voxel", r"swap coordX and coordZ: the indices look like k, j, i"),
        ("a.nii.gz,3,x,12", "voxel", r"coordY=x: is not a finite number[\s\S]*coordinates in voxels"),
        ("a.nii.gz,3,30,12", "lps", r"mm outside the scan[\s\S]*coordinates=voxel"),
    ],
)
def test_voxel_indices_that_cannot_be(archive: Path, row: str, coordinates: str, message: str) -> None:
    with pytest.raises(BadRowsError, match=message):
        check_annotations(table(archive, row, coordinates=coordinates))


def test_cropped_files_may_be_small_and_have_no_point(archive: Path) -> None:
    small = sitk.ReadImage(str(archive / "a.nii.gz"))[5:16, 8:18, 3:8]
    sitk.WriteImage(small, str(archive / "crop.nii.gz"))
    header = "image_path,coordX,coordY,coordZ,cropped"
    rows = ["crop.nii.gz,,,,yes", "crop.nii.gz,-91,211,12,TRUE", "a.nii.gz,-80,220,30,no"]
    usable, _ = check_annotations(table(archive, *rows, header=header))
    middle = small.TransformContinuousIndexToPhysicalPoint((5, 4.5, 2))
    np.testing.assert_allclose(usable.centers_lps_mm, [middle, (-91, 211, 12), (-80, 220, 30)], atol=1e-4)
    only_paths = table(archive, "crop.nii.gz,true", header="image_path,cropped")
    np.testing.assert_allclose(check_annotations(only_paths)[0].centers_lps_mm, [middle], atol=1e-4)
    bad = ["crop.nii.gz,,,,no", "crop.nii.gz,-91,,12,yes", rows[0]]
    _, rejected = check_annotations(table(archive, *bad, header=header), on_bad_row="skip")
    assert (rejected["row"].tolist(), set(rejected["reason"])) == ([1, 2], {"is missing"})
