"""Patches against direct indexing, an independent trilinear sampler, and nibabel's affine."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from odd_images import AXIS_ORIENTATIONS, write_nrrd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.scans import Scan, crop_patch, read_header, read_scan
from fmcib_ssl.types import ScanError


def make_scan(
    rng: np.random.Generator, direction: np.ndarray, spacing: tuple[float, float, float], low: int = -1000
) -> Scan:
    size = tuple(rng.integers(12, 30, 3).tolist())
    origin = tuple(rng.uniform(-300, 300, 3).tolist())
    geometry = ScanGeometry(size, spacing, origin, tuple(map(tuple, direction.tolist())))
    return Scan(rng.integers(low, 1500, size[::-1]).astype(np.int16), geometry)


def affine_lps(geometry: ScanGeometry) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(geometry.direction) @ np.diag(geometry.spacing_mm_xyz)
    matrix[:3, 3] = geometry.origin_lps_mm
    return matrix


def assert_same_patch(
    patch: np.ndarray, scan: Scan, center: np.ndarray, size_zyx: tuple[int, int, int], spacing: float = 1.0
) -> None:
    """Against trilinear values at the patch's points, but where these are too near to the scan's edge to tell."""
    z, y, x = np.indices(size_zyx)
    points = center + (np.stack([x, y, z], -1) - [n // 2 for n in size_zyx[::-1]]) * spacing
    homogeneous = np.concatenate([points, np.ones((*points.shape[:-1], 1))], -1)
    index = np.linalg.solve(affine_lps(scan.geometry), homogeneous.reshape(-1, 4).T)[:3].reshape(3, *size_zyx)
    values = ndimage.map_coordinates(scan.hu.astype(np.float64), index[::-1], order=1, mode="nearest")
    edge = np.array(scan.hu.shape[::-1]).reshape(3, 1, 1, 1) - 0.5
    outside = ((index < -0.5) | (index > edge)).any(axis=0)
    unclear = ((np.abs(index + 0.5) < 1e-6) | (np.abs(index - edge) < 1e-6)).any(axis=0)
    assert patch.dtype == np.int16
    assert patch.shape == size_zyx
    assert unclear.mean() < 0.2
    expected = np.where(outside, -1024, values)
    assert np.abs(patch - expected)[~unclear].max() <= 0.5 + 1e-3  # rounded, not truncated


@pytest.mark.parametrize("orientation", range(48))
def test_marked_voxel_is_in_the_centre(orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    scan = make_scan(rng, AXIS_ORIENTATIONS[orientation], (0.7, 1.9, 4.5))
    size = scan.geometry.size_xyz
    for index in [rng.integers(0, size), np.zeros(3, int), np.array(size) - 1, np.array([0, size[1] - 1, 0])]:
        x, y, z = index
        marked = Scan(scan.hu.copy(), scan.geometry)
        marked.hu[z, y, x] = 3000
        point = scan.geometry.to_lps_mm(index)
        patch = crop_patch(marked, point.tolist(), (9, 10, 11))
        assert patch[4, 5, 5] == 3000
        assert_same_patch(patch, marked, point, (9, 10, 11))


@pytest.mark.parametrize("seed", range(8))
def test_oblique_scans_against_an_independent_sampler(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(0.5, 5, 3).tolist())
    scan = make_scan(rng, Rotation.random(random_state=rng).as_matrix(), spacing)
    center = scan.geometry.to_lps_mm(rng.uniform(-1, np.array(scan.geometry.size_xyz)))
    size, spacing_mm = (14, 13, 12), float(rng.uniform(0.5, 3))
    assert_same_patch(crop_patch(scan, center.tolist(), size, spacing_mm), scan, center, size, spacing_mm)
    assert (crop_patch(scan, (center + 1000).tolist(), size) == -1024).all()


@pytest.mark.parametrize("seed", range(8))
def test_padding_and_tissue_never_mix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction = Rotation.random(random_state=rng).as_matrix() if seed % 2 else AXIS_ORIENTATIONS[rng.integers(48)]
    scan = make_scan(rng, direction, (0.8, 1.1, 5.0), low=500)
    for corner in itertools.product(*((0, n - 1) for n in scan.geometry.size_xyz)):
        patch = crop_patch(scan, scan.geometry.to_lps_mm(corner).tolist(), (20, 20, 20))
        tissue = patch != -1024
        assert tissue.any()
        assert not tissue.all()
        assert patch[tissue].min() >= 500


def test_values_below_padding_are_raised_first_and_large_ones_do_not_wrap() -> None:
    hu = np.full((4, 4, 4), -3000, np.float32)
    hu[:, :, 2:] = 1000.0
    hu[3, 3, 3] = 1e6
    scan = Scan(hu, ScanGeometry((4, 4, 4), (1, 1, 1), (0, 0, 0)))
    assert crop_patch(scan, (1.5, 1, 1), (1, 1, 1)).item() == -12  # halfway from -1024, not from -3000
    assert crop_patch(scan, (3, 3, 3), (1, 1, 1)).item() == 32767


def ct_image(shape: tuple[int, ...] = (8, 10, 12), dtype: type = np.int16) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1500, shape).astype(dtype))
    if image.GetDimension() == 3:
        image.SetSpacing((0.7, 0.8, 3.0))
        image.SetOrigin((-100.5, -200.25, 300.0))
        image.SetDirection((0, -1, 0, 1, 0, 0, 0, 0, 1))
    return image


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_every_format_gives_its_voxels_and_geometry(tmp_path: Path, suffix: str, dtype: type) -> None:
    image = ct_image(dtype=dtype)
    folder = tmp_path / "Aufnahme für Ärzte 患者"
    folder.mkdir()
    path = folder / f"scan 1{suffix}"
    sitk.WriteImage(image, str(path), useCompression=True)
    scan = read_scan(path)
    assert scan.hu.dtype == (np.float32 if dtype is np.float32 else np.int16)
    np.testing.assert_array_equal(scan.hu, sitk.GetArrayFromImage(image))
    assert read_header(path) == scan.geometry
    index = (3, 2, 1)
    np.testing.assert_allclose(
        scan.geometry.to_lps_mm(index), image.TransformIndexToPhysicalPoint(index), atol=1e-4
    )  # NIfTI holds float32


# --- what is refused ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_cut_off_nifti_is_found_by_its_header(tmp_path: Path, suffix: str) -> None:
    """ITK fills the rest with zeros and says nothing."""
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(ct_image(), str(path))
    truncate(path)
    for read in (read_header, read_scan):
        with pytest.raises(ScanError, match=r"is cut off.*copy it again"):
            read(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_cut_off_file_is_found_when_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(ct_image(), str(path), useCompression=suffix == ".nrrd")
    truncate(path.with_suffix(".raw") if suffix == ".mhd" else path)
    assert read_header(path).size_xyz == (12, 10, 8)
    with pytest.raises(ScanError, match=r"cannot be read \(RuntimeError: it is cut off"):
        read_scan(path)


def test_damage_inside_a_gzip_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(ct_image((60, 100, 100)), str(path))
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(damaged))
    with pytest.raises(ScanError, match=r"cut off or damaged"):
        read_scan(path)


def test_gzip_of_several_members_is_in_order(tmp_path: Path) -> None:
    sitk.WriteImage(ct_image(), str(tmp_path / "scan.nii"))
    plain = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(plain[:900]) + gzip.compress(plain[900:]))
    np.testing.assert_array_equal(read_scan(tmp_path / "two.nii.gz").hu, sitk.GetArrayFromImage(ct_image()))


def test_files_that_are_no_scans(tmp_path: Path) -> None:
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "notes.nrrd").write_text("hello")
    sitk.WriteImage(ct_image(), str(tmp_path / "a.mha"))
    (tmp_path / "a.mha").rename(tmp_path / "mha.nii.gz")
    (tmp_path / "folder").mkdir()
    for name, image in {
        "flat.nii.gz": sitk.Image([10, 10], sitk.sitkInt16),
        "slice.mha": sitk.Image([10, 10, 1], sitk.sitkInt16),
        "4d.nii.gz": sitk.Image([10, 10, 10, 3], sitk.sitkInt16),
        "rgb.mha": sitk.Image([10, 10, 10], sitk.sitkVectorUInt8, 3),
    }.items():
        sitk.WriteImage(image, str(tmp_path / name))
    for name, message in {
        "none.nrrd": r"none\.nrrd: cannot be opened: No such file",
        "empty.nii.gz": r"is empty \(0 bytes\)",
        "notes.nrrd": "not what its name says.*NIfTI.*DICOM",
        "mha.nii.gz": "not what its name says",
        "folder": "folder without DICOM slices",
        "flat.nii.gz": r"is a 2D image of size \(10, 10\)",
        "slice.mha": "is a 2D image.*name the folder",
        "4d.nii.gz": "is a 4D image",
        "rgb.mha": "3 values a voxel",
    }.items():
        with pytest.raises(ScanError, match=message):
            read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ("(1,0,0) (1,0,0) (0,0,1)", "singular direction"),
        ("(1,0,0) (0.3,1,0) (0,0,1)", "sheared"),
        ("(1,0,0) (0,1,0) (0,0,1000)", "spacing of .*1000.*between 0.05 and 25"),
        ("(0.001,0,0) (0,0.001,0) (0,0,0.005)", "spacing of .*another unit"),
    ],
)
def test_impossible_geometry(tmp_path: Path, directions: str, message: str) -> None:
    with pytest.raises(ScanError, match=message):
        read_header(write_nrrd(tmp_path / "a.nrrd", space_directions=directions))


# --- real scans ---


def test_real_tumours_are_in_the_centre(real_data: Path) -> None:
    rows = pd.read_csv(real_data / "ct" / "annotations.csv")
    assert len(rows) == 2
    for _, row in rows.iterrows():
        center, size = row[["coordX", "coordY", "coordZ"]].to_numpy(float), (50, 50, 50)
        scan = read_scan(real_data / row["image_path"])
        mask_image = sitk.ReadImage(str(real_data / row["mask_path"]))
        mask_values = (sitk.GetArrayFromImage(mask_image) > 0).astype(np.int16) * 100
        mask = crop_patch(Scan(mask_values, read_header(real_data / row["mask_path"])), center, size, padding_hu=0)
        assert mask[25, 25, 25] >= 50
        assert np.abs(np.array(ndimage.center_of_mass(mask)) - 25).max() < 3  # the patch cuts a large one's rim
        patch = crop_patch(scan, center, size)
        assert patch[mask >= 50].mean() > patch[mask < 50].mean() + 100  # tumour in lung
        assert_same_patch(patch, scan, center, size)
