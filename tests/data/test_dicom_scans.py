"""DICOM scans against DICOM's own equations and pydicom."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from odd_dicom import (
    CORONAL,
    ORIGIN,
    PRONE,
    SHAPE,
    UPRIGHT,
    assert_read_right,
    ct_hu,
    ct_series,
    encode,
    enhanced,
    file_of,
    positions,
    rotated,
    save,
    store,
    strip_preamble,
    write,
)
from pydicom.data import get_testdata_file

from fmcib_ssl.data.annotations import check_annotations, read_annotations
from fmcib_ssl.data.scans import read_header, read_scan
from fmcib_ssl.types import ScanError

# --- values ---


@pytest.mark.parametrize(("signed", "bits", "intercept"), [(False, 12, -1024), (False, 16, -1024), (True, 16, 0)])
def test_monochrome1_is_not_inverted(tmp_path: Path, signed: bool, bits: int, intercept: int) -> None:
    hu = ct_hu()
    slices = ct_series(hu, signed=signed, bits=bits, intercept=intercept)
    for one in slices:
        one.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(read_scan(write(tmp_path / "plain", slices)).hu, hu)
    compressed = [encode(one, "JPEG2000") for one in slices]
    np.testing.assert_array_equal(read_scan(write(tmp_path / "compressed", compressed)).hu, hu)


def test_every_slice_has_its_own_rescale(tmp_path: Path) -> None:
    hu = 4 * ct_hu(low=-250)
    hu[0] = np.abs(hu[0])
    slices = ct_series(hu, slope=2)
    for k, (slope, intercept, signed) in enumerate([(1, 0, False), (1, -1024, False), (4, 0, True), (2, -2000, False)]):
        store(slices[k], (hu[k] - intercept) // slope, signed)
        slices[k].RescaleSlope, slices[k].RescaleIntercept = slope, intercept
    scan = read_scan(write(tmp_path / "a", slices))
    np.testing.assert_array_equal(scan.hu, hu)
    assert scan.hu.dtype == np.int16


def test_values_that_are_no_int16(tmp_path: Path) -> None:
    hu = ct_hu()
    hu[2, 3, 4] = 70_000
    with pytest.warns(UserWarning, match="1 voxels above 32767 HU"):
        scan = read_scan(write(tmp_path / "large", ct_series(hu, bits=32)))
    np.testing.assert_array_equal(scan.hu, np.minimum(hu, 32767))
    slices = ct_series(ct_hu(), slope=0.5, intercept=-1000.25)
    stored = np.stack([np.frombuffer(one.PixelData, "<u2").reshape(SHAPE[1:]) for one in slices])
    np.testing.assert_allclose(read_scan(write(tmp_path / "half", slices)).hu, stored * 0.5 - 1000.25)


@pytest.mark.parametrize("signed", [False, True])
def test_bits_beyond_those_stored(tmp_path: Path, signed: bool) -> None:
    """Nobody knows whether BitsStored or the value is wrong."""
    hu = ct_hu()
    slices = ct_series(hu, bits=12, signed=signed, intercept=0 if signed else -1024)
    np.testing.assert_array_equal(read_scan(write(tmp_path / "plain", slices)).hu, hu)
    for one in slices:
        one.PixelData = (np.frombuffer(one.PixelData, "<u2") & 0x0FFF | 0x5000).tobytes()
    with pytest.raises(ScanError, match=r"stored value \d+, which does not fit its 12 bits \(BitsStored\)"):
        read_scan(write(tmp_path / "beyond", slices))


@pytest.mark.parametrize("how", ["implicit", "big", "deflated", "rle", "JPEG2000", "JPEG", "bare"])
@pytest.mark.parametrize("signed", [False, True])
def test_transfer_syntaxes(tmp_path: Path, how: str, signed: bool) -> None:
    hu = ct_hu()
    slices = [encode(one, how) for one in ct_series(hu, signed=signed)]
    folder = write(tmp_path / "a", slices, "{}" if how == "bare" else "{}.dcm")
    for file in folder.iterdir():
        if how == "bare":
            strip_preamble(file)
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.hu, hu)
    assert scan.geometry.origin_lps_mm == tuple(ORIGIN)


@pytest.mark.parametrize("name", ["jpeg_ls_lossless", "jp2klossless", "RLE", "bigendian", "implicit", "expb"])
def test_files_of_other_tools(tmp_path: Path, name: str) -> None:
    """The files that pydicom ships, three times one above the other; they are one MR, called a CT here."""
    slices = []
    for k in range(3):
        one = pydicom.dcmread(get_testdata_file(f"MR_small_{name}.dcm", download=False))
        one.Modality, one.RescaleSlope, one.RescaleIntercept = "CT", 1, -1024
        one.ImagePositionPatient = [0, 0, 3 * k]
        one.ImageOrientationPatient = [*UPRIGHT]
        slices.append(one)
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array - 1024
    scan = read_scan(write(tmp_path / "a", slices))
    np.testing.assert_array_equal(scan.hu, [expected] * 3)


# --- places ---


@pytest.mark.parametrize("step", [0.25, 1.0, 10.0])
@pytest.mark.parametrize("orientation", [UPRIGHT, PRONE, CORONAL, rotated(20), rotated(35, "x")])
def test_places(tmp_path: Path, orientation: tuple[float, ...], step: float) -> None:
    hu, at = ct_hu(), positions(step=step, orientation=orientation)
    slices = ct_series(hu, at, orientation=orientation)
    for k, one in enumerate(slices):  # neither tells where slices lie
        one.SpacingBetweenSlices, one.InstanceNumber, one.SliceLocation = 0, 100 - k, 0
    assert_read_right(read_scan(write(tmp_path / "a", slices)), hu, at, orientation)


def test_headers_that_are_rounded(tmp_path: Path) -> None:
    """Places to 0.1 mm, and slices turned by 3e-4 against each other."""
    hu, at = ct_hu(), positions(step=0.25).round(1)
    at[0], at[-1] = positions(step=0.25)[[0, -1]]
    slices = ct_series(hu, at)
    slices[2].ImageOrientationPatient = [1, 3e-4, 0, -3e-4, 1, 0]
    scan = read_scan(write(tmp_path / "a", slices))
    np.testing.assert_array_equal(scan.hu, hu)
    assert scan.geometry.spacing_mm_xyz == pytest.approx((0.5, 0.75, 0.25))


# --- several frames in a file ---


@pytest.mark.parametrize("order", [range(6), range(5, -1, -1), [3, 0, 5, 1, 4, 2]])
@pytest.mark.parametrize("orientation", [UPRIGHT, PRONE, CORONAL])
def test_enhanced_ct(tmp_path: Path, order: list[int], orientation: tuple[float, ...]) -> None:
    hu, at = ct_hu(), positions(orientation=orientation)
    slices = ct_series(hu, orientation=orientation)
    for k, one in enumerate(slices):  # each frame has its own rescale
        store(one, hu[k] + 1024 + 24 * k)
        one.RescaleIntercept = -1024 - 24 * k
    folder = tmp_path / "folder"
    folder.mkdir()
    file = save(enhanced(slices, order), folder / "scan.dcm")
    for path in (file, folder):
        scan = read_scan(path)
        assert_read_right(scan, hu, at, orientation)
        assert read_header(path) == scan.geometry
    save(encode(enhanced(slices, order), "rle"), file)
    assert_read_right(read_scan(file), hu, at, orientation)
    file = file.rename(folder / "bare name")
    assert_read_right(read_scan(file), hu, at, orientation)


def test_enhanced_ct_of_highdicom(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    hu = ct_hu()
    slices = ct_series(hu, signed=True, intercept=0)
    for one in slices:
        save(one, tmp_path / "one.dcm")
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
    one = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        slices[::-1],
        series_instance_uid="1.2.8",
        series_number=2,
        sop_instance_uid="1.2.8.1",
        instance_number=1,
    )
    one.save_as(tmp_path / "legacy.dcm")
    assert_read_right(read_scan(tmp_path / "legacy.dcm"), hu, positions())


def test_enhanced_ct_gets_the_checks_of_a_series(tmp_path: Path) -> None:
    slices = ct_series(ct_hu())
    nowhere, lost = enhanced(slices), enhanced(slices)
    del nowhere.PerFrameFunctionalGroupsSequence
    del lost.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    for one, message in (
        (enhanced(slices, [0, 1, 2, 4, 5]), r"missing or not equally spaced: 5\.00 mm from slice 3 to 4"),
        (enhanced([*slices, *slices]), r"duplicate slices at .*scan.dcm.* and scan.dcm frame"),
        (nowhere, "has 6 frames, and no PerFrameFunctionalGroupsSequence"),
        (lost, "frame 4 has no ImagePositionPatient"),
        (slices[0], "is one DICOM slice; a volume needs at least two"),
    ):
        with pytest.raises(ScanError, match=message):
            read_header(save(one, tmp_path / "scan.dcm"))


# --- a folder as archives leave it ---


def test_other_files_beside_the_slices(tmp_path: Path) -> None:
    hu = ct_hu()
    folder = write(tmp_path / "Aufnahme für Ärzte 患者", ct_series(hu), "IM{:04}")
    (folder / "README").write_text("exported 2020")
    (folder / "._IM0001.dcm").write_bytes(b"\0\5\x16\7" + bytes(200))
    (folder / "thumbnails").mkdir()
    (folder / "DONE").touch()
    slice_ = file_of(folder, 6)
    slice_.rename(tmp_path / "elsewhere")
    slice_.symlink_to(tmp_path / "elsewhere")
    shutil.copy(get_testdata_file("DICOMDIR-empty.dcm", download=False), folder / "DICOMDIR")
    shutil.copy(get_testdata_file("test-SR.dcm", download=False), folder / "IM0099")
    shutil.copy(get_testdata_file("rtstruct.dcm", download=False), folder / "structures.dcm")
    shutil.copy(get_testdata_file("rtdose.dcm", download=False), folder / "dose.dcm")
    save(ct_series(hu, series="1.2.99", modality="PT")[0], folder / "pet.dcm")
    np.testing.assert_array_equal(read_scan(folder).hu, hu)
    with pytest.raises(ScanError, match="is of modality RTDOSE, not CT"):
        read_header(folder / "dose.dcm")
    with pytest.raises(ScanError, match="is a DICOM file without an image"):
        read_header(folder / "structures.dcm")
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(ScanError, match=r"IM000\d: cannot be opened: No such file"):
        read_header(folder)


def test_several_series(tmp_path: Path) -> None:
    hu = ct_hu((5, 8, 10))
    write(tmp_path / "a", ct_series(ct_hu((4, 8, 10)), series="1.2.6"), "a{}.dcm")
    folder = write(tmp_path / "a", ct_series(hu), "b{}.dcm")
    with pytest.raises(ScanError, match=r"holds 2 DICOM series.*1\.2\.6 \(CT, 4 files\), 1\.2\.7 \(CT, 5 files\)"):
        read_header(folder)
    np.testing.assert_array_equal(read_scan(folder, "1.2.7").hu, hu)
    with pytest.raises(ScanError, match=r"has no series '1\.2\.9'; it holds 1\.2\.6"):
        read_header(folder, "1.2.9")
    victim = next(folder.glob("a*"))
    victim.write_bytes(victim.read_bytes()[:-20])
    np.testing.assert_array_equal(read_scan(folder, "1.2.7").hu, hu)  # the damage is the other's


def test_rows_of_a_table(tmp_path: Path) -> None:
    """What the remedy column says, and that `any` in a column `modality` reads what says to be no CT."""
    write(tmp_path / "two", ct_series(ct_hu(), series="1.2.6"), "a{}.dcm")
    write(tmp_path / "two", ct_series(ct_hu()), "b{}.dcm")
    write(tmp_path / "mr", ct_series(ct_hu(), modality="MR"))
    point = ",".join(f"{v:g}" for v in ORIGIN)
    write(tmp_path / "ot", ct_series(ct_hu(), modality="OT"))
    rows = [f"two,{point},,CT", f"two,{point},1.2.7,CT", f"mr,{point},,MR", f"ot,{point},,Any", f"none.dcm,{point},,"]
    rows.append("ot,-9.5,20,-50,,")  # of the same scan
    (tmp_path / "a.csv").write_text("\n".join(["image_path,coordX,coordY,coordZ,series_uid,modality", *rows]))
    table = read_annotations(tmp_path / "a.csv")
    usable, rejected = check_annotations(table, on_bad_row="skip")
    assert usable.rows.index.tolist() == [2, 4, 6]
    assert len(set(usable.scans)) == 2
    assert rejected["row"].tolist() == [1, 3, 5]
    two, mr, none = rejected["remedy"]
    assert "series_uid=1.2.6" in two
    assert "modality=any" in mr
    assert "correct the path" in none


# --- real scans ---


def test_real_series_against_pydicom(real_data: Path) -> None:
    folder = real_data / "ct" / "dicom_series"
    scan = read_scan(folder)
    files = sorted(folder.glob("*.dcm"))
    assert scan.geometry.size_xyz == (512, 512, len(files))
    for file in files:
        one = pydicom.dcmread(file)
        position = np.array(one.ImagePositionPatient, dtype=float)
        x, y, z = scan.geometry.to_index_xyz(position)
        k = round(z)
        assert (x, y, z) == pytest.approx((0, 0, k), abs=1e-6)
        np.testing.assert_allclose(scan.geometry.to_lps_mm([0, 0, k]), position, atol=1e-6)
        np.testing.assert_array_equal(scan.hu[k], one.pixel_array * one.RescaleSlope + one.RescaleIntercept)
