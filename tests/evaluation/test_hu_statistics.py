"""Hand-made statistics against numpy and scipy on single patches."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_gradient_magnitude, gaussian_laplace

from fmcib_ssl.evaluation.hu_statistics import hu_statistics, statistic_names

NAMES = statistic_names()
PATCHES = np.random.default_rng(0).integers(-1200, 500, size=(3, 1, 9, 17, 17)).astype(np.int16)


def radius_of(shape: tuple[int, ...]) -> np.ndarray:
    z, y, x = np.indices(shape)
    return np.sqrt((z - shape[0] // 2) ** 2 + (y - shape[1] // 2) ** 2 + (x - shape[2] // 2) ** 2)


def test_every_number_has_a_name() -> None:
    values = hu_statistics(PATCHES)
    assert values.shape == (3, 230) == (3, len(set(NAMES)))
    assert values.dtype == np.float32


@pytest.mark.parametrize("row", range(3))
def test_against_scipy(row: int) -> None:
    values = dict(zip(NAMES, hu_statistics(PATCHES)[row], strict=True))
    hu = np.clip(PATCHES[row, 0].astype(np.float32), -1000, 300)
    radius = radius_of(hu.shape)
    shell = (radius >= 3.5) & (radius < 5)
    for image, filtered in (
        ("intensity", hu),
        ("gradient", gaussian_gradient_magnitude(hu, 1.0)),
        ("laplacian", gaussian_laplace(hu, 1.0)),
    ):
        inside = filtered[shell]
        expected = [inside.mean(), inside.std(), np.percentile(inside, 95)]
        found = [values[f"{image} {name}, 3.5 to 5 mm"] for name in ("mean", "standard deviation", "p95")]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
    weights = np.exp(-(radius**2) / (2 * 3**2))
    expected = weights[(hu >= -150) & (hu < -100)].sum() / weights.sum()
    np.testing.assert_allclose(values["share of -150 to -100 HU, sigma 3 mm"], expected, rtol=1e-5)


def test_millimetres_not_voxels() -> None:
    """A smooth object sampled twice as finely along z has about the same numbers."""
    z, y, x = np.indices((33, 33, 33)) - 16
    fine = (-400 + 300 * np.exp(-((z / 2) ** 2 + y**2 + x**2) / 50))[None, None]
    coarse = fine[:, :, ::2]
    values, same = hu_statistics(fine, (0.5, 1, 1)), hu_statistics(coarse)
    of_shells = slice(0, 126)
    np.testing.assert_allclose(values[:, of_shells], same[:, of_shells], atol=0.1 * np.ptp(fine))
    assert np.corrcoef(values[0, of_shells], same[0, of_shells])[0, 1] > 0.999


def test_a_shell_that_is_outside_has_the_numbers_of_the_one_inside() -> None:
    small = PATCHES[:, :, 3:6, 6:11, 6:11]  # its corner is 3 mm from the center
    values = hu_statistics(small)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[:, 42:63], values[:, 21:42])
