"""Intensities against MONAI's transforms with the same parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from given import patches_hu
from monai.transforms import (
    AdjustContrast,
    RandCoarseDropout,
    RandGaussianNoise,
    RandHistogramShift,
    ScaleIntensity,
    ShiftIntensity,
)
from scipy import stats
from torch import Tensor

from fmcib_ssl.augment import (
    RandomContextRemoval,
    RandomCutout,
    RandomGamma,
    RandomHistogramShift,
    RandomNoise,
    RandomScaleShift,
)
from fmcib_ssl.augment.intensity import ScaleShiftParams
from fmcib_ssl.augment.streams import normals

SIZE = (10, 17, 13)


def plain(image: object) -> Tensor:
    return torch.as_tensor(image).as_subclass(Tensor)


def monai_shift(mapped: Tensor) -> RandHistogramShift:
    shift = RandHistogramShift(prob=1.0)
    shift.randomize()
    shift.reference_control_points = np.linspace(0, 1, len(mapped))
    shift.floating_control_points = mapped.double().numpy()
    return shift


def test_histogram_shift_is_monais() -> None:
    transform, patches = RandomHistogramShift(0.7), patches_hu(24, SIZE)
    params = transform.draw(torch.arange(24), SIZE)
    shifted = transform.apply(patches, params)
    assert 10 < params.active.sum() < 24
    for patch, view, active, mapped in zip(patches.float(), shifted, *params, strict=True):
        expected = plain(monai_shift(mapped)(patch, randomize=False)) if active else patch
        torch.testing.assert_close(view, expected, atol=0.05, rtol=0)  # of 6000 HU; slopes reach 10


def test_control_points_are_drawn_as_monai_draws_them() -> None:
    mapped = RandomHistogramShift(1.0).draw(torch.arange(2000), SIZE).mapped.numpy()
    monai = RandHistogramShift(prob=1.0).set_random_state(seed=0)
    drawn = []
    for _ in range(2000):
        monai.randomize()
        drawn.append(monai.floating_control_points)
    assert (np.diff(mapped) >= 0).all()
    for point in range(1, 9):
        assert stats.ks_2samp(mapped[:, point], np.stack(drawn)[:, point]).pvalue > 1e-4
    assert (mapped[:, [0, 9]] == [0, 1]).all()


@pytest.mark.parametrize("hu", [-3024.0, 0.0, 37.0])
def test_a_single_intensity_stays(hu: float) -> None:
    uniform = torch.full((6, 1, *SIZE), hu)
    for transform in (RandomHistogramShift(1.0), RandomGamma(1.0)):
        assert torch.equal(transform.apply(uniform, transform.draw(torch.arange(6), SIZE)), uniform)  # type: ignore[attr-defined]
    nearly = uniform.clone()
    nearly[:, :, 3, 3, 3] += 1
    shifted = RandomHistogramShift(1.0)
    view = shifted.apply(nearly, shifted.draw(torch.arange(6), SIZE))
    torch.testing.assert_close(torch.stack(view.aminmax()), torch.tensor([hu, hu + 1]), atol=1e-3, rtol=0)


def test_gamma_is_monais() -> None:
    transform, patches = RandomGamma(0.8, (0.4, 2.5)), patches_hu(12, SIZE)
    params = transform.draw(torch.arange(12), SIZE)
    for patch, view, active, gamma in zip(patches.float(), transform.apply(patches, params), *params, strict=True):
        expected = plain(AdjustContrast(gamma.item())(patch)) if active else patch
        torch.testing.assert_close(view, expected, atol=0.02, rtol=0)


def test_scale_and_shift_are_monais() -> None:
    transform, patches = RandomScaleShift(0.8, (0.5, 1.5), (-100.0, 100.0), pivot_hu=0.0), patches_hu(12, SIZE)
    params = transform.draw(torch.arange(12), SIZE)
    for patch, view, *drawn in zip(patches.float(), transform.apply(patches, params), *params, strict=True):
        active, scale, shift = (value.item() for value in drawn)
        scaled = ScaleIntensity(minv=None, maxv=None, factor=scale - 1)(patch)
        expected = plain(ShiftIntensity(shift)(scaled)) if active else patch
        torch.testing.assert_close(view, expected, atol=2e-3, rtol=0)
    air = torch.full((1, 1, 2, 2, 2), -1000.0)
    twice = ScaleShiftParams(torch.tensor([True]), torch.tensor([2.0]), torch.tensor([5.0]))
    assert torch.equal(RandomScaleShift(1.0).apply(air, twice), air + 5)


def test_noise_has_the_width_that_was_drawn() -> None:
    transform = RandomNoise(0.8, (5.0, 50.0))
    params = transform.draw(torch.arange(20), (20, 20, 20))
    noise = transform.apply(torch.zeros(20, 1, 20, 20, 20), params)
    for view, active, std in zip(noise, params.active, params.std_hu.tolist(), strict=True):
        if not active:
            assert not view.any()
            continue
        standard = view.flatten().double().numpy() / std
        assert stats.kstest(standard, "norm").pvalue > 1e-4
    assert 5 <= params.std_hu.min() < 15 and 40 < params.std_hu.max() <= 50


def test_noise_is_monais_with_the_same_numbers() -> None:
    transform, patches = RandomNoise(0.7, (5.0, 50.0)), patches_hu(12, SIZE)
    params = transform.draw(torch.arange(12), SIZE)
    monai = RandGaussianNoise(prob=1.0)
    monai.randomize(patches[0])
    for number, (patch, view) in enumerate(zip(patches.float(), transform.apply(patches, params), strict=True)):
        monai.noise = normals(params.seed[number : number + 1], patch.numel()).view(patch.shape) * params.std_hu[number]
        expected = plain(monai(patch, randomize=False)) if params.active[number] else patch
        torch.testing.assert_close(view, expected, atol=1e-3, rtol=0)


def test_cutout_is_monais_with_the_same_holes() -> None:
    patches = patches_hu(30, SIZE)
    for fill in (-1024.0, None):
        transform = RandomCutout(0.8, (1, 3), (0.1, 0.5), fill)
        params = transform.draw(torch.arange(30), SIZE)
        views = transform.apply(patches, params)
        numbers = set()
        for patch, view, active, start, size in zip(patches.float(), views, *params, strict=True):
            monai = RandCoarseDropout(
                holes=1, spatial_size=2, fill_value=patch.mean().item() if fill is None else fill, prob=1.0
            )
            holes = [
                (slice(None), *(slice(a, a + n) for a, n in zip(s, length, strict=True)))
                for s, length in zip(start.tolist(), size.tolist(), strict=True)
                if min(length) > 0
            ]
            numbers.add(len(holes))
            monai.randomize((10, 17, 13))
            monai.hole_coords = holes
            expected = plain(monai(patch.clone(), randomize=False)) if active else patch
            torch.testing.assert_close(view, expected, atol=1e-3, rtol=0)
        assert numbers == {1, 2, 3}
        assert (params.start + params.size <= torch.tensor(SIZE)).all() and (params.start >= 0).all()
        assert params.size.amax((0, 1)).tolist() == [5, 8, 6]


def test_a_soft_ball_stays_and_the_rest_is_one_intensity() -> None:
    transform = RandomContextRemoval(1.0, radius=(2.0, 5.0), softness=0.5, noise_std_hu=0.0)
    params, images = transform.draw(torch.arange(40), SIZE), patches_hu(40, SIZE).float()
    found = transform.apply(images, params)
    for view in (0, 17):
        radius, fill_hu = float(params.radius[view]), float(params.fill_hu[view])
        for place in [(5, 8, 6), (4, 6, 9), (4, 9, 7), (2, 6, 7), (0, 0, 0), (7, 11, 12)]:
            kept = 1 / (1 + math.exp(-(radius - math.dist(place, (5, 8, 6))) / 0.5))
            expected = kept * float(images[view, 0][place]) + (1 - kept) * fill_hu
            assert float(found[view, 0][place]) == pytest.approx(expected, abs=0.01)


def test_what_is_drawn_is_within_its_bounds_and_lung_as_often_as_asked_for() -> None:
    transform = RandomContextRemoval(0.5, radius=(3, 4), lung_prob=0.8, lung_hu=(-900, -800), tissue_hu=(0, 50))
    params = transform.draw(torch.arange(4000), SIZE)
    lung = (params.fill_hu >= -900) & (params.fill_hu <= -800)
    assert (lung | ((params.fill_hu >= 0) & (params.fill_hu <= 50))).all()
    assert ((params.radius >= 3) & (params.radius <= 4)).all()
    # Four standard errors of a share of 4000.
    assert lung.float().mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 4000))
    assert params.active.float().mean() == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_noise_has_its_deviation_and_the_untouched_stay_as_they_are() -> None:
    transform = RandomContextRemoval(0.5, radius=(0.0, 0.0), softness=0.1, noise_std_hu=30.0)
    params, images = transform.draw(torch.arange(40), SIZE), patches_hu(40, SIZE).float()
    found = transform.apply(images, params)
    torch.testing.assert_close(found[~params.active], images[~params.active])
    rest = found[params.active][:, 0, :, :3] - params.fill_hu[params.active].view(-1, 1, 1, 1)
    assert rest.std() == pytest.approx(30, rel=0.02) and abs(rest.mean()) < 1
