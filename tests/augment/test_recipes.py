"""The published recipe, by MONAI and in batches, against MONAI's chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from given import patches_hu
from monai.transforms import (
    Compose,
    Flip,
    GaussianSmooth,
    NormalizeIntensity,
    RandAxisFlip,
    RandGaussianSmooth,
    RandHistogramShift,
    Resize,
    SpatialPad,
    ThresholdIntensity,
)
from torch import Tensor

from fmcib_ssl.augment import BatchedPublishedViews, MonaiViews, PublishedViews, RandResizedCrop
from fmcib_ssl.types import Preprocessing

SIZE = (10, 14, 12)


def test_a_published_view_is_bit_for_bit_what_the_published_list_makes() -> None:
    published = Compose([
        RandResizedCrop(SIZE), RandAxisFlip(prob=0.5), RandHistogramShift(prob=0.5), RandGaussianSmooth(prob=0.5),
        SpatialPad(SIZE, value=-1024), ThresholdIntensity(threshold=-1024, above=True, cval=-1024),
        NormalizeIntensity(subtrahend=-1024, divisor=3072),
    ])  # fmt: skip
    patches, seeds = patches_hu(40, SIZE), torch.arange(40)
    views = Preprocessing().normalize(PublishedViews(SIZE)(patches, seeds))
    for patch, seed, view in zip(patches.float(), seeds.tolist(), views, strict=True):
        published.set_random_state(seed=seed)
        assert torch.equal(view, published(patch).as_subclass(Tensor))


@pytest.mark.parametrize("size", [SIZE, (50, 50, 50)])
def test_the_batched_recipe_is_monais_chain_with_the_same_parameters(size: tuple[int, int, int]) -> None:
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


def test_the_batched_recipe_draws_as_often_as_published() -> None:
    params = BatchedPublishedViews().draw(torch.arange(4000), (50, 50, 50))
    for name in ("histogram_shift", "smooth"):
        assert 0.46 < params[name].active.float().mean() < 0.54
    flips = params["geometry"].flip.float()
    assert 0.46 < flips.sum(1).mean() < 0.54 and flips.sum(1).max() == 1
    sigma = params["smooth"].sigma_zyx
    assert 0.25 <= sigma.min() < 0.26 and 1.49 < sigma.max() <= 1.5
    together = torch.stack([params["smooth"].active, params["histogram_shift"].active, flips.any(1)]).float()
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.08


def test_crop_has_one_factor_and_reaches_every_border() -> None:
    """Of an image that shows its coordinates."""
    size = (20, 30, 40)
    edges = torch.tensor(size)
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    crop = MonaiViews([RandResizedCrop(size, crop_edge=(0.5, 0.9))])
    views = crop(grid.expand(300, -1, -1, -1, -1), torch.arange(300))
    # Half-pixel centres: an output voxel in the middle is at start + (i + .5) * length / size - .5.
    lines = [views[:, axis].movedim(1 + axis, 1).flatten(2)[:, :, 0] for axis in range(3)]
    slopes = [line[:, n // 2] - line[:, n // 2 - 1] for line, n in zip(lines, size, strict=True)]
    lengths = torch.stack([(slope * n).round() for slope, n in zip(slopes, size, strict=True)], 1)
    starts = torch.stack(
        [
            (line[:, n // 2] + 0.5 - (n // 2 + 0.5) * slope).round()
            for line, slope, n in zip(lines, slopes, size, strict=True)
        ],
        1,
    )
    factors = lengths / edges
    assert ((factors - 1 / edges).amax(1) < factors.amin(1)).all(), "no single factor makes these boxes"
    assert 0.5 <= factors.amin() < 0.55 and 0.85 < factors[:, 2].amax() <= 0.9
    assert (starts == 0).any(0).all() and (starts + lengths == edges).any(0).all()
    z, y, x = (slice(int(s), int(s + n)) for s, n in zip(starts[7], lengths[7], strict=True))
    expected = Resize(size, mode="trilinear")(grid[:, z, y, x])
    torch.testing.assert_close(views[7], torch.as_tensor(expected).as_subclass(Tensor))
