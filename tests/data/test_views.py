"""Views of pairs, with a transform that shows its seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from monai.transforms import RandFlip
from torch import Tensor
from torch.utils.data import default_collate

from fmcib_ssl.augment import (
    BatchedPublishedViews,
    BatchedViews,
    MonaiViews,
    PublishedViews,
    RandomGamma,
    RandomNoise,
)
from fmcib_ssl.data.datamodule import LesionDataModule
from fmcib_ssl.data.labelled import LabelledPatches
from fmcib_ssl.data.views import SeededPairDataset, ViewCollation, ViewPairDataset, batch_of_views
from fmcib_ssl.types import BatchViewTransform, PatchPair, Preprocessing, SampleKey, ViewTransform

SIZE = (6, 8, 10)


class AsTheyAre(Preprocessing):
    """Hands on what views show, which is no HU here."""

    def normalize(self, patch_hu: Tensor) -> Tensor:  # type: ignore[override]
        return patch_hu


AS_THEY_ARE = AsTheyAre()


#: Of every kind of transform one that changes nothing.
IDENTITIES: dict[str, ViewTransform] = {
    "monai": MonaiViews([RandFlip(prob=0.0)]),
    "published": PublishedViews(SIZE, crop_edge=(1, 1), flip_prob=0, histogram_shift_prob=0, smooth_prob=0),
    "batched_published": BatchedPublishedViews(
        SIZE, crop_edge=(1, 1), flip_prob=0, histogram_shift_prob=0, smooth_prob=0
    ),
    "batched": BatchedViews({"gamma": RandomGamma(0.0), "noise": RandomNoise(0.0)}),
    "own": lambda patch, seed: patch.float(),
}


@pytest.mark.parametrize("transform", IDENTITIES.values(), ids=IDENTITIES)
@pytest.mark.parametrize("place", ["one by one", "workers", "device", "labelled"])
def test_views_of_every_kind_are_normalised_as_the_preprocessing_says(transform: ViewTransform, place: str) -> None:
    lung = Preprocessing(SIZE, padding_hu=-900, hu_offset=800.0, hu_scale=1500.0)
    pairs = [Noise()[SampleKey(0, index)] for index in range(3)]
    expected = [(pair["positive"].double().clamp_min(-900) + 800) / 1500 for pair in pairs]
    data = LesionDataModule(Noise(), transform, preprocessing=lung, batch_size=3, shuffle=False)
    if place == "one by one":
        views = [data.dataset[index]["positive"][1] for index in range(3)]
    elif place == "labelled":
        labelled = LabelledPatches(
            lambda row: pairs[row]["positive"], range(3), np.zeros(3), lung, view_transform=transform
        )
        views = [labelled[index]["view"] for index in range(3)]
    else:
        if place == "device" and not isinstance(transform, BatchViewTransform):
            pytest.skip("makes one view at a time, in workers")
        data = LesionDataModule(
            Noise(), transform, preprocessing=lung, batch_size=3, shuffle=False,
            views_on="device" if place == "device" else "workers",
        )  # fmt: skip
        batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        views = list(batch["positive"][1])
        mined = (torch.stack([pair["negative"] for pair in pairs]).double().clamp_min(-900) + 800) / 1500
        torch.testing.assert_close(batch["negative"][0].double(), mined, atol=1e-6, rtol=0)
    for view, patch in zip(views, expected, strict=True):
        assert view.dtype == torch.float32
        torch.testing.assert_close(view.double(), patch, atol=1e-6, rtol=0)


def test_an_array_is_normalised_as_a_tensor_is() -> None:
    lung, patch = Preprocessing(padding_hu=-900, hu_offset=800.0, hu_scale=1500.0), Noise()[SampleKey(0, 1)]["positive"]
    for given in (patch, patch.float(), patch.double() + 0.3):
        before, found = given.clone(), lung.normalize(given.numpy())
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        assert np.array_equal(found, lung.normalize(given).numpy())
        assert torch.equal(given, before)


class Noise:
    """Patches of noise over all that a CT can hold, and below."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: SampleKey) -> PatchPair:
        draw = np.random.default_rng(key.index)
        positive, negative = torch.from_numpy(draw.integers(-2000, 3000, (2, 1, *SIZE), dtype=np.int16))
        return {"positive": positive, "negative": negative, "lesion": key.index, "negative_from_other_scan": False}

    def title(self, lesion: int) -> str:
        return ""


class Constants:
    """Patches that show their key: the positive is `epoch * 100 + index`, the negative its opposite."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, key: SampleKey) -> PatchPair:
        patch = torch.full((1, 2, 3, 4), key.epoch * 100 + key.index, dtype=torch.int16)
        return {"positive": patch, "negative": -patch, "lesion": key.index, "negative_from_other_scan": key.index == 3}


def show_seed(patch: Tensor, seed: int) -> Tensor:
    return torch.tensor([float(patch[0, 0, 0, 0]), seed], dtype=torch.float64)


def test_every_view_has_a_seed_of_its_own_that_follows_from_the_key() -> None:
    drawn: dict[tuple[int, int, int, str, int], int] = {}
    for seed, epoch, index in itertools.product(range(2), range(3), range(7)):
        views = ViewPairDataset(Constants(), show_seed, seed, AS_THEY_ARE)[SampleKey(epoch, index)]
        for number in range(2):
            drawn[seed, epoch, index, "positive", number] = int(views["positive"][number][1])
            drawn[seed, epoch, index, "negative", number] = int(views["negative"][number][1])
    assert len(set(drawn.values())) == len(drawn)

    dataset = ViewPairDataset(Constants(), show_seed, 1, AS_THEY_ARE)
    for epoch, index in ((2, 6), (0, 0), (2, 6)):  # in any order, again and again
        assert int(dataset[SampleKey(epoch, index)]["negative"][1][1]) == drawn[1, epoch, index, "negative", 1]


def test_seeds_share_no_stream_with_the_plain_key() -> None:
    # NumPy: SeedSequence([a, b]) and SeedSequence([a, b, 0]) are one stream; whoever draws patches may use either.
    views = ViewPairDataset(Constants(), show_seed, 4, AS_THEY_ARE)[SampleKey(2, 0)]
    own = {int(view[1]) for view in (*views["positive"], *views["negative"])}
    for entropy in ([4, 2], [4, 2, 0], [4, 2, 0, 0]):
        assert own.isdisjoint(np.random.SeedSequence(entropy).generate_state(8).tolist())
    assert own.isdisjoint(np.random.SeedSequence(4, spawn_key=(2,)).generate_state(8).tolist())


def test_patches_go_to_their_views_and_the_rest_is_passed_on() -> None:
    dataset = ViewPairDataset(Constants(), show_seed, 0, AS_THEY_ARE)
    views = dataset[SampleKey(2, 3)]
    assert [float(view[0]) for view in views["positive"]] == [203, 203]
    assert [float(view[0]) for view in views["negative"]] == [-203, -203]
    assert views["lesion"] == 3
    assert views["negative_from_other_scan"] is True
    assert len(dataset) == 7


def test_a_number_is_a_lesion_in_epoch_0() -> None:
    dataset = ViewPairDataset(Constants(), show_seed, 0, AS_THEY_ARE)
    assert torch.equal(dataset[5]["positive"][0], dataset[SampleKey(0, 5)]["positive"][0])


class Several(Constants):
    """Three negatives a lesion, or none; each shows which it is."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __getitem__(self, key: SampleKey) -> PatchPair:
        pair = super().__getitem__(key)
        negatives = [pair["negative"] - 1000 * n for n in range(self.num)]
        pair["negative"] = torch.stack(negatives) if negatives else pair["negative"][None][:0]
        return pair


def test_several_negatives_have_views_each() -> None:
    def see(patch: Tensor, seed: int) -> Tensor:
        return torch.full(patch.shape, float(patch.flatten()[0])) + seed / 2**33

    views = ViewPairDataset(Several(3), see, 0, AS_THEY_ARE)[SampleKey(2, 3)]
    one = ViewPairDataset(Constants(), see, 0, AS_THEY_ARE)[SampleKey(2, 3)]
    for number in range(2):
        several = views["negative"][number]
        assert several.shape == (3, 1, 2, 3, 4)
        assert several[:, 0, 0, 0, 0].round().tolist() == [-203, -1203, -2203]
        assert torch.equal(several[0], one["negative"][number])  # the first is what it would be alone
    fractions = torch.stack([*views["negative"]])[:, :, 0, 0, 0, 0] % 1
    assert len(set(fractions.flatten().tolist())) == 6

    dataset = ViewPairDataset(Several(0), see, 0)
    batch = torch.utils.data.default_collate([dataset[n] for n in range(4)])
    assert [tuple(view.shape) for view in batch["negative"]] == [(4, 0, 1, 2, 3, 4)] * 2


class ShowSeeds:
    """A transform that makes views one by one and in batches: the patch, and its seed in the first voxel."""

    def __call__(self, patch: Tensor, seed: int) -> Tensor:
        return self.views(patch[None], torch.tensor([seed]))[0]

    def views(self, patches: Tensor, seeds: Tensor) -> Tensor:
        assert patches.dtype == torch.int16
        assert seeds.shape == (len(patches),)
        found = patches.double()
        found[:, 0, 0, 0, 0] = seeds.double()
        return found


def test_a_batch_of_views_is_made_of_the_views_of_its_lesions() -> None:
    for patches in (Constants(), Several(3), Several(0)):
        keys = [SampleKey(2, index) for index in (3, 0, 6, 5)]
        one_by_one = ViewPairDataset(patches, ShowSeeds(), 7, AS_THEY_ARE)
        together = SeededPairDataset(patches, 7)
        expected = default_collate([one_by_one[key] for key in keys])
        sent = default_collate([together[key] for key in keys])
        assert sent["positive"].dtype == sent["negative"].dtype == torch.int16
        collated = ViewCollation(ShowSeeds(), AS_THEY_ARE)([together[key] for key in keys])
        for batch in (batch_of_views(sent, ShowSeeds(), AS_THEY_ARE), collated):
            assert set(batch) == set(expected)
            for name in ("positive", "negative"):
                for view, wanted in zip(batch[name], expected[name], strict=True):
                    assert view.shape == wanted.shape
                    assert torch.equal(view, wanted)
            assert torch.equal(batch["lesion"], expected["lesion"])
            assert torch.equal(batch["negative_from_other_scan"], expected["negative_from_other_scan"])
    assert len(together) == 7
    assert torch.equal(together[5]["view_seeds"], together[SampleKey(0, 5)]["view_seeds"])
