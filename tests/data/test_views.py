"""Views of pairs, with a transform that shows its seed."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fmcib_ssl.data.views import SeededPairDataset, ViewCollation, ViewPairDataset, batch_of_views
from fmcib_ssl.types import PatchPair, SampleKey


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
        views = ViewPairDataset(Constants(), show_seed, seed)[SampleKey(epoch, index)]
        for number in range(2):
            drawn[seed, epoch, index, "positive", number] = int(views["positive"][number][1])
            drawn[seed, epoch, index, "negative", number] = int(views["negative"][number][1])
    assert len(set(drawn.values())) == len(drawn)

    dataset = ViewPairDataset(Constants(), show_seed, 1)
    for epoch, index in ((2, 6), (0, 0), (2, 6)):  # in any order, again and again
        assert int(dataset[SampleKey(epoch, index)]["negative"][1][1]) == drawn[1, epoch, index, "negative", 1]


def test_seeds_share_no_stream_with_the_plain_key() -> None:
    # NumPy: SeedSequence([a, b]) and SeedSequence([a, b, 0]) are one stream; whoever draws patches may use either.
    views = ViewPairDataset(Constants(), show_seed, 4)[SampleKey(2, 0)]
    own = {int(view[1]) for view in (*views["positive"], *views["negative"])}
    for entropy in ([4, 2], [4, 2, 0], [4, 2, 0, 0]):
        assert own.isdisjoint(np.random.SeedSequence(entropy).generate_state(8).tolist())
    assert own.isdisjoint(np.random.SeedSequence(4, spawn_key=(2,)).generate_state(8).tolist())


def test_patches_go_to_their_views_and_the_rest_is_passed_on() -> None:
    dataset = ViewPairDataset(Constants(), show_seed, 0)
    views = dataset[SampleKey(2, 3)]
    assert [float(view[0]) for view in views["positive"]] == [203, 203]
    assert [float(view[0]) for view in views["negative"]] == [-203, -203]
    assert views["lesion"] == 3
    assert views["negative_from_other_scan"] is True
    assert len(dataset) == 7


def test_a_number_is_a_lesion_in_epoch_0() -> None:
    dataset = ViewPairDataset(Constants(), show_seed, 0)
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

    views = ViewPairDataset(Several(3), see, 0)[SampleKey(2, 3)]
    one = ViewPairDataset(Constants(), see, 0)[SampleKey(2, 3)]
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
        one_by_one, together = ViewPairDataset(patches, ShowSeeds(), 7), SeededPairDataset(patches, 7)
        expected = default_collate([one_by_one[key] for key in keys])
        sent = default_collate([together[key] for key in keys])
        assert sent["positive"].dtype == sent["negative"].dtype == torch.int16
        for batch in (batch_of_views(sent, ShowSeeds()), ViewCollation(ShowSeeds())([together[key] for key in keys])):
            assert set(batch) == set(expected)
            for name in ("positive", "negative"):
                for view, wanted in zip(batch[name], expected[name], strict=True):
                    assert view.shape == wanted.shape
                    assert torch.equal(view, wanted)
            assert torch.equal(batch["lesion"], expected["lesion"])
            assert torch.equal(batch["negative_from_other_scan"], expected["negative_from_other_scan"])
    assert len(together) == 7
    assert torch.equal(together[5]["view_seeds"], together[SampleKey(0, 5)]["view_seeds"])
