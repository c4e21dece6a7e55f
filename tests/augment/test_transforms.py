"""What every transform and every recipe keeps to: a view is a function of its patch and its seed, in HU, anywhere."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from given import patches_hu
from hydra.utils import instantiate
from monai.data.meta_obj import get_track_meta
from monai.transforms import RandFlip, RandGaussianNoise
from omegaconf import OmegaConf
from torch import Tensor

import fmcib_ssl.augment.views as module
from fmcib_ssl import augment
from fmcib_ssl.augment import BatchedTransform, BatchedViews, RandomGeometry
from fmcib_ssl.types import ViewTransform

REPO = Path(__file__).resolve().parents[2]
SIZE = (10, 14, 12)
MOVED = {"rotate90_prob": 0.5, "rotate_prob": 0.4, "zoom_prob": 0.5, "elastic_prob": 0.4, "flip": "each_axis"}

#: With a probability of 0.5: each changes what `active` says, and nothing else.
SINGLE: dict[str, BatchedTransform] = {
    "histogram shift": augment.RandomHistogramShift(0.5),
    "gamma": augment.RandomGamma(0.5),
    "scale and shift": augment.RandomScaleShift(0.5),
    "noise": augment.RandomNoise(0.5),
    "cut-out": augment.RandomCutout(0.5),
    "context removal": augment.RandomContextRemoval(0.5),
    "smoothing": augment.RandomGaussianSmooth(0.5),
    "smoothing with zeros": augment.RandomGaussianSmooth(0.5, padding="zeros"),
    "low resolution": augment.RandomLowResolution(0.5, (0.3, 0.8)),
    "slice thickness": augment.RandomSliceThickness(0.5),
}
GEOMETRY: dict[str, BatchedTransform] = {
    "geometry": RandomGeometry(**MOVED),  # type: ignore[arg-type]
    "geometry, another size": RandomGeometry((8, 9, 7), outside=-1024.0, **MOVED),  # type: ignore[arg-type]
    "monai": augment.MonaiViews([RandGaussianNoise(prob=0.5, std=30.0), RandFlip(prob=0.5)]),
}


def shipped(recipe: str, size: tuple[int, int, int] = SIZE) -> Any:
    """A recipe of configs/augment, for patches of a size."""
    text = (REPO / f"configs/augment/{recipe}.yaml").read_text()
    config = OmegaConf.create({"augment": yaml.safe_load(text), "data": {"patch_size": list(size)}})
    return instantiate(config.augment, _convert_="object")


RECIPES = {file.stem: shipped(file.stem) for file in sorted((REPO / "configs/augment").glob("*.yaml"))}
EVERY = {**SINGLE, **GEOMETRY, **RECIPES}
every_one = pytest.mark.parametrize("views", EVERY.values(), ids=EVERY)


def close(views: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(views, expected, atol=3e-3, rtol=0)  # HU, where neighbours differ by 4000


@every_one
def test_a_view_follows_from_its_patch_and_seed_alone(views: ViewTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, seeds = patches_hu(30, SIZE), torch.arange(30) * 7919
    before = patches.clone()
    together = views(patches, seeds)
    assert torch.equal(together, views(patches, seeds))
    assert torch.equal(together, views(patches.float(), seeds))
    spawned = pickle.loads(pickle.dumps(views))  # as a worker that is spawned gets it
    assert torch.equal(together, spawned(patches, seeds))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    close(views(patches[order], seeds[order]), together[order])
    for i in (0, 7, 29):
        close(views(patches[i : i + 1], seeds[i : i + 1])[0], together[i])
    for at_a_time in (1, 7):
        monkeypatch.setitem(module._CHUNK_VOXELS, "cpu", at_a_time * 10 * 14 * 12)
        close(views(patches, seeds), together)
    same_patch = views(patches[:1].expand(30, -1, -1, -1, -1), seeds)
    assert len(same_patch.flatten(1).unique(dim=0)) > 5
    assert torch.equal(patches, before)


@every_one
def test_what_leaves_is_a_plain_tensor_and_nothing_global_changes(views: ViewTransform) -> None:
    patches, seeds = patches_hu(6, SIZE), torch.arange(6)
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    made = views(patches, seeds)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert get_track_meta()
    assert type(made) is Tensor and made.dtype == torch.float32 and made.is_contiguous() and not made.requires_grad
    assert made.untyped_storage().nbytes() == made.nbytes  # a view of something larger would be sent whole
    size = (8, 9, 7) if views is GEOMETRY["geometry, another size"] else SIZE
    assert made.shape == (6, 1, *size)
    assert views(patches[:0], seeds[:0]).shape == (0, 1, *size)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 where the CPU has it
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(views(patches, seeds), made)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@every_one
@pytest.mark.filterwarnings("ignore:The image's intensity is a single value")
def test_uniform_patches_stay_finite(views: ViewTransform) -> None:
    for hu in (-3024, -1024, 0, 3071):
        uniform = torch.full((12, 1, *SIZE), hu, dtype=torch.int16)
        nearly = uniform.clone()
        nearly[..., 3, 3, 3] -= hu // 3071 or -1
        for patches in (uniform, nearly):
            assert views(patches, torch.arange(12)).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_one
def test_views_are_the_same_on_a_gpu(views: ViewTransform) -> None:
    patches, seeds = patches_hu(64, SIZE), torch.arange(64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        made = views(patches.cuda(), seeds.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    assert made.is_cuda
    torch.testing.assert_close(made.cpu(), views(patches, seeds), atol=0.3, rtol=0)


@pytest.mark.parametrize("transform", SINGLE.values(), ids=SINGLE)
def test_half_of_the_views_are_changed(transform: BatchedTransform) -> None:
    images, seeds = patches_hu(400, (5, 6, 7)).float(), torch.arange(400)
    params = transform.draw(seeds, (5, 6, 7))
    changed = (transform(images, seeds) != images).flatten(1).any(1)
    assert torch.equal(changed, params["active"])
    assert 0.375 < changed.float().mean() < 0.625  # five standard deviations


@pytest.mark.parametrize("recipe", ["batched_published", "ct_strong", "nodule"])
def test_parameters_replay_a_view_step_by_step_and_do_not_depend_on_other_transforms(recipe: str) -> None:
    views, patches, seeds = RECIPES[recipe], patches_hu(30, SIZE), torch.arange(30)
    params = pickle.loads(pickle.dumps(views.draw(seeds, SIZE)))
    images = patches
    for name, transform in views.transforms.items():
        images = transform.apply(images, params[name])
        alone = BatchedViews({name: transform}).draw(seeds, SIZE)[name]
        assert all(torch.equal(values, params[name][key]) for key, values in alone.items())
    assert torch.equal(images, views(patches, seeds))
    assert not torch.equal(*(own["active"] for own in list(params.values())[-2:]))


def test_a_recipe_with_monais_transforms_among_others_leaves_a_device_alone() -> None:
    mixed = BatchedViews({"geometry": RandomGeometry(), "monai": GEOMETRY["monai"]})
    made = mixed(patches_hu(6, SIZE), torch.arange(6))
    assert made.shape == (6, 1, *SIZE) and mixed.patch_by_patch
    assert not RECIPES["ct_strong"].patch_by_patch


def test_the_documented_transform_is_short_and_works() -> None:
    """The one that docs/develop.md shows, taken from there."""
    page = (REPO / "docs" / "develop.md").read_text()
    (code,) = re.findall(r"```python\n# my_package/transforms\.py\n(.*?)```", page, re.DOTALL)
    assert len(code[code.index("class ") :].strip().splitlines()) <= 17
    names: dict[str, Any] = {"__name__": __name__}
    exec(code, names)  # our own page
    patches, seeds = patches_hu(40, (6, 7, 8)), torch.arange(40)
    for prob in (0.6, 1.0):
        saturation = names["RandomSaturation"](prob, (100.0, 500.0))
        active, highest = saturation.draw(seeds, (6, 7, 8)).values()
        assert 12 < active.sum() <= 40 * prob + 12 and 100 <= highest.min() < highest.max() <= 500
        expected = torch.where(active, highest, torch.inf).view(-1, 1, 1, 1, 1).minimum(patches)
        assert torch.equal(saturation(patches, seeds), expected)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: RandomGeometry(crop_edge=(0.8, 0.5)), "crop_edge"),
        (lambda: RandomGeometry(flip="both"), "flip is 'both'"),  # type: ignore[arg-type]
        (lambda: RandomGeometry(outside="zeros"), "outside is 'zeros'"),  # type: ignore[arg-type]
        (lambda: RandomGeometry((5, 5)), "size_zyx"),
        (lambda: augment.PublishedViews(SIZE, crop_edge=(0.5, 1.2)), "crop_edge"),
        (lambda: augment.RandomHistogramShift(0.5, 2), "num_control_points is 2"),
        (lambda: augment.RandomScaleShift(0.5, (1.1, 0.9)), "scale"),
        (lambda: augment.RandomNoise(-0.1), "prob is -0.1"),
        (lambda: augment.RandomCutout(0.5, (0, 2)), "num_holes"),
        (lambda: augment.RandomContextRemoval(0.5, softness=0.0), "softness"),
        (lambda: augment.RandomGaussianSmooth(0.5, padding="reflect"), "padding is 'reflect'"),  # type: ignore[arg-type]
        (lambda: BatchedViews({}), "no transforms"),
        (lambda: augment.MonaiViews([]), "no transforms"),
    ],
)
def test_impossible_numbers_are_refused(build: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()
