"""Where negatives come from, against brute force and the distribution that is promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from fmcib_ssl.data import mining
from fmcib_ssl.data.mining import (
    Background,
    CoarseMap,
    Hard,
    MiningStrategy,
    Near,
    NegativeQuery,
    Uniform,
    build_coarse_map,
)
from fmcib_ssl.data.scans import crop_patch, read_scan
from fmcib_ssl.data.store import StoreGrid

LESIONS = np.array([[40, 45, 60], [70, 60, 30], [5, 5, 5]])
PATCH = (24, 16, 20)


def trunk(shape_zyx: tuple[int, int, int] = (90, 102, 121), spacing_mm: float = 1.0) -> CoarseMap:
    """A noisy elliptic cylinder in air, denser towards the top; the last cells of y and x are cut off."""
    z, y, x = np.indices(shape_zyx)
    inside = ((y / shape_zyx[1] - 0.5) / 0.4) ** 2 + ((x / shape_zyx[2] - 0.5) / 0.45) ** 2 < 1
    noise = np.random.default_rng(0).integers(-30, 30, shape_zyx)
    return build_coarse_map(np.where(inside, 4 * z - 100 + noise, -1000).astype(np.int16), spacing_mm)


def query_of(coarse: CoarseMap, lesions: np.ndarray = LESIONS, patch: tuple[int, ...] = PATCH) -> NegativeQuery:
    return NegativeQuery(coarse, patch, lesions, lesions[0], coarse.tissue_at(lesions[0]))


def legal_by_brute_force(query: NegativeQuery, inner_mm: float = 0, outer_mm: float = np.inf) -> set[tuple[int, ...]]:
    """Cells in the body with a half-body window, none of whose voxels centres a patch that meets a lesion's."""
    coarse, size = query.coarse, np.array(query.patch_size_zyx)
    edge = coarse.voxels_per_cell
    forbidden = np.zeros(np.array(coarse.cells.shape) * edge, bool)  # centres of overlapping patches; all cells whole
    for lesion in query.lesions_zyx:
        forbidden[tuple(slice(max(0, c - n + 1), max(0, c + n)) for c, n in zip(lesion, size, strict=True))] = True
    half = [max(0, round((n / edge - 1) / 2)) for n in size.tolist()]
    padded = np.pad(coarse.body, [(h, h) for h in half])
    legal = set()
    for cell in np.ndindex(coarse.cells.shape):
        window = padded[tuple(slice(c, c + 2 * h + 1) for c, h in zip(cell, half, strict=True))]
        voxels = tuple(slice(c * edge, (c + 1) * edge) for c in cell)
        middle = np.array(cell) * edge + (edge - 1) / 2
        distance = np.linalg.norm(middle - query.lesion_zyx) * coarse.spacing_mm
        if (
            coarse.body[cell]
            and window.mean() > 0.5
            and not forbidden[voxels].any()
            and inner_mm <= distance <= outer_mm
        ):
            legal.add(cell)
    return legal


@pytest.mark.parametrize("patch", [PATCH, (36, 50, 50), (4, 60, 4)])
@pytest.mark.parametrize("spacing_mm", [1.0, 1.4])
def test_legal_cells_by_brute_force(patch: tuple[int, ...], spacing_mm: float) -> None:
    query = query_of(trunk(spacing_mm=spacing_mm), patch=patch)
    legal = Background().legal_cells(query)
    expected = legal_by_brute_force(query)
    assert {tuple(cell) for cell in legal.tolist()} == expected
    assert all(query.is_half_body(cell) for cell in legal)
    assert 0 < len(expected) < query.coarse.body.sum()
    near = Near(inner_mm=25, outer_mm=60)
    assert {tuple(cell) for cell in near.legal_cells(query).tolist()} == legal_by_brute_force(query, 25, 60)


@pytest.mark.parametrize("strategy", [Background(), Near(20, 45)])
@pytest.mark.parametrize("proposals", [64, 0], ids=["few cells", "whole map"])
def test_draws_are_uniform_over_legal_cells_and_within_them(
    strategy: Background, proposals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "PROPOSALS_PER_NEGATIVE", proposals)
    query = query_of(trunk((60, 50, 54)), np.array([[30, 25, 27]]), (12, 12, 12))
    legal = strategy.legal_cells(query)
    assert len(legal) > 200
    rng = np.random.default_rng(1)
    searches = []
    search = Background.legal_cells
    monkeypatch.setattr(Background, "legal_cells", lambda *a: [searches.append(1), search(*a)][1])
    num_draws = len(legal) * 2
    draws = np.concatenate([strategy.draw(query, 10, rng) for _ in range(num_draws)])
    assert len(searches) < 0.02 * num_draws if proposals else len(searches) == num_draws
    counts = Counter(map(tuple, (draws // 4).tolist()))
    assert set(counts) <= {tuple(cell) for cell in legal.tolist()}
    observed = [counts[tuple(cell)] for cell in legal.tolist()]
    assert chisquare(observed).pvalue > 1e-3
    inner = draws[(draws < 48).all(1)]  # in cells that are whole
    assert chisquare(np.bincount((inner % 4) @ [16, 4, 1], minlength=64)).pvalue > 1e-3


@pytest.mark.parametrize("strategy", [Background(), Near(), Hard()])
def test_no_voxel_is_shared_with_a_lesions_patch(strategy: MiningStrategy) -> None:
    coarse = trunk()
    query = query_of(coarse)
    lesion_voxels = np.zeros(coarse.shape_zyx, bool)

    def box(center: np.ndarray) -> tuple[slice, ...]:
        return tuple(
            slice(max(0, c - n // 2), max(0, c - n // 2 + n)) for c, n in zip(center.tolist(), PATCH, strict=True)
        )

    for lesion in LESIONS:
        lesion_voxels[box(lesion)] = True
    rng = np.random.default_rng(0)
    centers = np.concatenate([strategy.draw(query, 5, rng) for _ in range(100)])
    assert centers.shape == (500, 3)
    assert ((centers >= 0) & (centers < coarse.shape_zyx)).all()
    assert not any(lesion_voxels[box(center)].any() for center in centers)


def test_a_place_is_found_if_there_is_one_cell() -> None:
    coarse = trunk()
    query = query_of(coarse, np.concatenate([LESIONS, [[80, 20, 20], [80, 80, 90]]]), (36, 50, 50))
    legal = {tuple(cell) for cell in Background().legal_cells(query).tolist()}
    assert 0 < len(legal) < 100  # of 17,000: proposals fail, the search does not
    rng = np.random.default_rng(0)
    for strategy in (Background(), Hard()):
        for _ in range(20):
            assert tuple((strategy.draw(query, 1, rng)[0] // 4).tolist()) in legal
    crowded = query_of(coarse, np.array([[45, 50, 60]]), (90, 102, 121))
    assert Background().draw(crowded, 1, rng) is None
    assert Near(300, 400).draw(query, 1, rng) is None


def test_near_in_a_scan_without_the_lesion_is_background() -> None:
    coarse = trunk()
    elsewhere = NegativeQuery(coarse, PATCH, LESIONS, None, np.array([0.0, 0.0]))
    for seed in range(5):
        drawn = [s.draw(elsewhere, 3, np.random.default_rng(seed)) for s in (Near(300, 400), Background())]
        np.testing.assert_array_equal(drawn[0], drawn[1])


def test_hard_is_the_most_similar_of_its_candidates() -> None:
    query = query_of(trunk())
    legal = Background().legal_cells(query)
    cells = query.coarse.cells[tuple(legal.T)]
    mean, spread = query.tissue_hu
    distance = np.sqrt((cells["mean_hu"] - mean) ** 2.0 + (cells["spread_hu"] - spread) ** 2.0)

    def median_distance(num_candidates: int) -> float:
        drawn = Hard(num_candidates).draw(query, 1, np.random.default_rng(0))
        draws = np.concatenate([Hard(num_candidates).draw(query, 1, np.random.default_rng(s)) for s in range(60)])
        np.testing.assert_array_equal(drawn, draws[:1])
        chosen = query.coarse.cells[tuple((draws // 4).T)]
        return float(np.median(np.hypot(chosen["mean_hu"] - mean, chosen["spread_hu"] - spread)))

    medians = [median_distance(n) for n in (1, 16, 256, 4096)]
    assert sorted(medians, reverse=True) == medians
    assert abs(medians[0] - np.median(distance)) < 0.3 * np.median(distance)  # of one, none is chosen
    assert medians[3] <= np.quantile(distance, 0.01)
    best = Hard(30_000).draw(query, 1, np.random.default_rng(0))[0] // 4  # every cell is among them, many times over
    assert distance[(legal == best).all(1)] == distance.min()


def test_uniform_is_anywhere_with_the_patch_inside() -> None:
    coarse = trunk((30, 18, 20))
    query = query_of(coarse, np.array([[15, 9, 10]]), (28, 16, 19))
    draws = Uniform().draw(query, 4000, np.random.default_rng(0))
    starts = draws - np.array([14, 8, 9])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [30 - 28, 18 - 16, 20 - 19]
    assert chisquare(np.bincount(starts @ [6, 2, 1], minlength=18)).pvalue > 1e-3
    short = Uniform().draw(query_of(coarse, patch=(31, 5, 40)), 500, np.random.default_rng(0))
    assert short[:, 0].min() == 0
    assert short[:, 0].max() == 29  # longer than the scan: centred anywhere in it


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="inner_mm=50, outer_mm=50"):
        Near(50, 50)
    with pytest.raises(ValueError, match="num_candidates=0"):
        Hard(0)


def test_real_negatives_overlap_no_lesion_and_lie_in_the_body(real_data: Path) -> None:
    for name, lesion in [
        ("lung1_image.nrrd", (-21.859, -120.536, -611.496)),
        ("lung2_image.nrrd", (52.609, -95.868, -256.495)),
    ]:
        scan = read_scan(real_data / "ct" / "lung_tumours" / name)
        covering = StoreGrid.of(scan.geometry, 2.0)
        middle = covering.to_lps_mm(np.array(covering.shape_zyx) // 2)
        coarse = build_coarse_map(crop_patch(scan, middle.tolist(), covering.shape_zyx, 2.0), 2.0)
        origin = np.array(covering.origin_lps_mm)
        others_lps = np.array([lesion, (lesion[0] + 60, lesion[1], lesion[2] - 40)])
        others = ((others_lps - origin) / 2.0)[:, ::-1]
        of_lesion = NegativeQuery(coarse, (25, 25, 25), others, others[0], coarse.tissue_at(others[0]))
        # The hull of what is denser than -500 HU, row by row and column by column, in the full scan: not our mask.
        dense = scan.hu[:, ::4, ::4] > -500
        rows = np.maximum.accumulate(dense, 2) & np.maximum.accumulate(dense[:, :, ::-1], 2)[:, :, ::-1]
        columns = np.maximum.accumulate(dense, 1) & np.maximum.accumulate(dense[:, ::-1], 1)[:, ::-1]
        hull, voxel_mm3 = rows & columns, np.prod(np.array(scan.geometry.spacing_mm_xyz) * (4, 4, 1))
        for strategy in (Background(), Near(), Hard()):
            draws = [strategy.draw(of_lesion, 1, np.random.default_rng(seed))[0] for seed in range(150)]
            for center in np.array(draws)[:, ::-1] * 2.0 + origin:
                assert (np.abs(center - others_lps) >= 50).any(axis=1).all()
                corners = [scan.geometry.to_index_xyz(center + edge).clip(0) // (4, 4, 1) for edge in (-25, 25)]
                (x0, y0, z0), (x1, y1, z1) = np.array(corners).astype(int).tolist()
                inside = hull[z0 : z1 + 1, y0 : y1 + 1, x0 : x1 + 1].sum() * voxel_mm3
                assert inside / 50**3 > 0.42  # half, to within a cell
                if isinstance(strategy, Near):
                    assert 46 <= np.linalg.norm(center - others_lps[0]) <= 104  # to within half a cell
