"""Files as converters and hospitals write them: read where nibabel and arithmetic put them, or refused by name."""

from __future__ import annotations

import gzip
import locale
import re
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from odd_images import AFFINE_RAS, MARK, MARK_HU, META_GEOMETRY, SIZE, chest, moved, write_mhd, write_nifti, write_nrrd

from fmcib_ssl.data import scans
from fmcib_ssl.data.annotations import (
    AnnotationsError,
    LesionTable,
    ScanReport,
    check_annotations,
    inspect_scans,
    read_annotations,
)
from fmcib_ssl.data.image_files import Affine
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.data.scans import ScanSource, crop_patch, read_header, read_scan
from fmcib_ssl.data.tables import BadRowsError
from fmcib_ssl.types import ScanError

SHIFTED = moved(AFFINE_RAS, x=15)
SHEARED = moved(AFFINE_RAS, shear=0.3)


def lps(affine_ras: np.ndarray, index: tuple[int, int, int] = MARK) -> np.ndarray:
    return (affine_ras @ [*index, 1])[:3] * (-1, -1, 1)


def assert_at(path: Path, affine_ras: np.ndarray, affine: str | None = None) -> None:
    """The marked voxel is in the middle of the patch cut round its place, and every corner where it should be."""
    scan = read_scan(path, affine=affine)
    assert read_header(path, affine=affine) == scan.geometry
    for index in [(0, 0, 0), (SIZE[0] - 1, 0, SIZE[2] - 1), tuple(n - 1 for n in SIZE)]:
        np.testing.assert_allclose(scan.geometry.to_lps_mm(index), lps(affine_ras, index), atol=2e-3)
    point = tuple(lps(affine_ras).tolist())
    assert crop_patch(scan, point, (9, 9, 9))[4, 4, 4] == pytest.approx(MARK_HU, abs=10)


# --- NIfTI: which transform ---


@pytest.mark.parametrize(
    ("sform", "qform"),
    [
        ((AFFINE_RAS, 1), (AFFINE_RAS, 1)),
        ((AFFINE_RAS, 2), (AFFINE_RAS, 1)),
        ((AFFINE_RAS, 1), None),
        ((AFFINE_RAS, 4), None),
        (None, (AFFINE_RAS, 1)),
        ((moved(AFFINE_RAS, x=0.05), 1), (AFFINE_RAS, 1)),  # rounding, not a contradiction
    ],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_transforms_that_agree(tmp_path: Path, sform: object, qform: object, suffix: str) -> None:
    path = write_nifti(tmp_path / f"a{suffix}", sform=sform, qform=qform)
    expected = nibabel.load(path).affine
    assert_at(path, expected)


CONFLICTS = {
    "sform of code 2": ((SHIFTED, 2), (AFFINE_RAS, 1)),
    "sform of code 4": ((SHIFTED, 4), (AFFINE_RAS, 1)),
    "both of code 1": ((AFFINE_RAS, 1), (SHIFTED, 1)),
    "other slices": ((moved(AFFINE_RAS, z=1.2), 1), (AFFINE_RAS, 1)),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_transforms_that_contradict_each_other(tmp_path: Path, name: str) -> None:
    sform, qform = CONFLICTS[name]
    path = write_nifti(tmp_path / "a.nii.gz", sform=sform, qform=qform)
    corners = [(corner * (np.array(SIZE) - 1)).tolist() for corner in np.array(list(np.ndindex(2, 2, 2)))]
    apart = max(float(np.linalg.norm(lps(sform[0], corner) - lps(qform[0], corner))) for corner in corners)
    message = rf"sform and qform are up to {apart:.1f} mm apart.*column `affine`.*sform or qform"
    for read in (read_header, read_scan):
        with pytest.raises(ScanError, match=message):
            read(path)
    assert_at(path, sform[0], "sform")
    assert_at(path, qform[0], "qform")


@pytest.mark.parametrize("qform", [(AFFINE_RAS, 1), None])
@pytest.mark.parametrize("affine", [None, "sform", "qform"])
def test_a_sheared_sform_whatever_stands_beside_it(tmp_path: Path, qform: object, affine: str | None) -> None:
    """As dcm2niix writes a tilted gantry; the plain qform is 11 mm off at the end of this stack."""
    path = write_nifti(tmp_path / "a.nii.gz", sform=(SHEARED, 1), qform=qform)
    with pytest.raises(ScanError, match=r"sheared \(gantry tilt\?\)|has no qform"):
        read_header(path, affine=affine)


PIXDIM = [1, 0.8, 0.9, 2.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sform": None, "qform": None}, "has no geometry: the codes of its sform and its qform are 0"),
        ({"fields": {"pixdim": [1, 0.8, 0.9, 0, 0, 0, 0, 0]}}, r"has no geometry: pixdim says .*0\.8 x 0\.9 x 0 mm"),
        ({"fields": {"pixdim": [1, 0.8, np.nan, 2.5, 0, 0, 0, 0]}}, "has no geometry"),
        ({"qform": None, "fields": {"pixdim": [1, 1, 1, 1, 0, 0, 0, 0]}}, r"sform and voxel size \(pixdim\) are up to"),
        ({"sform": (AFFINE_RAS * np.nan, 1), "qform": None, "fields": {"pixdim": PIXDIM}}, r"spacing of \(nan"),
    ],
)  # fmt: skip
def test_nifti_without_a_geometry(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", **options)
    for read in (read_header, read_scan):
        with pytest.raises(ScanError, match=message):
            read(path)


def test_a_voxel_size_that_is_wrong_beside_a_chosen_sform(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", qform=None, fields={"pixdim": [1, 1, 1, 1, 0, 0, 0, 0]})
    assert_at(path, AFFINE_RAS, "sform")
    with pytest.raises(ScanError, match=r"has no qform \(its code is 0\)"):
        read_header(path, affine="qform")


@pytest.mark.parametrize(("unit", "mm"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_units(tmp_path: Path, unit: int, mm: float) -> None:
    affine = AFFINE_RAS.copy()
    affine[:3] /= mm
    path = write_nifti(tmp_path / "a.nii", sform=(affine, 1), qform=(affine, 1), fields={"xyzt_units": unit})
    assert_at(path, AFFINE_RAS)


# --- NIfTI: the file ---


def test_names_that_lie_about_gzip(tmp_path: Path) -> None:
    """Not gzipped though it says .gz, and the other way round."""
    data = write_nifti(tmp_path / "plain.nii").read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(data)
    (tmp_path / "zipped.nii").write_bytes(gzip.compress(data))
    for name in ("plain.nii.gz", "zipped.nii"):
        assert_at(tmp_path / name, AFFINE_RAS)


def test_nifti_2_and_big_endian(tmp_path: Path) -> None:
    assert_at(write_nifti(tmp_path / "two.nii.gz", header_class=nibabel.Nifti2Header), AFFINE_RAS)
    assert_at(write_nifti(tmp_path / "big.nii", header_class=lambda: nibabel.Nifti1Header(endianness=">")), AFFINE_RAS)


def test_four_dimensions_of_one_volume(tmp_path: Path) -> None:
    assert_at(write_nifti(tmp_path / "a.nii.gz", chest()[..., None]), AFFINE_RAS)
    with pytest.raises(ScanError, match=r"is a 4D image of size \(20, 24, 16, 2\)"):
        read_header(write_nifti(tmp_path / "b.nii.gz", np.stack([chest(), chest()], axis=-1)))


def test_a_file_that_was_cut_off_and_then_gzipped(tmp_path: Path) -> None:
    data = write_nifti(tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(data[:-500]))
    with pytest.raises(ScanError, match=r"is cut off: \d+ of \d+ bytes"):
        read_header(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("dtype", ["i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, -1024), (0.5, -1000), (0, 7), (np.nan, 0)])
def test_scaling_as_nibabel_has_it(tmp_path: Path, dtype: str, slope: float, intercept: float) -> None:
    stored = chest().astype(np.float64)
    if np.isfinite(slope) and slope:
        stored = np.rint((stored - intercept) / slope)
    stored = np.maximum(stored, 0 if "u" in dtype else -32768).astype(dtype)
    write_nifti(tmp_path / "a.nii", stored, fields={"scl_slope": slope, "scl_inter": intercept})
    expected = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj).astype(np.float64)
    if expected.min() > -50:
        with pytest.raises(ScanError, match="not CT in HU"):
            read_scan(tmp_path / "a.nii")
    else:
        np.testing.assert_allclose(read_scan(tmp_path / "a.nii").hu, expected.transpose(2, 1, 0), atol=1e-3)


# --- other formats ---


def test_nrrd_and_metaimage_at_their_place(tmp_path: Path) -> None:
    assert_at(write_nrrd(tmp_path / "a.nrrd"), AFFINE_RAS)
    ras = {"space": "RAS", "space_origin": "(-30,45,-120)",
           "space_directions": "(0.787846,0.138919,0) (-0.156283,0.886327,0) (0,0,2.5)"}  # fmt: skip
    assert_at(write_nrrd(tmp_path / "ras.nrrd", **ras, space_units='"mm" "mm" "mm"'), AFFINE_RAS)
    assert_at(write_mhd(tmp_path / "a.mhd"), AFFINE_RAS)
    las = {"space": "left-anterior-superior", "space_origin": "(30,45,-120)",
           "space_directions": "(-0.787846,0.138919,0) (0.156283,0.886327,0) (0,0,2.5)"}  # fmt: skip
    assert_at(write_nrrd(tmp_path / "las.nrrd", **las), AFFINE_RAS)
    for names in (("Orientation", "Position", "ElementSize"), ("Rotation", "Origin", "ElementSpacing")):
        fields = dict.fromkeys(META_GEOMETRY) | dict(zip(names, META_GEOMETRY.values(), strict=True))
        assert_at(write_mhd(tmp_path / "b.mhd", **fields), AFFINE_RAS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"space": None, "space_directions": None, "space_origin": None},
            "has no geometry: its header lacks `space`, `space directions`, `space origin`",
        ),
        (
            {"space": None, "space_directions": None, "space_origin": None, "spacings": "0.8 0.9 2.5"},
            "has no geometry: its header lacks",
        ),
        ({"space_origin": None}, "lacks `space origin`"),
        ({"space": "3D-right-handed"}, "does not say left from right"),
        ({"space": None, "dimension": "3\nspace dimension: 3"}, "lacks `space`"),
        ({"space_units": '"cm" "cm" "cm"'}, r"is in 'cm' \(space units\), not in mm"),
    ],
)
def test_nrrd_without_a_geometry(tmp_path: Path, fields: dict[str, str | None], message: str) -> None:
    with pytest.raises(ScanError, match=message):
        read_header(write_nrrd(tmp_path / "a.nrrd", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ElementSpacing": None}, "has no geometry: its header lacks `ElementSpacing`"),
        ({"Offset": None, "TransformMatrix": None}, "lacks `Offset`, `TransformMatrix`"),
        ({"DistanceUnits": "cm"}, "is in 'cm'"),
        ({"TransformMatrix": "1 0 0 0 1 0.3 0 0 1"}, "sheared|orthonormal"),
    ],
)
def test_metaimage_without_a_geometry(tmp_path: Path, fields: dict[str, str | None], message: str) -> None:
    with pytest.raises(ScanError, match=message):
        read_header(write_mhd(tmp_path / "a.mhd", **fields))


def write_pair(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Pair(chest(), AFFINE_RAS), path)
    return path


def write_by_itk(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(chest().T), str(path))
    return path


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.hdr", write_pair, r"is one of a pair of files .*convert it to \.nii\.gz"),
        ("a.img", write_pair, "is one of a pair of files"),
        ("a.tif", write_by_itk, "is a TIFF file, whose geometry is not known to be right; use NIfTI"),
        ("a.vtk", write_by_itk, "is a VTK file"),
        ("a.gipl", write_by_itk, "is a Gipl file"),
    ],
)
def test_formats_that_are_refused_by_name(
    tmp_path: Path, name: str, write: Callable[[Path], Path], message: str
) -> None:
    before = locale.setlocale(locale.LC_ALL)
    with pytest.raises(ScanError, match=message):
        read_header(write(tmp_path / name))
    assert locale.setlocale(locale.LC_ALL) == before  # ITK's reader of VTK changes it


# --- a scan that fails is one scan ---


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("tag"), ValueError("VR UT"), MemoryError()])
def test_whatever_is_raised_rejects_that_scan_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is listed with the library's text; only the user's interrupt stops the others."""
    original = scans.open_nifti

    def failing(path: Path, affine: Affine | None) -> object:
        geometry, read_values = original(path, affine)
        return geometry, fail if path.name.startswith("bad") else read_values

    def fail() -> None:
        raise error

    monkeypatch.setattr(scans, "open_nifti", failing)
    sources = [ScanSource(write_nifti(tmp_path / name)) for name in ("a.nii.gz", "bad.nii.gz")]
    good, bad = inspect_scans(sources, "full").values()
    assert isinstance(good, ScanReport)
    assert isinstance(bad, ScanError) and (str(error) or "more memory") in bad.reason


def test_an_interrupt_is_not_a_bad_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path = write_nifti(tmp_path / "a.nii.gz")
    monkeypatch.setattr(scans, "open_nifti", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_scan(path)


# --- the column `affine` ---


def test_the_column_affine(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", sform=(SHIFTED, 2), qform=(AFFINE_RAS, 1))
    point = ",".join(map(str, lps(SHIFTED)))

    def table(*affines: str) -> LesionTable:
        rows = [f"a.nii.gz,{point},{affine}" for affine in affines]
        (tmp_path / "a.csv").write_text("\n".join(["image_path,coordX,coordY,coordZ,affine", *rows]))
        return read_annotations(tmp_path / "a.csv")

    chosen = table("sform")
    assert chosen.scans == (ScanSource(tmp_path / "a.nii.gz", affine="sform"),)
    assert len(check_annotations(chosen)[0]) == 1
    assert prepare_store(chosen, tmp_path / "store", num_workers=0).num_made == 1
    assert len(set(table("", "SFORM").scans)) == 1  # of one scan, whichever row says it
    with pytest.raises(AnnotationsError, match="say qform, others sform"):
        table("qform", "sform")
    with pytest.raises(AnnotationsError, match=r"column 'affine' has 'best' for .*sform, qform or nothing"):
        table("best")
    with pytest.raises(BadRowsError, match=r"column `affine`"):
        check_annotations(table(""))


# --- values ---


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_few_values_beyond_the_range_are_clipped_and_counted(tmp_path: Path, dtype: type) -> None:
    hu = chest(dtype=dtype)
    hu[6:8, 15, 9] = 70_000, 40_000
    path = write_nifti(tmp_path / "a.nii.gz", hu)
    with pytest.warns(UserWarning, match=r"a\.nii\.gz: 2 voxels above 32767 HU are read as 32767"):
        scan = read_scan(path)
    assert scan.hu.max() == 32767
    assert scan.summary is not None
    assert (scan.summary.num_clipped, scan.summary.hu_max) == (2, 70_000)
    assert crop_patch(scan, lps(AFFINE_RAS).tolist(), (3, 3, 3), 0.5).max() == 32767
    hu[:, :12] = 50_000
    with pytest.raises(ScanError, match=r"50% of it lies above 32767"):
        read_scan(write_nifti(tmp_path / "b.nii.gz", hu))


def disk_padded(hu: np.ndarray, padding: int) -> np.ndarray:
    """With the corners of each slice as scanners fill them."""
    i, j = np.indices(hu.shape[:2])
    outside = np.hypot(i / (hu.shape[0] - 1) - 0.5, j / (hu.shape[1] - 1) - 0.5) > 0.5
    hu = hu.copy()
    hu[outside] = padding
    return hu


def as_mr(hu: np.ndarray) -> np.ndarray:
    """Noise where air is, tissue from 300 to 800, and a few values below 0 from resampling."""
    rng = np.random.default_rng(0)
    signal = np.where(hu < -500, rng.rayleigh(10, hu.shape), 500 + hu + rng.normal(0, 30, hu.shape))
    signal[0, 0, :3] = -80
    return signal


NOT_HU = {
    "stored values, padded": lambda hu: disk_padded(hu + 1024, -2000),
    "HU x 10": lambda hu: hu * 10,
    "inverted": lambda hu: -hu,
    "intercept applied twice": lambda hu: hu - 1024,
    "intercept applied twice and clipped": lambda hu: np.maximum(hu - 1024, -2048),
    "12 bits inverted": lambda hu: 2047 - hu,
    "MR": as_mr,
    "stored values": lambda hu: hu + 1024,
    "a mask": lambda hu: (hu > 0).astype(np.int32),
    "constant": lambda hu: 0 * hu + 7,
    "NaN": lambda hu: np.where(hu == MARK_HU, np.nan, hu),
    "infinite": lambda hu: np.where(hu == MARK_HU, -np.inf, hu),
}
IN_HU = {
    "as it is": lambda hu: hu,
    "padded with -2000": lambda hu: disk_padded(hu, -2000),
    "padded with -3024": lambda hu: disk_padded(hu, -3024),
    "crop of lung": lambda hu: np.where(np.arange(hu.size).reshape(hu.shape) % 200 == 0, -300, -850 + hu % 60),
    "crop of liver": lambda hu: 50 + hu % 30 - (np.arange(hu.size).reshape(hu.shape) % 50 == 0) * 170,
    "crop of bone": lambda hu: np.linspace(-120, 1400, hu.size).reshape(hu.shape),
    "implant": lambda hu: np.where(np.indices(hu.shape)[0] < 4, 3071, hu),
    "noisy air": lambda hu: hu + np.random.default_rng(1).normal(0, 90, hu.shape) * (hu < -900),
}


@pytest.mark.parametrize("name", NOT_HU)
def test_values_that_are_not_hu_wherever_their_peaks_are(tmp_path: Path, name: str) -> None:
    values = NOT_HU[name](chest(dtype=np.int32)).astype(np.float32)
    with pytest.raises(ScanError, match=r"not CT in HU|is constant: every voxel is 7|1 voxels that are NaN or Inf"):
        read_scan(write_nifti(tmp_path / "a.nii.gz", values))


@pytest.mark.parametrize("name", IN_HU)
def test_values_that_are_hu_pass(tmp_path: Path, name: str) -> None:
    values = IN_HU[name](chest(dtype=np.int32)).astype(np.int16)
    np.testing.assert_array_equal(read_scan(write_nifti(tmp_path / "a.nii.gz", values)).hu, values.transpose(2, 1, 0))


def test_every_real_scan_is_in_hu_at_nibabels_place(real_data: Path) -> None:
    """All scans that are NIfTI, and 1 in 8 of the crops: 0 HU and 0 mm from nibabel."""
    files = [
        file for file in sorted((real_data / "ct").rglob("*.nii.gz")) if not re.search("mask|seg|label", file.name)
    ]
    files += sorted((real_data / "lidc_crops" / "image").glob("*"))[::8]
    assert len(files) > 120
    for path in files:
        scan, image = read_scan(path), nibabel.load(path)
        np.testing.assert_array_equal(scan.hu, np.asarray(image.dataobj).T, err_msg=str(path))
        corner = tuple(n - 1 for n in image.shape)
        np.testing.assert_allclose(scan.geometry.to_lps_mm(corner), lps(image.affine, corner), atol=1e-4)
