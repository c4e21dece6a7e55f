"""The order of lesions against its definition."""

from __future__ import annotations

import pytest

from fmcib_ssl.data.sampler import EpochSampler
from fmcib_ssl.types import SampleKey


def keys(epoch: int, **options: int | bool) -> list[SampleKey]:
    sampler = EpochSampler(**{"num_lesions": 23, "batch_size": 4, **options})  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


@pytest.mark.parametrize("num_lesions", [12, 13, 23, 24, 25, 100])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (2, 3), (3, 4), (6, 2)])
def test_ranks_together_see_what_one_process_sees(num_lesions: int, batch_size: int, world_size: int) -> None:
    alone = keys(5, num_lesions=num_lesions, batch_size=batch_size * world_size, seed=9)
    ranks = [
        keys(5, num_lesions=num_lesions, batch_size=batch_size, world_size=world_size, rank=rank, seed=9)
        for rank in range(world_size)
    ]
    together = []
    for start in range(0, len(ranks[0]), batch_size):
        for rank in ranks:
            together += rank[start : start + batch_size]
    assert together == alone
    assert len(alone) == num_lesions - num_lesions % (batch_size * world_size)
    assert len({key.index for key in alone}) == len(alone)
    assert {key.epoch for key in alone} == {5}


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert keys(3, seed=1) == keys(3, seed=1)
    orders = {tuple(key.index for key in keys(epoch, seed=seed)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    sampler = EpochSampler(23, 4, seed=1)
    for epoch in (2, 0, 3):
        sampler.set_epoch(epoch)
        list(sampler)
    assert list(sampler) == keys(3, seed=1)


def test_every_lesion_has_its_turn() -> None:
    seen = {key.index for epoch in range(20) for key in keys(epoch)}
    assert seen == set(range(23))


def test_unshuffled_is_the_order_of_the_table() -> None:
    assert [key.index for key in keys(7, shuffle=False)] == list(range(20))


@pytest.mark.parametrize("batch", [0, 1, 4, 5])
def test_an_epoch_goes_on_at_a_batch(batch: int) -> None:
    for rank in range(2):
        whole = keys(3, batch_size=2, world_size=2, rank=rank, seed=1)
        sampler = EpochSampler(23, 2, world_size=2, rank=rank, seed=1)
        sampler.resume_at(*divmod(3 * 5 + batch, 5))  # five batches an epoch: fifteen and some taken
        sampler.set_epoch(3 + batch // 5)
        resumed = list(sampler)
        expected = whole[batch * 2 :] if batch < 5 else keys(4, batch_size=2, world_size=2, rank=rank, seed=1)
        assert resumed == expected
        assert len(sampler) == 10  # of a whole epoch
        sampler.set_epoch(6)
        assert list(sampler) == keys(6, batch_size=2, world_size=2, rank=rank, seed=1)


def test_too_few_lesions_are_an_error_with_the_numbers_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"23 lesions .* batch of 16 on 2 .* takes 32: .* at most 11"):
        EpochSampler(23, 16, world_size=2)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="need batch_size"):
        keys(0, **wrong)
