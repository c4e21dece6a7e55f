"""The coarse map against plain loops over voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmcib_ssl.data.mining import CoarseMap, build_coarse_map


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
    body = build_coarse_map(hu, 4.0).body  # a voxel is a cell
    union, common = (body | trunk).sum(), (body & trunk).sum()
    assert common / union > 0.97
    assert not body[:, -4:].any()
    assert not build_coarse_map(np.full((4, 5, 6), -1000, np.int16), 4.0).body.any()


@pytest.mark.parametrize(("spacing_mm", "edge"), [(1.0, 4), (0.7, 6), (1.5, 3), (2.0, 2), (3.0, 1), (10.0, 1)])
@pytest.mark.parametrize("shape", [(13, 24, 17), (3, 5, 40)])
def test_tissue_by_brute_force(spacing_mm: float, edge: int, shape: tuple[int, int, int]) -> None:
    hu = np.random.default_rng(0).normal(-200, 700, shape).astype(np.int16)
    result = build_coarse_map(hu, spacing_mm)
    assert result.voxels_per_cell == edge
    assert result.cells.shape == tuple(-(-n // edge) for n in shape)
    raised = np.maximum(hu, -1024).astype(float)
    for cell in np.ndindex(result.cells.shape):
        window = raised[tuple(slice(max(0, (c - 1) * edge), (c + 2) * edge) for c in cell)]
        assert abs(result.cells[cell]["mean_hu"] - window.mean()) <= 0.51
        assert abs(result.cells[cell]["spread_hu"] - window.std()) <= 0.6


def test_body_and_tissue_at_a_voxel() -> None:
    hu, trunk = chest((80, 100, 120))
    hu[30:50, 40:60, 40:60] = 400  # a cube of 20 voxels
    coarse = build_coarse_map(hu, 1.0)
    upsampled = coarse.body.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    assert (upsampled & trunk).sum() / (upsampled | trunk).sum() > 0.8  # to within a cell all round
    assert coarse.body_volume_ml == pytest.approx(upsampled.sum() / 1000)
    assert coarse.tissue_at((5.0, 5.0, 5.0)).tolist() == [-1000, 0]
    assert coarse.tissue_at((41.6, 49.6, 50)).tolist() == [400, 0]
    assert coarse.tissue_at((99.0, -3.0, 5.0)).tolist() == [-1000, 0]  # at the nearest edge


def test_a_file_holds_the_map(tmp_path: Path) -> None:
    coarse = build_coarse_map(chest()[0], 1.3)
    path = tmp_path / "map.cells"
    path.write_bytes(coarse.to_bytes())
    again, _ = CoarseMap.open(path)
    np.testing.assert_array_equal(again.cells, coarse.cells)
    assert (again.shape_zyx, again.spacing_mm) == (coarse.shape_zyx, coarse.spacing_mm) == ((60, 70, 90), 1.3)
    assert not again.cells.flags.writeable

    for damaged in (b"", b"not a map" * 9, coarse.to_bytes()[:-7], coarse.to_bytes()[:20]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            CoarseMap.open(path)
