"""Two and four ranks against one process with the whole batch, and what travels between them."""

from __future__ import annotations

import collections
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from naive_contrast import LOSSES, NEGATIVES, gradients, leaves, make_loss, random_views, with_leaves

CASES = [(name, negatives) for name in LOSSES for negatives in NEGATIVES]
GATHERS = [(True, "plain"), (True, "streamed"), ("ring", "plain"), ("ring", "streamed")]
WORLD_SIZES = (2, 4)
#: (lesions, mined, dim) on rank 1 where the others have (3, 4, 8). Rank 1 alone must not report that it has no mined
#: negatives: rank 0 would wait for it.
UNEQUAL = [(2, 4, 8), (3, 0, 8), (3, 4, 7)]


def whole_batch(world_size, dtype=torch.float64):
    return random_views(0, 3 * world_size, 4 * world_size, dtype=dtype)


def share_of(rank, world_size):
    whole = whole_batch(world_size)
    rows, mined = slice(rank * 3, rank * 3 + 3), slice(rank * 4, rank * 4 + 4)
    positive, negative = whole["positive"], whole["negative"]
    parts = [positive[0][rows], positive[1][rows], negative[0][mined], negative[1][mined]]
    return with_leaves([x.detach().clone().requires_grad_() for x in parts])


class Traffic:
    """Counts the float elements that this rank receives, and the most it holds of other ranks' at once."""

    def __init__(self, monkeypatch):
        self.received = self.held = 0
        world_size, collectives = dist.get_world_size(), collections.namedtuple("C", "all_gather all_reduce batch")
        real = collectives(dist.all_gather, dist.all_reduce, dist.batch_isend_irecv)

        def all_gather(parts, own, *args, **kwargs):
            if own.is_floating_point():
                self.received += (world_size - 1) * own.numel()
                self.held = max(self.held, (world_size - 1) * own.numel())
            return real.all_gather(parts, own, *args, **kwargs)

        def all_reduce(tensor, *args, **kwargs):
            # Reduce, then spread: every element crosses a rank's wire twice but for its own share.
            self.received += 2 * (world_size - 1) * tensor.numel() // world_size
            return real.all_reduce(tensor, *args, **kwargs)

        def batch(operations):
            incoming = sum(op.tensor.numel() for op in operations if op.op is dist.irecv)
            self.received += incoming
            self.held = max(self.held, incoming)
            return real.batch(operations)

        monkeypatch.setattr(dist, "all_gather", all_gather)
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        monkeypatch.setattr(dist, "batch_isend_irecv", batch)


class PublishedGather(torch.autograd.Function):
    """As the gather under the published loss: all rows to all ranks, and the gradients of all rows summed."""

    @staticmethod
    def forward(ctx, own):
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *grads):
        total = torch.stack(grads)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def traffic_of(gather, out):
    with pytest.MonkeyPatch.context() as monkeypatch:
        traffic = Traffic(monkeypatch)
        if gather == "published":
            sum(part.sum() for view in leaves(out) for part in PublishedGather.apply(view)).backward()
        else:
            make_loss("ntxent_mined", 0.1, "mined", gather_distributed=gather)(out).backward()
        return traffic.received, traffic.held


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
    found = {}
    for name, negatives in CASES:
        out = share_of(rank, world_size)
        for gather, kernel in GATHERS:
            loss = make_loss(name, 0.1, negatives, gather_distributed=gather, kernel=kernel)(out)
            found[name, negatives, gather, kernel] = (loss.detach(), gradients(loss, out))
        for sizes in UNEQUAL:
            num_lesions, num_mined, dim = sizes if rank == 1 else (3, 4, 8)
            try:
                make_loss(name, 0.1, negatives, gather_distributed="ring" if rank % 2 else True)(
                    random_views(1, num_lesions, num_mined, dim)
                )
            except ValueError as error:
                found[name, negatives, sizes] = str(error)
        if negatives != "mined":
            try:
                make_loss(name, 0.1, negatives, gather_distributed=True)(out, lesions=out["positive"])
            except ValueError as error:
                found[name, negatives, "gathered twice"] = str(error)
    for gather in ("published", True, "ring"):
        found["traffic", gather] = traffic_of(gather, random_views(rank, 4, 4, 8))
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLD_SIZES, ids="{} ranks".format)
def ranks(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize(("name", "negatives"), CASES)
@pytest.mark.parametrize(("gather", "kernel"), GATHERS)
def test_ranks_equal_one_process_with_the_whole_batch(ranks, name, negatives, gather, kernel):
    whole = whole_batch(len(ranks))
    expected = make_loss(name, 0.1, negatives, kernel="plain")(whole)
    of_ranks = (found[name, negatives, gather, kernel] for found in ranks)
    losses, gradients_of_ranks = zip(*of_ranks, strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-12, atol=1e-12)
    # Distributed training averages the parameter gradients of the ranks, so divides those of the embeddings.
    averaged = [torch.cat(parts) / len(ranks) for parts in zip(*gradients_of_ranks, strict=True)]
    assert len(averaged) == len(leaves(whole))
    for ours, theirs in zip(averaged, gradients(expected, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_what_travels_and_what_is_held(ranks):
    others, view = len(ranks) - 1, 4 * 8  # a rank's mined negatives of one view: 4 rows of 8; as many lesions
    for found in ranks:
        published, gathered, ring = (found["traffic", gather] for gather in ("published", True, "ring"))
        # Forward once, and the gradients of all rows twice (reduced, then spread), of both views of everything.
        assert published[0] == others * 3 * 2 * 2 * view
        assert gathered[0] == others * 3 * 2 * view <= published[0] / 2
        assert gathered[1] == others * 2 * view  # both views of all other ranks, at once
        # Keys with their lengths forward, the same and a gradient back; one view of one other rank at a time.
        assert ring[0] == others * 2 * (3 * view + 2 * 4)
        assert ring[1] <= view + 4


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
