"""Gradient caching: one loss over a batch whose activations would not fit, in the memory of one chunk.

A contrastive loss needs all embeddings of a batch at once, but no activations but those of the chunk whose gradient is
being computed. So each chunk is a checkpointed region of autograd: it is embedded and its activations are dropped;
the loss of all embeddings gives the gradient of each; then, chunk by chunk from the last, it is embedded again and
that gradient goes on to the parameters.

Differs from the published algorithm in who does the second half: there a loop in the training step, here autograd. The
arithmetic is the same, and to Lightning the step is an ordinary one with an ordinary loss: mixed precision and its
scaler, clipping, accumulation, and DDP's one reduction, which begins once a parameter has the gradient of every chunk.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmcib_ssl.models.acceleration import BuffersKept

Embeddings = tuple[Tensor, ...]


def embed_in_chunks(
    embed: Callable[..., Embeddings],
    views: Sequence[Tensor],
    chunk_size: int,
    *,
    networks: nn.Module,
    device: torch.device,
) -> Embeddings:
    """What `embed(*views)` gives, with activations of at most `chunk_size` rows held at a time, also in the backward.

    The chunks are as even as they can be: 20 rows in chunks of at most 8 are 7, 7 and 6. The second forward of a chunk
    draws the random numbers of the first and leaves every buffer as it was, so that batch norm counts a chunk once.
    A layer whose output depends on a buffer that its own forward changes (spectral norm) is not repeated exactly.

    Args:
        embed: takes a chunk of each of the views on `device`, gives as many tensors, rows in the order of the views'.
        views: tensors of any shape, on any device, cut along their first dimension into as many chunks each.
        chunk_size: the most rows of a chunk.
        networks: what `embed` runs; its buffers are kept.
        device: where the networks are. Only one chunk of the views is there at a time.

    Returns:
        One tensor of embeddings for each of the views.
    """
    num_chunks = max(1, -(-max(len(view) for view in views) // chunk_size))

    def embed_chunk(_: Tensor, *chunk: Tensor) -> Embeddings:
        return embed(*(view.to(device, non_blocking=True) for view in chunk))

    # `checkpoint` keeps the generators of devices that it sees an argument on, and the views may be on the host.
    witness = torch.empty(0, device=device)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), BuffersKept(networks)

    if num_chunks == 1:
        return embed_chunk(witness, *views)
    embedded = [
        checkpoint(embed_chunk, witness, *chunk, use_reentrant=False, context_fn=contexts)
        for chunk in zip(*(view.tensor_split(num_chunks) for view in views), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*embedded, strict=True))
