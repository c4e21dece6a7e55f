"""What a condition does to a patch, against naive readings of the whole scan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from embedded_archive import LESIONS, PATCH_ZYX, Archive, make_archive
from scipy.ndimage import convolve1d
from scipy.stats import norm

from fmcib_ssl.data.store import Store
from fmcib_ssl.evaluation.conditions import CLEAN, CONDITIONS
from fmcib_ssl.evaluation.embedding_sources import SourcePatches, open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTableError
from fmcib_ssl.types import Array, Preprocessing

#: A patch that fits the scans round the lesions of the middle.
SMALL = Preprocessing((4, 6, 6), padding="edge")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive") / "ct")


def opened(
    archive: Archive, condition: str, draw: int = 0, *, cut: Preprocessing = SMALL, **more: Any
) -> SourcePatches:
    return open_patches({**archive.store_source, "condition": {"name": condition, "draw": draw}, **more}, cut)


def volume(archive: Archive, patches: SourcePatches, index: int) -> Array:
    """The whole scan of a lesion, float64."""
    store, scan_id = Store(archive.store), str(patches.lesions["scan_id"][index])
    return store.read_patch(scan_id, (0, 0, 0), store.shapes[scan_id]).astype(np.float64)


def around(hu: Array, center: tuple[int, ...], size: tuple[int, int, int]) -> Array:
    """A patch by one index at a time, the nearest voxel standing outside the scan."""
    axes = [np.clip(np.arange(n) + c - n // 2, 0, m - 1) for n, c, m in zip(size, center, hu.shape, strict=True)]
    return hu[np.ix_(*axes)]


def test_clean_is_the_plain_patch(archive: Archive) -> None:
    plain, clean = open_patches(archive.store_source, SMALL), opened(archive, CLEAN)
    for index in range(len(LESIONS)):
        torch.testing.assert_close(clean.read(index), plain.read(index), rtol=0, atol=0)
    assert plain.fingerprint != clean.fingerprint != opened(archive, CLEAN, 1).fingerprint


@pytest.mark.parametrize("distance_mm", [1, 2, 3, 5])
def test_a_moved_point_reads_its_own_surroundings(archive: Archive, distance_mm: int) -> None:
    """Exactly one voxel of the scan has this patch round it, and it is so far away, to the rounding of a voxel."""
    for draw in range(3):
        moved = opened(archive, f"point moved by {distance_mm} mm", draw)
        for index, (_, center) in enumerate(LESIONS):
            if center in {(2, 3, 4), (22, 28, 30)}:  # at a border: see below
                continue
            hu, patch = volume(archive, moved, index), moved.read(index)[0].numpy()
            middle = patch[tuple(n // 2 for n in patch.shape)]
            places = [tuple(place) for place in np.argwhere(hu == middle)]
            (place,) = (one for one in places if np.array_equal(around(hu, one, patch.shape), patch))
            assert abs(np.linalg.norm(np.subtract(place, center)) - distance_mm) <= np.sqrt(3) / 2


def test_a_point_stays_in_its_scan(archive: Archive) -> None:
    moved = [opened(archive, "point moved by 5 mm", draw) for draw in range(3)]
    for patches in moved:
        index = [center for _, center in LESIONS].index((22, 28, 30))
        hu, patch = volume(archive, patches, index), patches.read(index)[0].numpy()
        assert patch[tuple(n // 2 for n in patch.shape)] in hu[17:, 23:, 25:]


def test_draws_are_replayed_and_follow_from_the_lesion_alone(archive: Archive) -> None:
    everything, one = opened(archive, "noise of 15 HU"), opened(archive, "noise of 15 HU", select={"label": 1})
    rows = [everything.lesions[ID_COLUMN].tolist().index(lesion) for lesion in one.lesions[ID_COLUMN]]
    for index, row in enumerate(rows):
        torch.testing.assert_close(one.read(index), everything.read(row), rtol=0, atol=0)
    first, second = (opened(archive, "point moved by 5 mm", draw) for draw in (0, 1))
    assert any(not torch.equal(first.read(k), second.read(k)) for k in range(len(LESIONS)))


def test_noise_has_its_strength_and_grows_with_it(archive: Archive) -> None:
    clean, weak, strong = (
        torch.stack([opened(archive, name).read(k) for k in range(len(LESIONS))]).double()
        for name in (CLEAN, "noise of 15 HU", "noise of 30 HU")
    )
    np.testing.assert_allclose((weak - clean).std(), 15, rtol=0.1)
    np.testing.assert_allclose(2 * (weak - clean), strong - clean, atol=1.6)  # of rounding


def test_kernels_read_beyond_the_patch(archive: Archive) -> None:
    """Smoothing the whole scan with the normal density over each voxel, and unsharp masking with that."""
    offsets = np.arange(-4, 5)
    kernel = norm.cdf(offsets + 0.5) - norm.cdf(offsets - 0.5)
    smoother, sharper = opened(archive, "smoother kernel"), opened(archive, "sharper kernel")
    for index, (_, center) in enumerate(LESIONS):
        hu = volume(archive, smoother, index)
        blurred = np.pad(hu, 12, mode="edge")
        for axis in range(3):
            blurred = convolve1d(blurred, kernel / kernel.sum(), axis, mode="nearest")
        blurred = blurred[12:-12, 12:-12, 12:-12]
        size = SMALL.patch_size_zyx
        if all(4 <= c < n - 4 for c, n in zip(center, hu.shape, strict=True)):
            np.testing.assert_allclose(smoother.read(index)[0], around(blurred, center, size), atol=0.6)
            np.testing.assert_allclose(sharper.read(index)[0], around(2 * hu - blurred, center, size), atol=0.6)


@pytest.mark.parametrize(("thickness_mm", "spacing_mm"), [(3, 1.0), (5, 1.0), (5, 2.5)])
def test_slices_are_as_thick_as_they_say(thickness_mm: int, spacing_mm: float) -> None:
    """A bright plane becomes one slab of that thickness, read linearly from its centre: a tent of twice its width."""
    change = CONDITIONS[f"slices of {thickness_mm} mm"].change
    assert change is not None
    images = torch.zeros(64, 1, 40, 2, 2)
    images[:, :, 20] = 1000
    lines = torch.cat([change(one[None], torch.tensor([seed]), spacing_mm) for seed, one in enumerate(images)])[:, 0]
    assert (lines == lines[:, :, :1, :1]).all()
    sums = lines[:, :, 0, 0].sum(1)
    np.testing.assert_allclose(sums.mean(), 1000, rtol=0.05)  # a mean conserves HU, whatever the phase
    extent_mm = (lines[:, :, 0, 0] > 1).sum(1).float() * spacing_mm
    assert 1.2 * thickness_mm < extent_mm.mean() <= 3 * thickness_mm
    np.testing.assert_allclose(lines.amax((1, 2, 3)).mean(), 1000 * spacing_mm / thickness_mm, rtol=0.25)


def test_controls_destroy_what_they_say(archive: Archive) -> None:
    cut = Preprocessing(PATCH_ZYX, padding="edge")
    clean, shuffled, removed = (opened(archive, n, cut=cut) for n in (CLEAN, "voxels shuffled", "lesion removed"))
    axes = np.meshgrid(*(np.arange(n) - n // 2 for n in PATCH_ZYX), indexing="ij")
    inside = np.linalg.norm(axes, axis=0) < 0.75 * 14 / 2
    for index in range(len(LESIONS)):
        before, mixed, filled = (patches.read(index)[0].numpy() for patches in (clean, shuffled, removed))
        np.testing.assert_array_equal(np.sort(mixed, axis=None), np.sort(before, axis=None))
        assert np.mean(mixed == before) < 0.1
        np.testing.assert_array_equal(filled[~inside], before[~inside])
        assert np.isin(filled[inside], before[~inside]).all()
        assert np.mean(filled[inside] == before[inside]) < 0.1


def test_an_unknown_condition_is_refused(archive: Archive) -> None:
    with pytest.raises(FeatureTableError, match="condition 'fog' is not one of clean, point moved by 1 mm"):
        opened(archive, "fog")
