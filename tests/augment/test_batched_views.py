"""Views of whole batches: the published recipe against MONAI's chain, and what they may depend on."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from given import patches_hu
from hydra.utils import instantiate
from monai.transforms import Flip, GaussianSmooth, RandHistogramShift
from omegaconf import OmegaConf
from torch import Tensor

import fmcib_ssl.augment.views as module
from fmcib_ssl.augment import BatchedPublishedViews, BatchedViews
from fmcib_ssl.types import Preprocessing

REPO = Path(__file__).resolve().parents[2]
SIZE = (10, 14, 12)


def strong(size: tuple[int, int, int] = SIZE) -> BatchedViews:
    """The shipped recipe, for patches of a size."""
    text = (REPO / "configs/augment/ct_strong.yaml").read_text()
    config = OmegaConf.create({"augment": yaml.safe_load(text), "data": {"patch_size": list(size)}})
    found: BatchedViews = instantiate(config.augment, _convert_="object")
    return found


def recipes() -> list[BatchedViews]:
    return [BatchedPublishedViews(SIZE), strong()]


@pytest.mark.parametrize("size", [SIZE, (50, 50, 50)])
def test_the_published_recipe_is_monais_chain_with_the_same_parameters(size: tuple[int, int, int]) -> None:
    views = BatchedPublishedViews(size)
    patches, seeds = patches_hu(64, size), torch.arange(64)
    params = views.draw(seeds, size)
    geometry, histogram, smooth = params["geometry"], params["histogram_shift"], params["smooth"]
    made = views(patches, seeds)
    met = set()
    for i in range(64):
        start, length = geometry.box_start[i].tolist(), geometry.box_size[i].tolist()
        z, y, x = (slice(s, s + n) for s, n in zip(start, length, strict=True))
        image = F.interpolate(patches[i : i + 1, :, z, y, x].float(), size=size, mode="trilinear")[0]
        flipped = geometry.flip[i].nonzero()[:, 0].tolist()
        if flipped:
            image = Flip(spatial_axis=flipped)(image)
        if histogram.active[i]:
            shift = RandHistogramShift(prob=1.0)
            shift.randomize()
            shift.floating_control_points = histogram.mapped[i].double().numpy()
            image = shift(image, randomize=False)
        if smooth.active[i]:
            image = GaussianSmooth(smooth.sigma_zyx[i].tolist())(image)
        np.testing.assert_allclose(made[i].numpy(), np.asarray(image), atol=0.06)  # HU, where slopes reach 10
        met.add((len(flipped), bool(histogram.active[i]), bool(smooth.active[i])))
    assert len(met) == 8


def test_the_published_recipe_draws_as_often_as_published() -> None:
    params = BatchedPublishedViews().draw(torch.arange(4000), (50, 50, 50))
    for name in ("histogram_shift", "smooth"):
        assert 0.46 < params[name].active.float().mean() < 0.54
    flips = params["geometry"].flip.float()
    assert 0.46 < flips.sum(1).mean() < 0.54 and flips.sum(1).max() == 1
    sigma = params["smooth"].sigma_zyx
    assert 0.25 <= sigma.min() < 0.26 and 1.49 < sigma.max() <= 1.5
    together = torch.stack([params["smooth"].active, params["histogram_shift"].active, flips.any(1)]).float()
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.08


@pytest.mark.parametrize("views", recipes(), ids=["published", "strong"])
def test_a_view_does_not_depend_on_the_batch(views: BatchedViews, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, seeds = patches_hu(40, SIZE), torch.arange(40) * 7919
    together = views(patches, seeds)
    assert together.shape == (40, 1, *SIZE) and together.dtype == torch.float32
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(views(patches[order], seeds[order]), together[order], atol=3e-3, rtol=0)
    for i in range(40):
        torch.testing.assert_close(views(patches[i : i + 1], seeds[i : i + 1])[0], together[i], atol=3e-3, rtol=0)
    for at_a_time in (1, 2, 3, 7):
        monkeypatch.setitem(module.CHUNK_VOXELS, "cpu", at_a_time * 10 * 14 * 12)
        torch.testing.assert_close(views(patches, seeds), together, atol=3e-3, rtol=0)
    assert torch.equal(views(patches, seeds), views(patches, seeds))
    same = views(patches[:1].expand(40, -1, -1, -1, -1), torch.arange(40))
    assert all(not torch.equal(same[i], same[i - 1]) for i in range(1, 40))


@pytest.mark.parametrize("views", recipes(), ids=["published", "strong"])
def test_parameters_replay_a_view(views: BatchedViews) -> None:
    patches, seeds = patches_hu(30, SIZE), torch.arange(30)
    params = views.draw(seeds, SIZE)
    kept = pickle.loads(pickle.dumps(params))
    fresh = pickle.loads(pickle.dumps(views))  # as a worker that does not fork gets it
    assert torch.equal(fresh.apply(patches, kept), views(patches, seeds))
    # One after the other by hand, as somebody would who wants to see what each transform does.
    images = patches
    for name, transform in views.transforms.items():
        images = transform.apply(images, params[name])
    torch.testing.assert_close(views.apply(patches, params), images, atol=0.1, rtol=0)


def test_a_transform_that_is_left_out_does_not_change_the_others() -> None:
    views = strong()
    fewer = BatchedViews({name: views.transforms[name] for name in ("cutout", "geometry")})
    seeds = torch.arange(20)
    some, every = fewer.draw(seeds, SIZE), views.draw(seeds, SIZE)
    for name, params in some.items():
        assert all(torch.equal(a, b) for a, b in zip(params, every[name], strict=True))
    assert not torch.equal(every["noise"].active, every["smooth"].active)


def test_views_of_another_size_than_the_patch() -> None:
    views = BatchedPublishedViews((8, 9, 7))
    bent = strong((8, 9, 7))
    for recipe in (views, bent):
        assert recipe(patches_hu(20, SIZE), torch.arange(20)).shape == (20, 1, 8, 9, 7)
    assert views(patches_hu(1, SIZE)[:0], torch.arange(0)).shape == (0, 1, 8, 9, 7)
    assert bent(patches_hu(1, SIZE)[:0], torch.arange(0)).shape == (0, 1, 8, 9, 7)


def test_a_recipe_without_transforms_is_refused() -> None:
    with pytest.raises(ValueError, match="no transforms"):
        BatchedViews({})


def test_nothing_global_changes_and_autocast_is_kept_out() -> None:
    patches, seeds = patches_hu(6, SIZE), torch.arange(6)
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    plain = strong()(patches, seeds)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 where the CPU has it
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(strong()(patches, seeds), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert not plain.requires_grad


def test_the_strong_recipe_keeps_the_meaning_of_hu() -> None:
    # Air, fat, water, and bone stay what they are within a few dozen HU in the mean of a view.
    views = strong((24, 24, 24))
    for hu in (-1000, -100, 0, 700):
        uniform = torch.full((200, 1, 24, 24, 24), hu, dtype=torch.int16)
        mean_hu = views(uniform, torch.arange(200)).clamp_min(-1024).mean((1, 2, 3, 4))
        assert (mean_hu - hu).abs().max() < 20 + 0.05 * (hu + 1000) + 30  # shift, scale, noise clamped at air


@pytest.mark.parametrize("hu", [-3024, -1024, 0, 3071])
def test_uniform_patches_stay_finite(hu: int) -> None:
    uniform = torch.full((30, 1, *SIZE), hu, dtype=torch.int16)
    for views in recipes():
        assert views(uniform, torch.arange(30)).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", ["highest", "medium"])
@pytest.mark.parametrize("views", recipes(), ids=["published", "strong"])
def test_views_are_the_same_on_a_gpu(views: BatchedViews, tf32: str) -> None:
    patches, seeds = patches_hu(64, SIZE), torch.arange(64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(tf32)
    try:
        made = views(patches.cuda(), seeds.cuda())
        assert torch.get_float32_matmul_precision() == tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert made.is_cuda
    torch.testing.assert_close(made.cpu(), views(patches, seeds), atol=0.3, rtol=0)


def test_views_of_a_real_scan(real_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    scan = next(path for path in sorted((real_data / "ct").rglob("*.nrrd")) if "label" not in path.name)
    volume: Tensor = torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(scan))).astype(np.int16))
    corner = [max(0, n // 2 - 20) for n in volume.shape]
    z, y, x = (slice(c, c + 40) for c in corner)
    patches = volume[None, None, z, y, x].repeat(12, 1, 1, 1, 1)
    plain = Preprocessing().normalize(patches)
    for views in (strong(tuple(patches.shape[2:])), BatchedPublishedViews(tuple(patches.shape[2:]))):
        made = Preprocessing().normalize(views(patches, torch.arange(12)))
        assert made.min() >= 0 and made.std() > 0.02
        assert made.max() < plain.max() + 0.2
