"""Where negatives come from, against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.mining import LegalCenters, background_centers, body_mask, coarse_grid
from fmcib_ssl.data.scans import crop_patch, read_scan


def chest(shape_zyx: tuple[int, int, int] = (60, 70, 90)) -> tuple[np.ndarray, np.ndarray]:
    """An elliptic trunk with two lungs and a windpipe that opens to the top, on a table; and the trunk."""
    z, y, x = np.indices(shape_zyx)
    cz, cy, cx = (n / 2 for n in shape_zyx)
    trunk = ((y - cy) / (0.3 * cy * 2)) ** 2 + ((x - cx) / (0.4 * cx * 2)) ** 2 < 1
    hu = np.where(trunk, 40, -1000)
    for side in (-1, 1):
        lung = ((y - cy) / (0.18 * cy * 2)) ** 2 + ((x - cx - side * 0.2 * cx * 2) / (0.13 * cx * 2)) ** 2
        hu[(lung + ((z - cz) / (0.4 * cz * 2)) ** 2) < 1] = -850
    hu[(np.abs(x - cx) < 2) & (np.abs(y - cy) < 2) & (z > cz)] = -1000
    hu[:, shape_zyx[1] - 4 : shape_zyx[1] - 2, 5:-5] = 100
    return hu.astype(np.int16), trunk


def test_body_is_the_trunk_with_lungs_and_without_table() -> None:
    hu, trunk = chest()
    body = body_mask(hu)
    union, common = (body | trunk).sum(), (body & trunk).sum()
    assert common / union > 0.97
    assert not body[:, -4:].any()
    assert body_mask(np.full((4, 5, 6), -1000, np.int16)).sum() == 0


@pytest.mark.parametrize("seed", range(8))
def test_coarse_grid_covers_the_scan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    geometry = ScanGeometry((31, 22, 13), (1.1, 0.7, 5.0), (-10.0, 20.0, 30.0), tuple(map(tuple, direction.tolist())))
    grid = coarse_grid(geometry)
    lowest, highest = geometry.bounds_lps_mm()
    first = np.array(grid.origin_lps_mm) - grid.spacing_mm / 2
    np.testing.assert_allclose(first, lowest)
    beyond = first + np.array(grid.size_xyz) * grid.spacing_mm - highest
    assert (beyond >= -1e-9).all()
    assert (beyond < grid.spacing_mm).all()


@pytest.mark.parametrize("extent", [(50.0, 50.0, 50.0), (30.0, 60.0, 18.0)])
def test_legal_cells_by_brute_force(extent: tuple[float, float, float]) -> None:
    """Every cell of a small map: in the body, half the patch in the body, clear of lesions from any place within."""
    hu, _ = chest((40, 36, 44))
    grid = PatchGrid((7.0, -3.0, 12.0), hu.shape, 4.0)
    lesions = np.array([[10.0, 0.0, 40.0], [-60.0, 20.0, -50.0], [500.0, 0.0, 0.0]])
    legal = background_centers(hu, grid, lesions, extent)
    found = np.zeros(hu.shape, bool)
    found.ravel()[legal.cells] = True
    body = body_mask(hu)
    half = [max(0, round((e / 4.0 - 1) / 2)) for e in extent[::-1]]  # cells on each side, z, y, x
    padded = np.pad(body, [(h, h) for h in half])
    for z, y, x in np.ndindex(hu.shape):
        box = padded[z : z + 2 * half[0] + 1, y : y + 2 * half[1] + 1, x : x + 2 * half[2] + 1]
        center = np.array(grid.origin_lps_mm) + 4.0 * np.array([x, y, z])
        clear = all((np.abs(center - lesion) - 2.0 >= extent).any() for lesion in lesions)
        if abs(box.mean() - 0.5) > 1e-4:
            assert found[z, y, x] == (body[z, y, x] and box.mean() > 0.5 and clear)
    assert found.any()
    assert found.sum() < body.sum()


def test_draws_are_uniform_over_cells_and_within_them() -> None:
    grid = PatchGrid((0.0, 0.0, 0.0), (3, 3, 3), 4.0)
    legal = LegalCenters(grid, np.array([0, 13, 26], np.int32))  # one corner, the middle, the other corner
    rng = np.random.default_rng(0)
    draws = np.array([legal.draw(rng) for _ in range(3000)])
    cell = np.rint(draws / 4.0)
    counts = [int((cell == k).all(1).sum()) for k in (-1, 0, 1)]
    assert sum(counts) == 3000
    assert min(counts) > 900
    offsets = draws / 4.0 - cell
    assert np.abs(offsets).max() <= 0.5
    np.testing.assert_allclose(offsets.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(offsets.std(0), 1 / np.sqrt(12), atol=0.02)
    with pytest.raises(ValueError, match="no legal cell"):
        LegalCenters(grid, np.array([], np.int32)).draw(rng)


def test_real_negatives_overlap_no_lesion_and_lie_in_the_body(real_data: Path) -> None:
    for name, lesion in [
        ("lung1_image.nrrd", (-21.859, -120.536, -611.496)),
        ("lung2_image.nrrd", (52.609, -95.868, -256.495)),
    ]:
        scan = read_scan(real_data / "ct" / "lung_tumours" / name)
        grid = coarse_grid(scan.geometry)
        coarse = crop_patch(scan.thinned(4.0), grid)
        others = np.array([lesion, (lesion[0] + 60, lesion[1], lesion[2] - 40)])
        legal = background_centers(coarse, grid, others, (50.0, 50.0, 50.0))
        assert len(legal) > 1000
        # The hull of what is denser than -500 HU, row by row and column by column, in the full scan: not our mask.
        dense = scan.hu[:, ::4, ::4] > -500
        rows = np.maximum.accumulate(dense, 2) & np.maximum.accumulate(dense[:, :, ::-1], 2)[:, :, ::-1]
        columns = np.maximum.accumulate(dense, 1) & np.maximum.accumulate(dense[:, ::-1], 1)[:, ::-1]
        hull = rows & columns
        rng = np.random.default_rng(0)
        for _ in range(500):
            center = np.array(legal.draw(rng))
            box = PatchGrid(tuple(center.tolist()), (50, 50, 50), 1.0)
            first = np.array(box.origin_lps_mm) - 0.5
            for other in others:
                other_first = np.array(PatchGrid(tuple(other.tolist()), (50, 50, 50), 1.0).origin_lps_mm) - 0.5
                assert (np.abs(first - other_first) >= 50).any()
            x, y, z = np.clip(
                np.rint(scan.geometry.to_index_xyz(center)), 0, np.array(scan.geometry.size_xyz) - 1
            ).astype(int)
            near = hull[max(z - 1, 0) : z + 2, max(y // 4 - 2, 0) : y // 4 + 3, max(x // 4 - 2, 0) : x // 4 + 3]
            assert near.any()
            lo = np.clip(scan.geometry.to_index_xyz(first), 0, None).astype(int) // (4, 4, 1)
            hi = np.clip(scan.geometry.to_index_xyz(first + 50), 0, None).astype(int) // (4, 4, 1)
            inside = hull[lo[2] : hi[2] + 1, lo[1] : hi[1] + 1, lo[0] : hi[0] + 1].sum() * np.prod(
                np.array(scan.geometry.spacing_mm_xyz) * (4, 4, 1)
            )
            assert inside / 50**3 > 0.42  # half, to within a cell
