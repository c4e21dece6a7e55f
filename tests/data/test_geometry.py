"""Geometry against SimpleITK, and against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from odd_images import AXIS_ORIENTATIONS
from scipy.spatial.transform import Rotation

from fmcib_ssl.data.geometry import ScanGeometry, ras_to_lps


def random_geometry(rng: np.random.Generator, oblique: bool) -> ScanGeometry:
    direction = Rotation.random(random_state=rng).as_matrix() if oblique else AXIS_ORIENTATIONS[rng.integers(48)]
    return ScanGeometry(
        size_xyz=tuple(rng.integers(4, 40, 3).tolist()),
        spacing_mm_xyz=tuple(rng.uniform(0.4, 6, 3).tolist()),
        origin_lps_mm=tuple(rng.uniform(-500, 500, 3).tolist()),
        direction=tuple(map(tuple, direction.tolist())),
    )


def as_image(geometry: ScanGeometry) -> sitk.Image:
    image = sitk.Image(geometry.size_xyz, sitk.sitkUInt8)
    image.SetSpacing(geometry.spacing_mm_xyz)
    image.SetOrigin(geometry.origin_lps_mm)
    image.SetDirection(np.ravel(geometry.direction).tolist())
    return image


@pytest.mark.parametrize("seed", range(8))
def test_index_and_lps_agree_with_simpleitk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    geometry = random_geometry(rng, oblique=seed % 2 == 0)
    image = as_image(geometry)
    index = rng.uniform(-20, 60, (10, 3))
    points = np.array([image.TransformContinuousIndexToPhysicalPoint(i) for i in index.tolist()])
    np.testing.assert_allclose(geometry.to_lps_mm(index), points, atol=1e-9)
    np.testing.assert_allclose(geometry.to_index_xyz(points), index, atol=1e-9)
    np.testing.assert_allclose(geometry.to_lps_mm(index[0]), points[0], atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_contains_bounds_and_distance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    geometry = random_geometry(rng, oblique=True)
    size = np.array(geometry.size_xyz)
    index = rng.uniform(-3, size + 3, (200, 3))
    expected = [all(-0.5 <= i <= n - 0.5 for i, n in zip(row, size, strict=True)) for row in index]
    assert 0 < sum(expected) < 200
    np.testing.assert_array_equal(geometry.contains(geometry.to_lps_mm(index)), expected)
    corners = geometry.to_lps_mm(list(itertools.product(*((-0.5, n - 0.5) for n in size))))
    assert geometry.contains(corners).all()
    np.testing.assert_allclose(geometry.bounds_lps_mm()[0], corners.min(0))
    np.testing.assert_allclose(geometry.bounds_lps_mm()[1], corners.max(0))
    beyond = geometry.to_lps_mm([size[0] - 0.5 + 3, 1, size[2] - 0.5 + 4])
    expected_mm = np.hypot(3 * geometry.spacing_mm_xyz[0], 4 * geometry.spacing_mm_xyz[2])
    assert geometry.distance_outside_mm(beyond) == pytest.approx(expected_mm)
    assert geometry.distance_outside_mm(geometry.to_lps_mm([1, 1, 1])) == 0


def test_ras_to_lps_is_its_own_inverse() -> None:
    np.testing.assert_array_equal(ras_to_lps([[1, 2, 3]]), [[-1, -2, 3]])
    np.testing.assert_array_equal(ras_to_lps(ras_to_lps([4.0, -5.0, 6.0])), [4, -5, 6])
