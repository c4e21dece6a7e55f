"""Two ranks that gather by themselves against one process with the doubled batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from naive_contrast import LOSSES, NEGATIVES, gradients, leaves, make_loss, random_views, with_leaves

CASES = [(name, negatives) for name in LOSSES for negatives in NEGATIVES]
#: (lesions, mined, dim) on rank 1 where rank 0 has (3, 4, 8). Rank 1 alone must not report that it has no mined
#: negatives: rank 0 would wait for it.
UNEQUAL = [(2, 4, 8), (3, 0, 8), (3, 4, 7)]


def whole_batch():
    return random_views(0, 6, 8, dtype=torch.float64)


def share_of(rank):
    whole = whole_batch()
    rows, mined = slice(rank * 3, rank * 3 + 3), slice(rank * 4, rank * 4 + 4)
    positive, negative = whole["positive"], whole["negative"]
    parts = [positive[0][rows], positive[1][rows], negative[0][mined], negative[1][mined]]
    return with_leaves([x.detach().clone().requires_grad_() for x in parts])


def run_rank(rank: int, folder: str) -> None:
    """All cases in one process group: starting one takes seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=1),  # a hang is a failure
    )
    found = {}
    for name, negatives in CASES:
        loss_function = make_loss(name, 0.1, negatives, gather_distributed=True)
        out = share_of(rank)
        loss = loss_function(out)
        found[name, negatives] = (loss.detach(), gradients(loss, out))
        for sizes in UNEQUAL:
            num_lesions, num_mined, dim = sizes if rank == 1 else (3, 4, 8)
            try:
                loss_function(random_views(1, num_lesions, num_mined, dim))
            except ValueError as error:
                found[name, negatives, sizes] = str(error)
        if negatives != "mined":
            try:
                loss_function(out, lesions=out["positive"])
            except ValueError as error:
                found[name, negatives, "gathered twice"] = str(error)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("name", "negatives"), CASES)
def test_two_ranks_equal_one_process_with_the_doubled_batch(ranks, name, negatives):
    whole = whole_batch()
    expected = make_loss(name, 0.1, negatives)(whole)
    losses, gradients_of_ranks = zip(*(found[name, negatives] for found in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-12, atol=1e-12)
    # Distributed training averages the parameter gradients of the ranks, so halves those of the embeddings.
    averaged = [torch.cat(parts) / 2 for parts in zip(*gradients_of_ranks, strict=True)]
    assert len(averaged) == len(leaves(whole))
    for ours, theirs in zip(averaged, gradients(expected, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "negatives"), CASES)
@pytest.mark.parametrize("sizes", UNEQUAL, ids=str)
def test_unequal_batches_are_named_on_every_rank(ranks, name, negatives, sizes):
    num_lesions, num_mined, dim = sizes
    table = f"rank 0: 3 lesions, 4 mined, dim 8; rank 1: {num_lesions} lesions, {num_mined} mined, dim {dim}"
    for found in ranks:
        error = found[name, negatives, sizes]
        assert table in error and "drop the last, incomplete batch" in error


@pytest.mark.parametrize(("name", "negatives"), [case for case in CASES if case[1] != "mined"])
def test_gathering_twice_is_refused(ranks, name, negatives):
    for found in ranks:
        assert "gather here or outside, not both" in found[name, negatives, "gathered twice"]
