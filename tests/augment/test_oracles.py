"""Intensities, resolution and the published recipe against MONAI's transforms with the same parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from given import Size, box, patches_hu, plain
from scipy import stats
from torch import Tensor

from fmcib_ssl import augment
from fmcib_ssl.augment import Params
from fmcib_ssl.augment.geometry import along_axes
from fmcib_ssl.augment.views import normals
from fmcib_ssl.types import Preprocessing

SIZE = (10, 17, 13)
SCALE = augment.RandomScaleShift(0.7, (0.5, 1.5), (-100.0, 100.0), pivot_hu=0.0)


def histogram_shift(patch: Tensor, own: Params) -> Any:
    shift = mt.RandHistogramShift(prob=1.0)
    shift.randomize()
    shift.reference_control_points = np.linspace(0, 1, len(own["mapped"]))
    shift.floating_control_points = own["mapped"].double().numpy()
    return shift(patch, randomize=False)


def scale_shift(patch: Tensor, own: Params) -> Any:
    scaled = mt.ScaleIntensity(minv=None, maxv=None, factor=own["scale"].item() - 1)(patch)
    return mt.ShiftIntensity(own["shift_hu"].item())(scaled)


def noise(patch: Tensor, own: Params) -> Any:
    monai = mt.RandGaussianNoise(prob=1.0)
    monai.randomize(patch)
    monai.noise = normals(own["seed"][None], patch.numel()).view(patch.shape) * own["std_hu"]
    return monai(patch, randomize=False)


def cutout(fill_hu: float | None) -> Callable[[Tensor, Params], Any]:
    def expected(patch: Tensor, own: Params) -> Any:
        fill = patch.mean().item() if fill_hu is None else fill_hu
        monai = mt.RandCoarseDropout(holes=1, spatial_size=2, fill_value=fill, prob=1.0)
        monai.randomize(SIZE)
        monai.hole_coords = [
            (slice(None), *(slice(start, start + length) for start, length in zip(starts, lengths, strict=True)))
            for starts, lengths in zip(own["start"].tolist(), own["size"].tolist(), strict=True)
            if min(lengths) > 0
        ]
        return monai(patch.clone(), randomize=False)

    return expected


def low_resolution(patch: Tensor, own: Params) -> Any:
    monai = mt.RandSimulateLowResolution(prob=1.0)
    monai.randomize()
    monai.zoom_factor = own["zoom"].item()
    return monai(patch, randomize=False)


def smoothed_beyond(patch: Tensor, own: Params) -> Any:
    reach = 7  # MONAI's kernels end at 4 sigma and sum to 0.9999; ours leave a uniform patch as it is
    wide = F.pad(patch[None], (reach,) * 6, mode="replicate")[0]
    return mt.GaussianSmooth(own["sigma_zyx"].tolist())(wide)[:, reach:-reach, reach:-reach, reach:-reach]


#: Our transform, MONAI's of one patch with the same parameters, and the largest difference in HU.
ORACLES: dict[str, tuple[augment.BatchedTransform, Callable[[Tensor, Params], Any], float]] = {
    "histogram shift": (augment.RandomHistogramShift(0.7), histogram_shift, 0.05),  # of 6000 HU; slopes reach 10
    "gamma": (augment.RandomGamma(0.7, (0.4, 2.5)), lambda x, own: mt.AdjustContrast(own["gamma"].item())(x), 0.02),
    "scale and shift": (SCALE, scale_shift, 2e-3),
    "noise": (augment.RandomNoise(0.7, (5.0, 50.0)), noise, 1e-3),
    "cut-out": (augment.RandomCutout(0.7, (1, 3), (0.1, 0.5), -1024.0), cutout(-1024.0), 1e-3),
    "cut-out, mean": (augment.RandomCutout(0.7, (1, 3), (0.1, 0.5)), cutout(None), 1e-3),
    "smoothing with zeros": (
        augment.RandomGaussianSmooth(0.7, (0.25, 3.0), padding="zeros"),
        lambda x, own: mt.GaussianSmooth(own["sigma_zyx"].tolist())(x), 2e-3,
    ),
    "smoothing": (augment.RandomGaussianSmooth(0.7, (0.25, 1.5)), smoothed_beyond, 1.5),
    "low resolution": (augment.RandomLowResolution(0.7, (0.3, 1.0)), low_resolution, 5e-3),
}  # fmt: skip


@pytest.mark.parametrize(("transform", "oracle", "atol"), ORACLES.values(), ids=ORACLES)
def test_a_transform_is_monais(transform: Any, oracle: Callable[[Tensor, Params], Any], atol: float) -> None:
    patches = patches_hu(30, SIZE)
    params = transform.draw(torch.arange(30), SIZE)
    assert 10 < params["active"].sum() < 30
    for number, view in enumerate(transform.apply(patches, params)):
        own = {name: values[number] for name, values in params.items()}
        patch = patches[number].float()
        expected = plain(oracle(patch, own)) if own["active"] else patch
        torch.testing.assert_close(view, expected, atol=atol, rtol=0)


def test_control_points_are_drawn_as_monai_draws_them() -> None:
    mapped = augment.RandomHistogramShift(1.0).draw(torch.arange(2000), SIZE)["mapped"].numpy()
    monai, drawn = mt.RandHistogramShift(prob=1.0).set_random_state(seed=0), []
    for _ in range(2000):
        monai.randomize()
        drawn.append(monai.floating_control_points)
    assert (np.diff(mapped) >= 0).all() and (mapped[:, [0, 9]] == [0, 1]).all()
    for point in range(1, 9):
        assert stats.ks_2samp(mapped[:, point], np.stack(drawn)[:, point]).pvalue > 1e-4


@pytest.mark.parametrize("hu", [-3024.0, 0.0, 37.0])
def test_a_single_intensity_stays(hu: float) -> None:
    uniform = torch.full((6, 1, *SIZE), hu)
    for transform in (augment.RandomHistogramShift(1.0), augment.RandomGamma(1.0)):
        assert torch.equal(transform(uniform, torch.arange(6)), uniform)
    for transform in (augment.RandomGaussianSmooth(1.0), augment.RandomSliceThickness(1.0)):
        torch.testing.assert_close(transform(uniform, torch.arange(6)), uniform)
    nearly = uniform.clone()
    nearly[:, :, 3, 3, 3] += 1
    view = augment.RandomHistogramShift(1.0)(nearly, torch.arange(6))
    torch.testing.assert_close(torch.stack(view.aminmax()), torch.tensor([hu, hu + 1]), atol=1e-3, rtol=0)


def test_what_is_drawn_is_uniform_within_its_bounds() -> None:
    seeds = torch.arange(4000)
    cuts = augment.RandomCutout(0.5, (1, 3), (0.1, 0.5)).draw(seeds, SIZE)
    assert (cuts["start"] + cuts["size"] <= torch.tensor(SIZE)).all() and (cuts["start"] >= 0).all()
    assert cuts["size"].amax((0, 1)).tolist() == [5, 8, 6]
    assert set((cuts["size"].amin(2) > 0).sum(1).tolist()) == {1, 2, 3}
    removal = augment.RandomContextRemoval(
        0.5, radius=(3, 4), lung_prob=0.8, lung_hu=(-900, -800), tissue_hu=(0, 50)
    ).draw(seeds, SIZE)
    fill = removal["fill_hu"]
    lung = (fill >= -900) & (fill <= -800)
    assert (lung | ((fill >= 0) & (fill <= 50))).all()
    assert lung.float().mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 4000))  # four standard errors
    sigma = augment.RandomGaussianSmooth(0.5, (0.25, 1.5)).draw(seeds, SIZE)["sigma_zyx"]
    std = augment.RandomNoise(0.5, (5.0, 50.0)).draw(seeds, SIZE)["std_hu"]
    for values, low, high in ((removal["radius"], 3, 4), (sigma, 0.25, 1.5), (std, 5, 50)):
        assert stats.kstest((values.double().numpy().ravel() - low) / (high - low), "uniform").pvalue > 1e-4


def test_a_soft_ball_stays_and_the_rest_is_noise_about_one_intensity() -> None:
    seeds, images = torch.arange(40), patches_hu(40, SIZE).float()
    transform = augment.RandomContextRemoval(1.0, radius=(2.0, 5.0), softness=0.5, noise_std_hu=0.0)
    params = transform.draw(seeds, SIZE)
    views = transform.apply(images, params)
    for number in (0, 17):
        radius, fill_hu = float(params["radius"][number]), float(params["fill_hu"][number])
        for voxel in [(5, 8, 6), (4, 6, 9), (4, 9, 7), (2, 6, 7), (0, 0, 0), (7, 11, 12)]:
            share = 1 / (1 + math.exp(-(radius - math.dist(voxel, (5, 8, 6))) / 0.5))
            expected = share * float(images[number, 0][voxel]) + (1 - share) * fill_hu
            assert float(views[number, 0][voxel]) == pytest.approx(expected, abs=0.01)
    noisy = augment.RandomContextRemoval(1.0, radius=(0.0, 0.0), softness=0.1, noise_std_hu=30.0)
    far = noisy(images, seeds)[:, 0, :, :3] - noisy.draw(seeds, SIZE)["fill_hu"].view(-1, 1, 1, 1)
    assert far.std() == pytest.approx(30, rel=0.02) and abs(far.mean()) < 1


def test_thick_slices_are_means_over_slabs_read_linearly() -> None:
    transform, patches = augment.RandomSliceThickness(1.0, (1.0, 6.0)), patches_hu(30, (23, 2, 3))
    params = transform.draw(torch.arange(30), (23, 2, 3))
    params["thickness"][0], params["phase"][0] = 1.0, 0.0  # slices of one voxel change nothing
    views = transform.apply(patches, params)
    torch.testing.assert_close(views[0], patches[0].float(), atol=1e-2, rtol=0)
    fine = 200  # points a voxel
    drawn = zip(params["thickness"].tolist(), params["phase"].tolist(), strict=True)
    for patch, view, (thickness, phase) in zip(patches.double().numpy(), views.numpy(), drawn, strict=True):
        slab = np.floor((np.arange(23 * fine) + 0.5) / fine / thickness + phase).astype(int)
        voxels, numbers = patch[0].repeat(fine, 0), np.unique(slab)
        means = np.stack([voxels[slab == number].mean(0) for number in numbers])
        centers = (numbers + 0.5 - phase) * thickness
        flat = [np.interp(np.arange(23) + 0.5, centers, line) for line in means.reshape(len(means), -1).T]
        expected = np.stack(flat, 1).reshape(23, 2, 3)
        np.testing.assert_allclose(view[0], expected, atol=25)  # of 4000 HU: slabs end within a 200th of a voxel


def test_matrices_act_along_their_axes() -> None:
    drawn = torch.Generator().manual_seed(0)
    along_z, along_x = torch.rand(3, 4, 5, generator=drawn), torch.rand(3, 7, 6, generator=drawn)
    images = torch.rand(3, 1, 5, 5, 6, generator=drawn) * 1000
    expected = torch.einsum("nai,nck,nmijk->nmajc", along_z, along_x, images)
    torch.testing.assert_close(along_axes(images, (along_z, None, along_x)), expected)


def test_a_published_view_is_bit_for_bit_what_the_published_list_makes() -> None:
    published = mt.Compose([
        augment.RandResizedCrop(SIZE), mt.RandAxisFlip(prob=0.5), mt.RandHistogramShift(prob=0.5),
        mt.RandGaussianSmooth(prob=0.5), mt.SpatialPad(SIZE, value=-1024),
        mt.ThresholdIntensity(threshold=-1024, above=True, cval=-1024),
        mt.NormalizeIntensity(subtrahend=-1024, divisor=3072),
    ])  # fmt: skip
    patches, seeds = patches_hu(40, SIZE), torch.arange(40)
    views = Preprocessing().normalize(augment.PublishedViews(SIZE)(patches, seeds))
    for patch, seed, view in zip(patches.float(), seeds.tolist(), views, strict=True):
        published.set_random_state(seed=seed)
        assert torch.equal(view, published(patch).as_subclass(Tensor))


@pytest.mark.parametrize("size", [SIZE, (50, 50, 50)])
def test_the_batched_recipe_is_monais_chain_with_the_same_parameters(size: Size) -> None:
    views = augment.BatchedPublishedViews(size)
    patches, seeds = patches_hu(64, size), torch.arange(64)
    params, combinations = views.draw(seeds, size), set()
    for number, view in enumerate(views(patches, seeds)):
        geometry, histogram, smooth = ({k: v[number] for k, v in params[name].items()} for name in params)
        z, y, x = box(params["geometry"], number)
        image = F.interpolate(patches[number][None, :, z, y, x].float(), size=size, mode="trilinear")[0]
        flipped = geometry["flip"].nonzero()[:, 0].tolist()
        image = mt.Flip(spatial_axis=flipped)(image) if flipped else image
        image = histogram_shift(image, histogram) if histogram["active"] else image
        image = mt.GaussianSmooth(smooth["sigma_zyx"].tolist())(image) if smooth["active"] else image
        np.testing.assert_allclose(view.numpy(), np.asarray(image), atol=0.06)  # HU, where slopes reach 10
        combinations.add((len(flipped), bool(histogram["active"]), bool(smooth["active"])))
    assert len(combinations) == 8


def test_the_batched_recipe_draws_as_often_as_published() -> None:
    params = augment.BatchedPublishedViews().draw(torch.arange(4000), (50, 50, 50))
    flips = params["geometry"]["flip"]
    assert flips.sum(1).max() == 1
    together = torch.stack([params["smooth"]["active"], params["histogram_shift"]["active"], flips.any(1)]).float()
    assert ((together.mean(1) - 0.5).abs() < 0.04).all()
    assert (torch.corrcoef(together) - torch.eye(3)).abs().max() < 0.08


def test_the_published_crop_has_one_factor_and_reaches_every_border() -> None:
    """Of an image that shows its coordinates."""
    size = (20, 30, 40)
    edges = torch.tensor(size)
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    crop = augment.MonaiViews([augment.RandResizedCrop(size, crop_edge=(0.5, 0.9))])
    views = crop(grid.expand(300, -1, -1, -1, -1), torch.arange(300))
    # Half-pixel centres: an output voxel in the middle is at start + (i + .5) * length / size - .5.
    starts, lengths = [], []
    for axis, n in enumerate(size):
        line = views[:, axis].movedim(1 + axis, 1).flatten(2)[:, :, 0]
        slope = line[:, n // 2] - line[:, n // 2 - 1]
        lengths.append((slope * n).round())
        starts.append((line[:, n // 2] + 0.5 - (n // 2 + 0.5) * slope).round())
    start, length = torch.stack(starts, 1), torch.stack(lengths, 1)
    factors = length / edges
    assert ((factors - 1 / edges).amax(1) < factors.amin(1)).all(), "no single factor makes these boxes"
    assert 0.5 <= factors.amin() < 0.55 and 0.85 < factors[:, 2].amax() <= 0.9
    assert (start == 0).any(0).all() and (start + length == edges).any(0).all()
    z, y, x = (slice(int(s), int(s + n)) for s, n in zip(start[7], length[7], strict=True))
    torch.testing.assert_close(views[7], plain(mt.Resize(size, mode="trilinear")(grid[:, z, y, x])))
