"""Patches against direct indexing, an independent trilinear sampler, and nibabel's affine."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry, ras_to_lps
from fmcib_ssl.data.scans import Scan, crop_patch, read_header, read_scan
from fmcib_ssl.types import ScanError

AXIS_ORIENTATIONS = [
    np.eye(3)[:, list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


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


def sample(hu: np.ndarray, affine: np.ndarray, grid: PatchGrid, padding: int = -1024) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear values on a grid, and which of them are too near to the edge of the scan to tell in from out."""
    z, y, x = np.indices(grid.size_zyx)
    offset = np.stack([x, y, z], -1) - np.array([n // 2 for n in grid.size_xyz])
    points = np.array(grid.center_lps_mm) + offset * grid.spacing_mm
    homogeneous = np.concatenate([points, np.ones((*points.shape[:-1], 1))], -1)
    index = np.linalg.solve(affine, homogeneous.reshape(-1, 4).T)[:3].reshape(3, *grid.size_zyx)
    values = ndimage.map_coordinates(hu.astype(np.float64), index[::-1], order=1, mode="nearest")
    edge = np.array(hu.shape[::-1]).reshape(3, 1, 1, 1) - 0.5
    outside = ((index < -0.5) | (index > edge)).any(axis=0)
    unclear = ((np.abs(index + 0.5) < 1e-6) | (np.abs(index - edge) < 1e-6)).any(axis=0)
    return np.where(outside, padding, values), unclear


def assert_same_patch(patch: np.ndarray, hu: np.ndarray, affine: np.ndarray, grid: PatchGrid) -> None:
    expected, unclear = sample(hu, affine, grid)
    assert patch.dtype == np.int16
    assert patch.shape == grid.size_zyx
    assert unclear.mean() < 0.2
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
        grid = PatchGrid(tuple(scan.geometry.to_lps_mm(index).tolist()), (9, 10, 11), 1.0)
        patch = crop_patch(marked, grid)
        assert patch[4, 5, 5] == 3000
        assert_same_patch(patch, marked.hu, affine_lps(scan.geometry), grid)


@pytest.mark.parametrize("orientation", range(48))
def test_where_the_grids_coincide_a_patch_is_the_array(orientation: int) -> None:
    """The oracle is transposing and flipping the array by hand."""
    direction = AXIS_ORIENTATIONS[orientation]
    scan = make_scan(np.random.default_rng(orientation), direction, (1.0, 1.0, 1.0))
    axis_of_lps = [int(np.flatnonzero(direction[k])[0]) for k in range(3)]  # index axis that runs along x, y, z
    upright = scan.hu.transpose([2 - axis_of_lps[k] for k in (2, 1, 0)])
    flips = tuple(a for a, k in enumerate((2, 1, 0)) if direction[k, axis_of_lps[k]] < 0)
    upright = np.pad(np.flip(upright, flips), 6, constant_values=-1024)
    for place in [(5, 6, 7), (0, 0, 0), (3, 11, 1)]:  # x, y, z from the corner that is lowest in LPS
        lowest = scan.geometry.bounds_lps_mm()[0] + 0.5
        patch = crop_patch(scan, PatchGrid(tuple((lowest + place).tolist()), (12, 12, 12), 1.0))
        x, y, z = place
        np.testing.assert_array_equal(patch, upright[z : z + 12, y : y + 12, x : x + 12])


@pytest.mark.parametrize("seed", range(8))
def test_oblique_scans_against_an_independent_sampler(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(0.5, 5, 3).tolist())
    scan = make_scan(rng, Rotation.random(random_state=rng).as_matrix(), spacing)
    center = scan.geometry.to_lps_mm(rng.uniform(-1, np.array(scan.geometry.size_xyz)))
    grid = PatchGrid(tuple(center.tolist()), (14, 13, 12), float(rng.uniform(0.5, 3)))
    patch = crop_patch(scan, grid)
    assert_same_patch(patch, scan.hu, affine_lps(scan.geometry), grid)
    far = PatchGrid(tuple((center + 1000).tolist()), grid.size_zyx, 1.0)
    np.testing.assert_array_equal(crop_patch(scan, far), np.full(grid.size_zyx, -1024))


@pytest.mark.parametrize("seed", range(8))
def test_padding_and_tissue_never_mix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction = Rotation.random(random_state=rng).as_matrix() if seed % 2 else AXIS_ORIENTATIONS[rng.integers(48)]
    scan = make_scan(rng, direction, (0.8, 1.1, 5.0), low=500)
    for corner in itertools.product(*((0, n - 1) for n in scan.geometry.size_xyz)):
        patch = crop_patch(scan, PatchGrid(tuple(scan.geometry.to_lps_mm(corner).tolist()), (20, 20, 20), 1.0))
        tissue = patch != -1024
        assert tissue.any()
        assert not tissue.all()
        assert patch[tissue].min() >= 500


def test_values_below_padding_are_raised_first_and_large_ones_do_not_wrap() -> None:
    hu = np.full((4, 4, 4), -3000, np.float32)
    hu[:, :, 2:] = 1000.0
    hu[3, 3, 3] = 1e6
    scan = Scan(hu, ScanGeometry((4, 4, 4), (1, 1, 1), (0, 0, 0)))
    assert crop_patch(scan, PatchGrid((1.5, 1, 1), (1, 1, 1), 1.0)).item() == -12  # halfway from -1024, not from -3000
    assert crop_patch(scan, PatchGrid((3, 3, 3), (1, 1, 1), 1.0)).item() == 32767


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


@pytest.mark.parametrize("orientation", range(0, 48, 5))
def test_nifti_agrees_with_nibabels_affine(tmp_path: Path, orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    matrix = np.eye(4)
    matrix[:3, :3] = AXIS_ORIENTATIONS[orientation] @ np.diag([0.75, 1.5, 4.0])
    matrix[:3, 3] = rng.uniform(-200, 200, 3).round(1)
    voxels = rng.integers(-1000, 1000, (14, 15, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, matrix), tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(scan.hu, voxels.transpose(2, 1, 0))
    index = np.array([3, 9, 11])
    expected_ras = matrix @ [*index, 1]
    np.testing.assert_allclose(scan.geometry.to_lps_mm(index), ras_to_lps(expected_ras[:3]), atol=1e-4)


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
    with pytest.raises(ScanError, match=r"cannot be decoded: it is cut off"):
        read_scan(path)


def test_damage_inside_a_gzip_is_found_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(ct_image((60, 100, 100)), str(path))
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(damaged))
    with pytest.raises(ScanError, match=r"cut off or damaged"):
        read_scan(path)


def test_gzip_of_several_members_is_in_order(tmp_path: Path) -> None:
    import gzip

    sitk.WriteImage(ct_image(), str(tmp_path / "scan.nii"))
    plain = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(plain[:900]) + gzip.compress(plain[900:]))
    np.testing.assert_array_equal(read_scan(tmp_path / "two.nii.gz").hu, sitk.GetArrayFromImage(ct_image()))


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"none\.nrrd: cannot be opened: No such file"):
        read_header(tmp_path / "none.nrrd")
    (tmp_path / "empty.nii.gz").touch()
    with pytest.raises(ScanError, match=r"is empty \(0 bytes\)"):
        read_header(tmp_path / "empty.nii.gz")
    (tmp_path / "notes.nrrd").write_text("hello")
    with pytest.raises(ScanError, match=r"not what its name says.*NIfTI.*DICOM"):
        read_header(tmp_path / "notes.nrrd")
    sitk.WriteImage(ct_image(), str(tmp_path / "a.mha"))
    (tmp_path / "a.mha").rename(tmp_path / "a.nii.gz")
    with pytest.raises(ScanError, match=r"not what its name says"):
        read_header(tmp_path / "a.nii.gz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ScanError, match=r"folder without DICOM slices"):
        read_header(tmp_path / "folder")


def test_not_a_volume(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Image([10, 10], sitk.sitkInt16), str(tmp_path / "flat.nii.gz"))
    with pytest.raises(ScanError, match=r"is a 2D image of size \(10, 10\)"):
        read_header(tmp_path / "flat.nii.gz")
    sitk.WriteImage(sitk.Image([10, 10, 1], sitk.sitkInt16), str(tmp_path / "slice.mha"))
    with pytest.raises(ScanError, match=r"is a 2D image.*name the folder"):
        read_header(tmp_path / "slice.mha")
    sitk.WriteImage(sitk.Image([10, 10, 10, 3], sitk.sitkInt16), str(tmp_path / "4d.nii.gz"))
    with pytest.raises(ScanError, match=r"is a 4D image"):
        read_header(tmp_path / "4d.nii.gz")
    sitk.WriteImage(sitk.Image([10, 10, 10], sitk.sitkVectorUInt8, 3), str(tmp_path / "rgb.mha"))
    with pytest.raises(ScanError, match=r"3 values a voxel"):
        read_header(tmp_path / "rgb.mha")


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (7, 7, "is constant: every voxel is 7"),
        (0, 4095, "values from 0 to 4095, which is not CT in HU.*rescale"),
        (-3, 3, "not CT in HU"),
    ],
)
def test_values_that_are_not_hu(tmp_path: Path, low: int, high: int, message: str) -> None:
    values = np.full((5, 6, 7), low, np.int16)
    values[1:3] = high
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nrrd"))
    with pytest.raises(ScanError, match=message):
        read_scan(tmp_path / "a.nrrd")


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
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 4 4\n"
        f"space directions: {directions}\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
        "space origin: (0,0,0)\n\n"
    )
    voxels = np.arange(-640, 640, 20, dtype="<i2")
    (tmp_path / "a.nrrd").write_bytes(header.encode() + voxels.tobytes())
    with pytest.raises(ScanError, match=message):
        read_header(tmp_path / "a.nrrd")


# --- real scans ---


def test_real_tumours_are_in_the_centre(real_data: Path) -> None:
    import csv

    with (real_data / "ct" / "annotations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        center = tuple(float(row[f"coord{axis}"]) for axis in "XYZ")
        grid = PatchGrid(center, (50, 50, 50), 1.0)
        scan = read_scan(real_data / row["image_path"])
        mask_image = sitk.ReadImage(str(real_data / row["mask_path"]))
        mask = Scan(
            (sitk.GetArrayFromImage(mask_image) > 0).astype(np.int16) * 100, read_header(real_data / row["mask_path"])
        )
        mask_patch = crop_patch(mask, grid, padding_hu=0)
        assert mask_patch[25, 25, 25] >= 50
        centroid = np.array(ndimage.center_of_mass(mask_patch))
        assert np.abs(centroid - 25).max() < 3  # a tumour larger than the patch loses a part of its rim
        patch = crop_patch(scan, grid)
        assert patch[mask_patch >= 50].mean() > patch[mask_patch < 50].mean() + 100  # tumour in lung
        assert_same_patch(patch, scan.hu, affine_lps(scan.geometry), grid)
