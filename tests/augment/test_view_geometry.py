"""Geometry against SciPy's interpolation at coordinates written down one by one, and MONAI's flips and turns."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from given import Size, patches_hu, row
from monai.transforms import Flip, Rotate90
from scipy import ndimage
from scipy.interpolate import BSpline
from torch import Tensor

from fmcib_ssl.augment import Params, RandomGeometry
from fmcib_ssl.augment.geometry import _by_gathering, _by_grid_sample, _right_angles, _rotation_matrices

CUBE, FLAT = (14, 14, 14), (10, 14, 12)
ALL: dict[str, Any] = {
    "rotate90_prob": 0.5, "rotate_prob": 0.4, "zoom_prob": 0.5, "elastic_prob": 0.4, "flip": "each_axis",
}  # fmt: skip
NOTHING: dict[str, Any] = {"crop_edge": (1, 1), "flip_prob": 0}


def axis_turns(angle: tuple[float, float, float]) -> np.ndarray:
    """Rotations round z, y, x one after the other, written out for columns (z, y, x)."""
    (cz, cy, cx), (sz, sy, sx) = np.cos(angle), np.sin(angle)
    round_z = np.array([[1, 0, 0], [0, cz, -sz], [0, sz, cz]])
    round_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    round_x = np.array([[cx, -sx, 0], [sx, cx, 0], [0, 0, 1]])
    return round_x @ round_y @ round_z


def expected_view(patch: Tensor, params: Params, size: Size, outside: str | float) -> np.ndarray:
    """The view of one patch `(z, y, x)`, as `RandomGeometry.draw` documents its parameters, one voxel at a time."""
    p = {name: value[0].double().numpy() for name, value in params.items()}
    turned = patch.double().numpy().transpose(p["axes"].astype(int))
    middle = p["box_start"] + (p["box_size"] - 1) / 2
    spans = p["elastic"].shape[1] - 3
    splines = [BSpline(np.arange(-3, spans + 4), np.eye(spans + 3)[i], 3) for i in range(spans + 3)]
    weights = [np.array([[s((i + 0.5) / n * spans) for s in splines] for i in range(n)]) for n in size]
    field = np.einsum("caef,za,ye,xf->czyx", p["elastic"], *weights)
    position = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij")) + field
    step = p["box_size"] / np.array(size) / p["zoom"] * np.where(p["flip"], -1, 1)
    matrix = axis_turns(p["angle"]) @ np.diag(step)
    position = np.einsum("ij,jzyx->izyx", matrix, position) + middle[:, None, None, None]
    if not p["warped"] and (p["zoom"] == 1).all():
        low, high = p["box_start"], p["box_start"] + p["box_size"] - 1
        position = np.clip(position, low[:, None, None, None], high[:, None, None, None])
    mode = {"mode": "nearest"} if outside == "border" else {"mode": "grid-constant", "cval": outside}
    view: np.ndarray = ndimage.map_coordinates(turned, position, order=1, **mode)
    return view


@pytest.mark.parametrize("outside", ["border", -1024.0])
@pytest.mark.parametrize(("size", "size_out"), [(CUBE, CUBE), (FLAT, FLAT), (FLAT, (8, 9, 20))])
def test_composed_geometry_is_one_interpolation(size: Size, size_out: Size, outside: Any) -> None:
    transform = RandomGeometry(size_out, outside=outside, elastic_strength=0.4, rotate_degrees=60, **ALL)
    patches = patches_hu(40, size)
    params = transform.draw(torch.arange(40), size)
    rotated, bent, zoomed = (
        params["angle"].any(1), params["elastic"].flatten(1).any(1), (params["zoom"] != 1).any(1)
    )  # fmt: skip
    assert len(torch.stack([rotated, bent, zoomed], 1).unique(dim=0)) == 8  # alone, and together
    for number, view in enumerate(transform.apply(patches, params)):
        expected = expected_view(patches[number, 0], row(params, number), size_out, outside)
        # 4000 HU between neighbours here: 0.05 HU is a hundred-thousandth of a voxel.
        np.testing.assert_allclose(view[0].numpy(), expected, atol=0.05, err_msg=str(number))


def test_boxes_have_one_factor_and_reach_every_border() -> None:
    params = RandomGeometry(crop_edge=(0.5, 0.9)).draw(torch.arange(2000), (20, 30, 40))
    size, start, edges = params["box_size"], params["box_start"], torch.tensor([20, 30, 40])
    factors = size / edges
    assert ((factors - 1 / edges).amax(1) < factors.amin(1)).all(), "no single factor makes these boxes"
    # MONAI and PublishedViews: the ceiling of factor times edge; so half the edge and a voxel are the ends.
    assert (size.amin(0) >= edges * 0.5).all() and (size.amin(0) <= edges * 0.5 + 1).all()
    assert (size.amax(0) <= (edges * 0.9).ceil()).all() and (size[:, 2] >= 35).any()
    assert (start == 0).any(0).all() and (start + size == edges).any(0).all()
    free = edges - size
    where = (start / free.clamp_min(1))[free.amin(1) > 0]
    assert torch.allclose(where.mean(0), torch.full((3,), 0.5), atol=0.05)  # uniform over the patch


def test_flips_and_right_angles_are_exact_and_monais() -> None:
    patches, transform = patches_hu(1, CUBE), RandomGeometry(**NOTHING)
    identity = transform.draw(torch.arange(1), CUBE)
    for axis in range(3):
        view = transform.apply(patches, {**identity, "flip": torch.arange(3)[None] == axis})
        assert torch.equal(view[0], torch.as_tensor(Flip(spatial_axis=axis)(patches[0].float())))
    turned = {
        transform.apply(patches, {**identity, "axes": axes[None], "flip": signs[None]})[0].numpy().tobytes()
        for axes, signs in zip(*_right_angles(CUBE), strict=True)
    }
    expected = set()
    for planes in itertools.product(((0, 1), (1, 2), (0, 2)), repeat=2):
        for turns in itertools.product(range(4), repeat=2):
            image = patches[0].float()
            for plane, k in zip(planes, turns, strict=True):
                image = Rotate90(k=k, spatial_axes=plane)(image)
            expected.add(np.asarray(image).tobytes())
    assert len(turned) == 24 and turned == expected


def test_right_angles_leave_the_size_as_it_is() -> None:
    assert [len(_right_angles(size)[0]) for size in ((5, 5, 5), (4, 5, 5), (5, 4, 5), (3, 4, 5))] == [24, 8, 8, 4]
    transform = RandomGeometry(rotate90_prob=0.75, **NOTHING)
    patches = patches_hu(600, (3, 4, 4)).float()
    params = transform.draw(torch.arange(600), (3, 4, 4))
    views = transform.apply(patches, params)
    assert views.shape == patches.shape
    assert torch.equal(views.flatten(1).sort(1)[0], patches.flatten(1).sort(1)[0])  # nothing is interpolated
    changed = (views != patches).flatten(1).any(1)
    assert 0.66 < changed.float().mean() < 0.84  # five standard deviations
    kinds = torch.unique(torch.cat([params["axes"], params["flip"].long()], 1), dim=0, return_counts=True)[1]
    assert len(kinds) == 8 and kinds.min() > 30


@pytest.mark.parametrize(("flip", "share"), [("one_axis", 0.4 / 3), ("each_axis", 0.4)])
def test_flips_are_as_frequent_as_asked(flip: Any, share: float) -> None:
    flips = RandomGeometry(flip_prob=0.4, flip=flip).draw(torch.arange(4000), CUBE)["flip"].float()
    assert torch.allclose(flips.mean(0), torch.full((3,), share), atol=0.04)
    assert flips.sum(1).max() == (1 if flip == "one_axis" else 3)


@pytest.mark.parametrize("size", [CUBE, FLAT, (1, 9, 7), (6, 1, 1)])
def test_both_ways_to_read_are_the_same(size: Size) -> None:
    # CUDA takes torch's kernel, every other device the gathers.
    images, drawn = patches_hu(6, size).float(), torch.Generator().manual_seed(0)
    matrix = torch.eye(3) + 0.4 * torch.randn(6, 3, 3, generator=drawn)
    middle = (torch.tensor(size) - 1) / 2 + torch.randn(6, 3, generator=drawn)
    for strength in (0.0, 2.0):
        elastic = strength * torch.randn(6, 3, 6, 6, 6, generator=drawn)
        view, expected = (
            read(images, matrix, middle, elastic, (8, 9, 10)) for read in (_by_gathering, _by_grid_sample)
        )
        torch.testing.assert_close(view, expected, atol=0.05, rtol=0)


def test_rotations_are_proper_and_bounded() -> None:
    angle = RandomGeometry(rotate_prob=1.0, rotate_degrees=20).draw(torch.arange(3000), CUBE)["angle"]
    assert math.radians(19) < angle.amax() <= math.radians(20)
    assert abs(angle.mean()) < 0.01
    np.testing.assert_allclose(_rotation_matrices(angle)[5], axis_turns(tuple(angle[5].double().tolist())), atol=1e-6)


def test_the_strongest_elastic_shift_does_not_fold() -> None:
    transform = RandomGeometry(elastic_prob=1.0, elastic_strength=0.4, **NOTHING)
    ramp = torch.stack(torch.meshgrid(*(torch.arange(30.0) for _ in range(3)), indexing="ij"))[:, None]
    for seed in range(20):
        params = transform.draw(torch.tensor([seed]), (30, 30, 30))
        position = transform.apply(ramp, row(params, 0, times=3))[:, 0]
        jacobian = torch.stack([torch.stack(torch.gradient(c)) for c in position])
        determinant = torch.linalg.det(jacobian.permute(2, 3, 4, 0, 1))
        # Where a coordinate stays at the border the volume is none; elsewhere it is more than none.
        inside = ((position > 0.5) & (position < 28.5)).all(0)
        assert inside.float().mean() > 0.5
        assert determinant[inside].min() > 0
        assert determinant[inside].std() > 0.05
