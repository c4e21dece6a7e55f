"""The store's files: patches against `numpy.pad`, grids against SimpleITK, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation
from stores import make_store

from fmcib_ssl.data import store_files
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.mining import build_coarse_map
from fmcib_ssl.data.store import Store, StoreError, StoreGrid, StoreSettings, patch_start
from fmcib_ssl.data.store_files import write_scan, write_settings_file
from fmcib_ssl.io import read_sealed_json, write_sealed_json


def random_hu(shape: tuple[int, int, int] = (70, 45, 133), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3000, shape).astype(np.int16)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, scans = tmp_path_factory.mktemp("stores") / "a store, ä", {"one": random_hu(), "two": random_hu(seed=1)}
    return make_store(folder, scans, [("one", 4.0, 5.0, 6.0), ("two", 7.0, 8.0, 9.0)]).path


def test_patches_are_windows_of_the_padded_scan(shared_store: Path) -> None:
    store, hu, margin = Store(shared_store), random_hu(), 60
    padded = np.pad(hu, margin, constant_values=-1024)
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = rng.integers(1, 60, 3)
        start = [int(rng.integers(-margin, n + margin - s + 1)) for n, s in zip(hu.shape, size, strict=True)]
        window = tuple(slice(a + margin, a + margin + s) for a, s in zip(start, size, strict=True))
        patch = store.read_patch("one", start, size.tolist())
        assert patch.dtype == np.int16
        np.testing.assert_array_equal(patch, padded[window])
        patch[:] = 0  # the caller's own
    assert (store.read_patch("one", (1000, 0, 0), (4, 5, 6)) == np.full((4, 5, 6), -1024)).all()
    np.testing.assert_array_equal(store.coarse_map("one").cells, build_coarse_map(hu, 1.0).cells)


@pytest.mark.parametrize("seed", range(8))
def test_a_grid_tiles_its_scan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing, size, origin = rng.uniform(0.4, 6, 3), rng.integers(5, 40, 3), rng.uniform(-500, 500, 3)
    direction = Rotation.random(random_state=rng).as_matrix() if seed % 2 else np.diag([-1.0, 1, -1])[[2, 0, 1]]
    geometry = ScanGeometry.of(size, spacing, origin, direction)
    grid = StoreGrid.of(geometry, 1.3)
    scan, stored = sitk.Image(size.tolist(), sitk.sitkInt16), sitk.Image(grid.shape_zyx[::-1], sitk.sitkInt16)
    scan.SetSpacing(spacing.tolist())
    scan.SetOrigin(origin.tolist())
    scan.SetDirection(direction.ravel().tolist())
    stored.SetSpacing([1.3] * 3)
    stored.SetOrigin(grid.origin_lps_mm)
    indices = rng.uniform(-0.5, size - 0.5, (200, 3))
    points = np.array([scan.TransformContinuousIndexToPhysicalPoint(i.tolist()) for i in indices])
    expected = np.array([stored.TransformPhysicalPointToContinuousIndex(p.tolist()) for p in points])[:, ::-1]
    np.testing.assert_allclose(grid.to_zyx(points), expected, atol=1e-9)
    np.testing.assert_allclose(grid.to_lps_mm(grid.to_zyx(points)), points, atol=1e-9)
    assert (expected > -0.5 - 1e-3).all()  # every point of the scan is in a voxel of the store
    assert (expected < np.array(grid.shape_zyx) - 0.5 + 1e-3).all()
    lowest, highest = geometry.bounds_lps_mm()
    assert (np.array(grid.shape_zyx[::-1]) * 1.3 < highest - lowest + 1.3).all()  # and no layer is to spare
    assert not geometry.contains(grid.to_lps_mm(np.array([-1.0, 0, 0])))


def test_a_patch_starts_so_that_its_middle_voxel_holds_the_point() -> None:
    for center in (0.0, 10.49, 10.5, -0.5, 33.2):
        for size in (49, 50):
            (start, _, _) = patch_start((center, 0, 0), (size, 1, 1))
            assert -0.5 <= center - (start + size // 2) < 0.5


def test_reading_imports_neither_simpleitk_nor_torch(shared_store: Path) -> None:
    code = (
        "import sys; from fmcib_ssl.data.store import Store; s = Store(sys.argv[1]); len(s.lesions); s.grid('one')\n"
        "s.coarse_map('one'); s.read_patch('one', (0, 0, 0), (9, 9, 9))\n"
        "sys.exit(' '.join({'SimpleITK', 'torch', 'monai'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code, str(shared_store)], check=True)


def test_what_is_no_finished_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a store \(it has no store\.json\)"):
        Store(tmp_path)
    folder = make_store(tmp_path / "store", {"one": random_hu((5, 5, 5))}, [("one", 1.0, 1.0, 1.0)]).path
    write_settings_file(folder, StoreSettings(0.75, "bspline"), complete=True)
    assert Store(folder).settings == StoreSettings(0.75, "bspline", -1024)
    write_settings_file(folder, StoreSettings(), complete=False)
    with pytest.raises(StoreError, match="is not complete: run the same"):
        Store(folder)
    write_sealed_json(folder / "store.json", {**read_sealed_json(folder / "store.json"), "version": 99})
    with pytest.raises(StoreError, match="has version 99, this package reads 1"):
        Store(folder)
    with pytest.raises(StoreError, match=r"spacing_mm=0 must be between"):
        StoreSettings(spacing_mm=0)
    with pytest.raises(StoreError, match="interpolation='cubic' is not one of linear, nearest, bspline"):
        StoreSettings(interpolation="cubic")  # type: ignore[arg-type]


def test_a_scan_that_is_written_anew_is_not_finished_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hu = random_hu((5, 5, 5))
    folder = make_store(tmp_path / "store", {"one": hu}, [("one", 1.0, 1.0, 1.0)]).path

    def stop(path: Path, _data: bytes) -> None:
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(store_files, "write_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scan(folder, "one", hu, build_coarse_map(hu, 1.0), {})
    assert not (folder / "scans" / "one.json").exists()
