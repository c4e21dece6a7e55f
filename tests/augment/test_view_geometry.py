"""Geometry against MONAI's transforms and SciPy's interpolation at coordinates written down one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from given import geometry, patches_hu
from monai.transforms import Affine, Flip, RandRotate90, Resample, Rotate90
from scipy import ndimage
from scipy.interpolate import BSpline
from torch import Tensor

from fmcib_ssl.augment import RandomGeometry
from fmcib_ssl.augment.geometry import (
    ELASTIC_SPANS,
    GeometryParams,
    by_gathering,
    by_grid_sample,
    right_angles,
    rotation_matrices,
)
from fmcib_ssl.augment.views import chosen

CUBE, FLAT = (14, 14, 14), (10, 14, 12)
ALL = {"rotate90_prob": 0.5, "rotate_prob": 0.4, "zoom_prob": 0.5, "elastic_prob": 0.4, "flip": "each_axis"}


def axis_turns(angle: tuple[float, float, float]) -> np.ndarray:
    """Rotations round z, y, x one after the other, written out for columns (z, y, x)."""
    (cz, cy, cx), (sz, sy, sx) = np.cos(angle), np.sin(angle)
    round_z = np.array([[1, 0, 0], [0, cz, -sz], [0, sz, cz]])
    round_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    round_x = np.array([[cx, -sx, 0], [sx, cx, 0], [0, 0, 1]])
    return round_x @ round_y @ round_z


def expected_view(
    patch: Tensor, params: GeometryParams, size: tuple[int, int, int], outside: str | float
) -> np.ndarray:
    """The view of one patch `(z, y, x)`, as the documentation of the parameters says it, one voxel at a time."""
    p = {name: value[0].double().numpy() for name, value in params._asdict().items()}
    turned = patch.double().numpy().transpose(p["axes"].astype(int))
    middle = p["box_start"] + (p["box_size"] - 1) / 2
    spans = p["elastic"].shape[1] - 3
    splines = [BSpline(np.arange(-3, spans + 4), np.eye(spans + 3)[i], 3) for i in range(spans + 3)]
    weights = [np.array([[s((i + 0.5) / n * spans) for s in splines] for i in range(n)]) for n in size]
    field = np.einsum("caef,za,ye,xf->czyx", p["elastic"], *weights)
    place = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in size), indexing="ij")) + field
    step = p["box_size"] / np.array(size) / p["zoom"] * np.where(p["flip"], -1, 1)
    matrix = axis_turns(p["angle"]) @ np.diag(step)
    place = np.einsum("ij,jzyx->izyx", matrix, place) + middle[:, None, None, None]
    if not p["warped"] and (p["zoom"] == 1).all():
        low, high = p["box_start"], p["box_start"] + p["box_size"] - 1
        place = np.clip(place, low[:, None, None, None], high[:, None, None, None])
    mode = {"mode": "nearest"} if outside == "border" else {"mode": "grid-constant", "cval": outside}
    found: np.ndarray = ndimage.map_coordinates(turned, place, order=1, **mode)
    return found


@pytest.mark.parametrize("outside", ["border", -1024.0])
@pytest.mark.parametrize(("size", "size_out"), [(CUBE, CUBE), (FLAT, FLAT), (FLAT, (8, 9, 20))])
def test_composed_geometry_is_one_interpolation(
    size: tuple[int, int, int], size_out: tuple[int, int, int], outside: str | float
) -> None:
    transform = RandomGeometry(size_out, outside=outside, elastic_strength=0.4, rotate_degrees=60, **ALL)
    patches = patches_hu(40, size)
    params = transform.draw(torch.arange(40), size)
    assert 10 < params.warped.sum() < 35
    assert (params.zoom != 1).any(1)[~params.warped].any()
    views = transform.apply(patches, params)
    for number in range(40):
        one = chosen(params, [number])
        expected = expected_view(patches[number, 0], one, size_out, outside)
        # 4000 HU between neighbours here: 0.05 HU is a hundred-thousandth of a voxel.
        np.testing.assert_allclose(views[number, 0].numpy(), expected, atol=0.05, err_msg=str(number))


def test_crop_is_resized_as_by_torch() -> None:
    transform, patches = RandomGeometry((11, 16, 13), flip_prob=0.0), patches_hu(20, FLAT)
    params = transform.draw(torch.arange(20), FLAT)
    views = transform.apply(patches, params)
    for patch, view, start, length in zip(patches, views, params.box_start, params.box_size, strict=True):
        z, y, x = (slice(s, s + n) for s, n in zip(start.tolist(), length.tolist(), strict=True))
        expected = F.interpolate(patch[None, :, z, y, x].float(), size=(11, 16, 13), mode="trilinear")[0]
        torch.testing.assert_close(view, expected, atol=5e-3, rtol=0)


def test_boxes_have_one_factor_and_reach_every_border() -> None:
    params = RandomGeometry(crop_edge=(0.5, 0.9)).draw(torch.arange(2000), (20, 30, 40))
    edges = torch.tensor([20, 30, 40])
    factors = params.box_size / edges
    assert ((factors - 1 / edges).amax(1) < factors.amin(1)).all(), "no single factor makes these boxes"
    # MONAI and PublishedViews: the ceiling of factor times edge; so half the edge and a voxel are the ends.
    assert (params.box_size.amin(0) >= edges * 0.5).all() and (params.box_size.amin(0) <= edges * 0.5 + 1).all()
    assert (params.box_size.amax(0) <= (edges * 0.9).ceil()).all() and (params.box_size[:, 2] >= 35).any()
    assert (params.box_start == 0).any(0).all()
    assert (params.box_start + params.box_size == edges).any(0).all()
    free = edges - params.box_size
    where = (params.box_start / free.clamp_min(1))[free.amin(1) > 0]
    assert torch.allclose(where.mean(0), torch.full((3,), 0.5), atol=0.05)  # the places are uniform


def test_flips_and_right_angles_are_exact_and_monais() -> None:
    patches = patches_hu(1, CUBE)
    for axis in range(3):
        flip = torch.arange(3)[None] == axis
        view = RandomGeometry().apply(patches, geometry(CUBE, flip=flip))
        assert torch.equal(view[0], torch.as_tensor(Flip(spatial_axis=axis)(patches[0].float())))
    reached = set()
    axes, signs = right_angles(CUBE)
    for turn, sign in zip(axes, signs, strict=True):
        view = RandomGeometry().apply(patches, geometry(CUBE, axes=turn[None], flip=sign[None]))[0]
        reached.add(view.numpy().tobytes())
    monai = set()
    for planes in itertools.product(((0, 1), (1, 2), (0, 2)), repeat=2):
        for turns in itertools.product(range(4), repeat=2):
            turned = patches[0].float()
            for plane, k in zip(planes, turns, strict=True):
                turned = Rotate90(k=k, spatial_axes=plane)(turned)
            monai.add(np.asarray(turned).tobytes())
    assert len(reached) == 24
    assert reached == monai


def test_right_angles_leave_the_size_as_it_is() -> None:
    assert [len(right_angles(size)[0]) for size in ((5, 5, 5), (4, 5, 5), (5, 4, 5), (3, 4, 5))] == [24, 8, 8, 4]
    transform = RandomGeometry(crop_edge=(1, 1), flip_prob=0, rotate90_prob=0.75)
    patches = patches_hu(600, (3, 4, 4)).float()
    params = transform.draw(torch.arange(600), (3, 4, 4))
    views = transform.apply(patches, params)
    assert views.shape == patches.shape
    assert torch.equal(views.flatten(1).sort(1)[0], patches.flatten(1).sort(1)[0])  # nothing is interpolated
    changed = (views != patches).flatten(1).any(1)
    assert 0.66 < changed.float().mean() < 0.84  # five standard deviations
    kinds = torch.unique(torch.cat([params.axes, params.flip.long()], 1), dim=0, return_counts=True)[1]
    assert len(kinds) == 8 and kinds.min() > 30
    assert (
        RandRotate90(prob=1.0, spatial_axes=(1, 2))(patches[0]).shape == patches[0].shape
    )  # what MONAI needs a plane for


@pytest.mark.parametrize("flip", ["one_axis", "each_axis"])
def test_flips_are_as_frequent_as_asked(flip: str) -> None:
    flips = RandomGeometry(flip_prob=0.4, flip=flip).draw(torch.arange(4000), CUBE).flip.float()  # type: ignore[arg-type]
    expected = 0.4 if flip == "each_axis" else 0.4 / 3
    assert torch.allclose(flips.mean(0), torch.full((3,), expected), atol=0.04)
    if flip == "one_axis":
        assert flips.sum(1).max() == 1


def plain(image: object) -> Tensor:
    return torch.as_tensor(image).as_subclass(Tensor)


@pytest.mark.parametrize(
    ("angle", "zoom"),
    [((0.3, -0.2, 0.5), (1, 1, 1)), ((0, 0, 0), (0.8, 1.1, 1.25)), ((0.3, -0.2, 0.5), (0.8, 1.1, 1.25))],
    ids=["rotation", "zoom", "both"],
)
def test_affine_maps_are_monais(angle: tuple[float, float, float], zoom: tuple[float, float, float]) -> None:
    patches = patches_hu(1, CUBE)
    params = geometry(
        CUBE, angle=torch.tensor([angle]), zoom=torch.tensor([zoom]).float(), warped=torch.tensor([any(angle)])
    )
    view = RandomGeometry().apply(patches, params)[0]
    matrix = np.eye(4)
    matrix[:3, :3] = axis_turns(angle) @ np.diag(1 / np.array(zoom))
    # MONAI's grid has its origin in the middle of the image, and its affine maps output to input.
    expected, _ = Affine(affine=matrix, padding_mode="border", mode="bilinear")(patches[0].float())
    torch.testing.assert_close(view, plain(expected), atol=0.05, rtol=0)


def test_elastic_shifts_are_monais_resampling_with_the_same_field() -> None:
    patches = patches_hu(4, FLAT)
    transform = RandomGeometry(crop_edge=(1, 1), flip_prob=0, elastic_prob=1.0, elastic_strength=0.4)
    params = transform.draw(torch.arange(4), FLAT)
    spans = ELASTIC_SPANS
    splines = [BSpline(np.arange(-3, spans + 4), np.eye(spans + 3)[i], 3) for i in range(spans + 3)]
    weights = [np.array([[s((i + 0.5) / n * spans) for s in splines] for i in range(n)]) for n in FLAT]
    middle = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in FLAT), indexing="ij"))
    resample = Resample(mode="bilinear", padding_mode="border")
    for patch, view, control in zip(patches.float(), transform.apply(patches, params), params.elastic, strict=True):
        field = np.einsum("caef,za,ye,xf->czyx", control.double().numpy(), *weights)
        assert np.abs(field).max() > 0.5
        grid = np.concatenate([middle + field, np.ones((1, *FLAT))])
        torch.testing.assert_close(view, plain(resample(patch, grid=torch.from_numpy(grid))).float(), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [CUBE, FLAT, (1, 9, 7), (6, 1, 1)])
def test_both_ways_to_read_at_places_are_the_same(size: tuple[int, int, int]) -> None:
    # CUDA takes torch's kernel, every other device the gathers.
    images, drawn = patches_hu(6, size).float(), torch.Generator().manual_seed(0)
    matrix = torch.eye(3) + 0.4 * torch.randn(6, 3, 3, generator=drawn)
    middle = (torch.tensor(size) - 1) / 2 + torch.randn(6, 3, generator=drawn)
    for strength in (0.0, 2.0):
        elastic = strength * torch.randn(6, 3, 6, 6, 6, generator=drawn)
        found = by_gathering(images, matrix, middle, elastic, (8, 9, 10))
        expected = by_grid_sample(images, matrix, middle, elastic, (8, 9, 10))
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_rotations_are_proper_and_bounded() -> None:
    transform = RandomGeometry(rotate_prob=1.0, rotate_degrees=20)
    angle = transform.draw(torch.arange(3000), CUBE).angle
    assert math.radians(19) < angle.amax() <= math.radians(20)
    assert abs(angle.mean()) < 0.01
    matrices = rotation_matrices(angle).double()
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).double().expand(3000, 3, 3), atol=1e-6, rtol=0)
    np.testing.assert_allclose(matrices[5].numpy(), axis_turns(tuple(angle[5].double().tolist())), atol=1e-6)


def test_the_strongest_elastic_shift_does_not_fold() -> None:
    transform = RandomGeometry(crop_edge=(1, 1), flip_prob=0, elastic_prob=1.0, elastic_strength=0.4)
    ramp = torch.stack(torch.meshgrid(*(torch.arange(30.0) for _ in range(3)), indexing="ij"))[:, None]
    for seed in range(20):
        params = transform.draw(torch.tensor([seed]), (30, 30, 30))
        place = transform.apply(ramp, chosen(params, [0, 0, 0]))[:, 0]
        jacobian = torch.stack([torch.stack(torch.gradient(c)) for c in place])
        determinant = torch.linalg.det(jacobian.permute(2, 3, 4, 0, 1))
        # Where a coordinate stays at the border the volume is none; elsewhere it is more than none.
        inside = ((place > 0.5) & (place < 28.5)).all(0)
        assert inside.float().mean() > 0.5
        assert determinant[inside].min() > 0
        assert determinant[inside].std() > 0.05
