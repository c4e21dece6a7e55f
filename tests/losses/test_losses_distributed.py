"""Two and three ranks against one process with the whole batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from naive_contrast import KERNELS, LOSSES, NEGATIVES, gradients, leaves, make_loss, random_views, with_leaves

#: Loss, negatives, and what lesions of one patient are. Patients have lesions on several ranks.
CASES = [(name, negatives, "keep") for name in LOSSES for negatives in NEGATIVES]
CASES += [("infonce", "mined_and_lesions", "ignore"), ("ntxent_mined", "lesions", "attract")]
#: (lesions, mined, dim) on rank 1 where the others have (3, 4, 8). Rank 1 alone must not report that it has no mined
#: negatives: rank 0 would wait for it.
UNEQUAL = [(2, 4, 8), (3, 0, 8), (3, 4, 7)]


def whole_batch(world_size):
    views = random_views(0, 3 * world_size, 6 * world_size, dtype=torch.float64)
    return {**views, "patient": torch.arange(3 * world_size) % 4}


def share_of(rank, world_size):
    whole = whole_batch(world_size)
    rows, mined = slice(rank * 3, rank * 3 + 3), slice(rank * 6, rank * 6 + 6)
    positive, negative = whole["positive"], whole["negative"]
    parts = [positive[0][rows], positive[1][rows], negative[0][mined], negative[1][mined]]
    views = with_leaves([x.detach().clone().requires_grad_() for x in parts])
    return {**views, "patient": whole["patient"][rows]}


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """All cases in one process group: starting one takes seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=1),  # a hang is a failure
    )
    results = {}
    for case in CASES:
        name, negatives, same_patient = case
        options = {"gather_distributed": True, "same_patient": same_patient}
        out = share_of(rank, world_size)
        for kernel in KERNELS:
            loss = make_loss(name, 0.1, negatives, kernel=kernel, **options)(out)
            results[case, kernel] = (loss.detach(), gradients(loss, out))
        for sizes in UNEQUAL:
            num_lesions, num_mined, dim = sizes if rank == 1 else (3, 4, 8)
            try:
                out = {**random_views(1, num_lesions, num_mined, dim), "patient": torch.arange(num_lesions)}
                make_loss(name, 0.1, negatives, **options)(out)
            except ValueError as error:
                results[case, sizes] = str(error)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="{} ranks".format)
def ranks(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_ranks_equal_one_process_with_the_whole_batch(ranks, case, kernel):
    whole = whole_batch(len(ranks))
    name, negatives, same_patient = case
    expected = make_loss(name, 0.1, negatives, kernel="plain", same_patient=same_patient)(whole)
    losses, gradients_of_ranks = zip(*(results[case, kernel] for results in ranks), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-12, atol=1e-12)
    # Distributed training averages the parameter gradients of the ranks, so divides those of the embeddings.
    averaged = [torch.cat(parts) / len(ranks) for parts in zip(*gradients_of_ranks, strict=True)]
    assert len(averaged) == len(leaves(whole))
    for ours, theirs in zip(averaged, gradients(expected, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sizes", UNEQUAL, ids=str)
def test_unequal_batches_are_named_on_every_rank(ranks, case, sizes):
    num_lesions, num_mined, dim = sizes
    table = f"rank 0: 3 lesions, 4 mined, dim 8; rank 1: {num_lesions} lesions, {num_mined} mined, dim {dim}"
    for results in ranks:
        error = results[case, sizes]
        assert table in error and "drop the last, incomplete batch" in error
