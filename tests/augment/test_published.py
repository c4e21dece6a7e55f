"""Views against MONAI's own transforms, against what is left in them of the patch, and against their seeds."""

from __future__ import annotations

import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data.meta_obj import get_track_meta
from monai.transforms import (
    Compose,
    NormalizeIntensity,
    RandAxisFlip,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandHistogramShift,
    Resize,
    SpatialPad,
    ThresholdIntensity,
)
from scipy import special, stats
from torch import Tensor

from fmcib_ssl.augment import MonaiViews, PublishedViews, RandResizedCrop
from fmcib_ssl.types import Preprocessing, ViewTransform

SIZE = (10, 14, 12)


def patch_hu(size: tuple[int, int, int] = SIZE, seed: int = 0) -> Tensor:
    """Tissue and air, some of it below the range that the encoder sees."""
    noise = np.random.default_rng(seed).normal(-300, 600, size=(1, *size))
    return torch.from_numpy(noise.clip(-3024, 3071).astype(np.int16))


class Seen(PublishedViews):
    """Views as the encoder sees them."""

    def __call__(self, patch: Tensor, seed: int) -> Tensor:  # type: ignore[override]  # one view, as MONAI makes them
        return Preprocessing().normalize(super().__call__(patch[None], torch.tensor([seed]))[0])


def only(**chosen: object) -> Seen:
    """The published views with everything random off but what is chosen."""
    off = {"crop_edge": (1.0, 1.0), "flip_prob": 0.0, "histogram_shift_prob": 0.0, "smooth_prob": 0.0}
    return Seen(SIZE, **{**off, **chosen})  # type: ignore[arg-type]


def box_of(image: Tensor, size: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """Where a crop of an image of coordinates lay: starts and lengths along z, y, x."""
    starts, lengths = [], []
    for axis in range(3):
        line = image[axis].movedim(axis, 0).flatten(1)[:, 0]
        # Half-pixel centres: an output voxel in the middle is at start + (i + .5) * length / size - .5.
        middle = size[axis] // 2
        slope = (line[middle] - line[middle - 1]).item()
        lengths.append(round(slope * size[axis]))
        starts.append(round(line[middle].item() + 0.5 - (middle + 0.5) * slope))
    return starts, lengths


def coordinates(size: tuple[int, int, int]) -> Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))


def test_crop_has_one_factor_and_reaches_every_border() -> None:
    image, size = coordinates((20, 30, 40)), (16, 16, 20)
    crop = RandResizedCrop(size, (0.5, 1.0))
    factors, touched = [], set()
    for seed in range(200):
        crop.set_random_state(seed=seed)
        starts, lengths = box_of(crop(image), size)
        low = max((length - 1) / edge for length, edge in zip(lengths, (20, 30, 40), strict=True))
        high = min(length / edge for length, edge in zip(lengths, (20, 30, 40), strict=True))
        assert low < high, f"no single factor makes a box of {lengths}"
        factors.append(high)
        for axis, (start, length, edge) in enumerate(zip(starts, lengths, (20, 30, 40), strict=True)):
            assert 0 <= start <= edge - length
            touched |= {
                (axis, side) for side, touches in (("low", start == 0), ("high", start + length == edge)) if touches
            }
    assert min(factors) < 0.55
    assert max(factors) > 0.95
    assert len(touched) == 6


def test_crop_is_resized_as_by_monai() -> None:
    image = patch_hu((20, 30, 40)).float()
    both = torch.cat([image, coordinates((20, 30, 40))])
    crop = RandResizedCrop((16, 16, 20), (0.6, 0.9))
    for seed in range(20):
        crop.set_random_state(seed=seed)
        view = crop(both)
        starts, lengths = box_of(view[1:], (16, 16, 20))
        z, y, x = (slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
        expected = Resize((16, 16, 20), mode="trilinear")(image[:, z, y, x])
        torch.testing.assert_close(view[:1], torch.as_tensor(expected).as_subclass(Tensor))


def test_without_randomness_a_view_is_the_normalised_patch() -> None:
    patch = patch_hu()
    expected = (np.maximum(patch.numpy().astype(np.float64), -1024) + 1024) / 3072
    np.testing.assert_allclose(only()(patch, 3).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(only()(patch, 3), Preprocessing().normalize(patch))


def test_a_view_is_bit_for_bit_what_the_published_list_makes() -> None:
    published = Compose([
        RandResizedCrop(SIZE), RandAxisFlip(prob=0.5), RandHistogramShift(prob=0.5), RandGaussianSmooth(prob=0.5),
        SpatialPad(SIZE, value=-1024), ThresholdIntensity(threshold=-1024, above=True, cval=-1024),
        NormalizeIntensity(subtrahend=-1024, divisor=3072),
    ])  # fmt: skip
    views = Seen(SIZE)
    for seed in range(40):
        published.set_random_state(seed=seed)
        expected = published(patch_hu(seed=seed).float())
        assert torch.equal(views(patch_hu(seed=seed), seed), expected.as_subclass(Tensor))


def test_flips_are_of_one_axis_each_equally_often() -> None:
    patch, flip = patch_hu(), only(flip_prob=0.5)
    plain = Preprocessing().normalize(patch)
    counts = [0, 0, 0, 0]
    for seed in range(300):
        view = flip(patch, seed)
        same = [torch.equal(view, plain if axis == 0 else plain.flip(axis)) for axis in range(4)]
        assert sum(same) == 1
        counts[same.index(True)] += 1
    # Binomial, five standard deviations: 150 +- 43 unflipped, 50 +- 32 along each axis.
    assert 107 < counts[0] < 193
    assert all(18 < count < 82 for count in counts[1:])


def test_histogram_shift_keeps_order_and_range() -> None:
    patch, shift = patch_hu().clamp_min(-1024), only(histogram_shift_prob=1.0)
    plain, view = Preprocessing().normalize(patch).flatten(), shift(patch, 1).flatten()
    assert (view[plain.argsort()].diff() >= -1e-6).all()
    torch.testing.assert_close(torch.stack(view.aminmax()), torch.stack(plain.aminmax()))
    assert (view - plain).abs().max() > 0.01


def test_smoothing_is_gaussian_with_the_published_widths() -> None:
    patch = torch.zeros((1, 33, 33, 33), dtype=torch.int16)  # 0 HU, as MONAI's blur pads
    patch[0, 16, 16, 16] = 3072
    smooth = Seen((33, 33, 33), crop_edge=(1, 1), flip_prob=0, histogram_shift_prob=0, smooth_prob=1)
    sigmas = []
    for seed in range(30):
        view = smooth(patch, seed)[0].double().numpy() - 1 / 3
        assert view.sum() == pytest.approx(1, abs=1e-3)
        # A normal density integrated over voxels: the middle one holds erf(1 / (2 sqrt(2) sigma)) of it.
        profiles = [view.sum(axis=other) for other in ((1, 2), (0, 2), (0, 1))]
        sigma = [0.5 / (math.sqrt(2) * special.erfinv(profile[16])) for profile in profiles]
        edges = np.arange(34) - 16.5
        z, y, x = (np.diff(stats.norm.cdf(edges, scale=scale)) for scale in sigma)
        np.testing.assert_allclose(view, z[:, None, None] * y[:, None] * x, atol=1e-4)
        sigmas += sigma
    assert 0.25 <= min(sigmas) < 0.35
    assert 1.4 < max(sigmas) <= 1.5


@pytest.mark.parametrize("hu", [-3024, -1024, -1000, 0, 37, 3071])
@pytest.mark.filterwarnings("ignore:The image's intensity is a single value")
def test_uniform_patches_stay_finite(hu: int) -> None:
    views = Seen(SIZE, histogram_shift_prob=1.0, smooth_prob=1.0)
    uniform = torch.full((1, *SIZE), hu, dtype=torch.int16)
    nearly = uniform.clone()
    nearly[0, 3, 3, 3] += 1
    for seed in range(20):
        for patch in (uniform, nearly):
            view = views(patch, seed)
            assert view.isfinite().all()
            assert view.min() >= 0
            # The blur takes 0 HU for what lies outside; nothing else can leave the range of the patch.
            low, high = sorted(((max(hu, -1024) + 1024) / 3072, 1 / 3))
            assert low - 1e-3 <= view.min() <= view.max() <= high + 1e-3


def test_a_view_is_a_function_of_patch_and_seed() -> None:
    views: ViewTransform = PublishedViews(SIZE)
    patches, seeds = patch_hu().expand(12, -1, -1, -1, -1), torch.arange(12)
    before = patches.clone()
    first = views(patches, seeds)
    fresh = pickle.loads(pickle.dumps(views))  # as a worker that does not fork gets it
    assert torch.equal(first, views(patches, seeds.flip(0)).flip(0))
    assert torch.equal(first, fresh(patches.float(), seeds))
    assert torch.equal(first[3:4], views(patches[:1], seeds[3:4]))
    assert len(first.flatten(1).unique(dim=0)) == 12
    assert torch.equal(patches, before)


def test_what_leaves_is_a_plain_tensor_and_nothing_global_changes() -> None:
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for seed in range(8):
        view = PublishedViews((8, 9, 7))(patch_hu()[None], torch.tensor([seed]))
        assert type(view) is Tensor
        assert view.dtype == torch.float32
        assert view.shape == (1, 1, 8, 9, 7)
        assert view.is_contiguous()
        assert view.untyped_storage().nbytes() == view.nbytes  # a view of something larger would be sent whole
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert get_track_meta()


def test_any_list_of_monai_transforms_makes_views() -> None:
    noise = MonaiViews([RandGaussianNoise(prob=1.0, mean=0.0, std=1.0)])
    patches = torch.zeros(3, 1, 16, 16, 16, dtype=torch.int16)
    views = noise(patches, torch.tensor([5, 5, 6]))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    with pytest.raises(ValueError, match="no transforms"):
        MonaiViews([])


@pytest.mark.parametrize("edge", [(0.0, 1.0), (0.8, 0.5), (0.5, 1.2)])
def test_impossible_crops_are_refused(edge: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="crop_edge"):
        PublishedViews(SIZE, crop_edge=edge)


def test_views_of_a_real_scan_stay_in_its_range(real_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    scan = next(
        path for path in sorted((real_data / "ct").rglob("*")) if path.name.endswith((".nii.gz", ".nrrd", ".mha"))
    )
    volume = sitk.GetArrayFromImage(sitk.ReadImage(str(scan)))
    corner = [max(0, n // 2 - 25) for n in volume.shape]
    patch = torch.from_numpy(volume[tuple(slice(c, c + 50) for c in corner)].astype(np.int16))[None]
    views = Seen((50, 50, 50))
    plain = Preprocessing().normalize(patch)
    for seed in range(5):
        view = views(patch, seed)
        assert view.shape == (1, 50, 50, 50)
        assert min(plain.min(), torch.tensor(1 / 3)) - 1e-4 <= view.min()
        assert view.max() <= max(plain.max(), torch.tensor(1 / 3)) + 1e-4
        assert view.std() > 0
