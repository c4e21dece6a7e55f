"""How embeddings travel between ranks: gathered by all at once, or swapped between two at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def num_ranks() -> int:
    """The number of processes that share this training; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_sizes_across_ranks(positive: Float[Tensor, "2 n dim"], mined: Float[Tensor, "2 m dim"]) -> None:
    """Raise ValueError, on every rank, when batches differ in size: a gather would hang or mix up rows."""
    own = torch.tensor([positive.shape[1], mined.shape[1], positive.shape[2]], device=positive.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    rows = torch.stack(sizes).tolist()
    if any(row != rows[0] for row in rows):
        table = "; ".join(f"rank {rank}: {n} lesions, {m} mined, dim {d}" for rank, (n, m, d) in enumerate(rows))
        raise ValueError(
            f"every rank must hold a batch of the same size, got {table}. "
            "Give all ranks the same batch size, and drop the last, incomplete batch"
        )


def swap(own: Sequence[Tensor], distance: int) -> list[Tensor]:
    """Send tensors to the rank `distance` further round the ring, and receive the like from as far behind.

    Always one's own, not what came before: so a rank never holds more than its own and one other's.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in own]
    operations = [dist.P2POp(dist.isend, tensor.contiguous(), (rank + distance) % world_size) for tensor in own]
    operations += [dist.P2POp(dist.irecv, tensor, (rank - distance) % world_size) for tensor in received]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


def all_gather_rows(views: Float[Tensor, "2 n dim"]) -> Float[Tensor, "2 all dim"]:
    """Both views of all ranks, rank after rank; the gradient is summed over what all ranks did with them."""
    gathered: Tensor = _AllGatherRows.apply(views)
    return gathered


class _AllGatherRows(torch.autograd.Function):
    # Why not torch.distributed.nn.functional.all_gather: torch has deprecated it, and the successor it names
    # is missing from the oldest torch that we support.
    @staticmethod
    def forward(ctx: Any, views: Tensor) -> Tensor:
        parts = [torch.empty_like(views) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
