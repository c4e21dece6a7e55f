"""Smoothing, lower resolution and thicker slices against MONAI's and against averages written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from given import patches_hu
from monai.transforms import GaussianSmooth, RandSimulateLowResolution
from torch import Tensor

from fmcib_ssl.augment import RandomGaussianSmooth, RandomLowResolution, RandomSliceThickness
from fmcib_ssl.augment.geometry import along_axes
from fmcib_ssl.augment.resolution import LowResolutionParams, SliceThicknessParams

SIZE = (10, 17, 13)


def plain(image: object) -> Tensor:
    return torch.as_tensor(image).as_subclass(Tensor)


def test_smoothing_with_zeros_is_monais() -> None:
    transform, patches = RandomGaussianSmooth(0.8, (0.25, 3.0), padding="zeros"), patches_hu(20, SIZE)
    params = transform.draw(torch.arange(20), SIZE)
    smooth = transform.apply(patches, params)
    assert 10 < params.active.sum() < 20
    for patch, view, active, sigma in zip(patches.float(), smooth, *params, strict=True):
        expected = plain(GaussianSmooth(sigma.tolist())(patch)) if active else patch
        torch.testing.assert_close(view, expected, atol=2e-3, rtol=0)


def test_smoothing_with_borders_is_monais_of_a_patch_that_goes_on() -> None:
    transform, patches = RandomGaussianSmooth(1.0, (0.25, 1.5)), patches_hu(10, SIZE)
    params = transform.draw(torch.arange(10), SIZE)
    reach = 7
    for patch, view, sigma in zip(patches.float(), transform.apply(patches, params), params.sigma_zyx, strict=True):
        wide = F.pad(patch[None], (reach,) * 6, mode="replicate")[0]
        expected = plain(GaussianSmooth(sigma.tolist())(wide))[:, reach:-reach, reach:-reach, reach:-reach]
        # MONAI's kernels end at 4 sigma and sum to 0.9999; here a uniform patch stays what it is.
        torch.testing.assert_close(view, expected, atol=1.0, rtol=3e-4)
    uniform = torch.full((10, 1, *SIZE), 1000.0)
    torch.testing.assert_close(transform.apply(uniform, params), uniform)


def test_widths_are_uniform_within_their_bounds() -> None:
    sigma = RandomGaussianSmooth(0.5, (0.25, 1.5)).draw(torch.arange(3000), SIZE).sigma_zyx
    assert 0.25 <= sigma.min() < 0.27 and 1.48 < sigma.max() <= 1.5
    assert torch.allclose(sigma.mean(0), torch.full((3,), 0.875), atol=0.035)  # five standard deviations


@pytest.mark.parametrize("size", [SIZE, (50, 50, 50)])
def test_low_resolution_is_monais(size: tuple[int, int, int]) -> None:
    transform = RandomLowResolution(1.0)
    zooms = torch.linspace(0.3, 1.0, 15)
    patches = patches_hu(15, size)
    views = transform.apply(patches, LowResolutionParams(torch.ones(15, dtype=torch.bool), zooms))
    monai = RandSimulateLowResolution(prob=1.0)
    monai.randomize()
    for patch, view, zoom in zip(patches.float(), views, zooms.tolist(), strict=True):
        monai.zoom_factor = zoom
        expected = plain(monai(patch, randomize=False))
        torch.testing.assert_close(view, expected, atol=5e-3, rtol=0)


def test_thick_slices_are_means_over_slabs_read_linearly() -> None:
    transform, patches = RandomSliceThickness(1.0, (1.0, 6.0)), patches_hu(30, (23, 2, 3))
    params = transform.draw(torch.arange(30), (23, 2, 3))
    views = transform.apply(patches, params)
    fine = 200  # places a voxel
    for patch, view, _, thickness, phase in zip(patches.double().numpy(), views.numpy(), *params, strict=True):
        place = (np.arange(23 * fine) + 0.5) / fine
        slab = np.floor(place / thickness.item() + phase.item()).astype(int)
        voxels = patch[0].repeat(fine, 0)
        numbers = np.unique(slab)
        means = np.stack([voxels[slab == number].mean(0) for number in numbers])
        centers = (numbers + 0.5 - phase.item()) * thickness.item()
        flat = [np.interp(np.arange(23) + 0.5, centers, line) for line in means.reshape(len(means), -1).T]
        expected = np.stack(flat, 1).reshape(23, 2, 3)
        np.testing.assert_allclose(view[0], expected, atol=25)  # of 4000 HU: slabs end within a 200th of a voxel


def test_slices_of_one_voxel_change_nothing_and_a_uniform_patch_stays() -> None:
    params = SliceThicknessParams(torch.tensor([True, True]), torch.tensor([1.0, 4.5]), torch.tensor([0.0, 0.3]))
    patches = patches_hu(2, SIZE).float()
    patches[1] = 77.0
    torch.testing.assert_close(RandomSliceThickness(1.0, (1.0, 5.0)).apply(patches, params), patches, atol=1e-2, rtol=0)


def test_matrices_act_along_their_axes() -> None:
    drawn = torch.Generator().manual_seed(0)
    along_z, along_x = torch.rand(3, 4, 5, generator=drawn), torch.rand(3, 7, 6, generator=drawn)
    images = torch.rand(3, 1, 5, 5, 6, generator=drawn) * 1000
    expected = torch.einsum("nai,nck,nmijk->nmajc", along_z, along_x, images)
    torch.testing.assert_close(along_axes(images, (along_z, None, along_x)), expected)
