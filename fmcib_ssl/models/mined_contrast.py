"""Contrastive pretraining with explicitly mined negatives, and gradient caching for large batches.

Differs from the published module in three ways: all views go through the encoder in one batch (`forwards="separate"`
restores four passes, which batch norm can tell apart); on several devices the loss gathers only what it needs, with
Lightning's `all_gather`; and the schedule counts the steps it is stepped in. Large batches are explained in
`docs/large_batches.md`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fmcib_ssl.losses import num_ranks
from fmcib_ssl.models.acceleration import recomputed
from fmcib_ssl.models.encoders import learned_features
from fmcib_ssl.models.pretraining import Parts, Pretraining, Step
from fmcib_ssl.types import ViewPairs

logger = logging.getLogger(__name__)


class MinedContrast(Pretraining):
    """Contrastive training of encoder and head: a lesion's two views against its negatives.

    On `W` devices with `B` lesions each, and a loss with `gather_distributed=True`, the loss is the mean over all
    `W * B` lesions and the parameter gradients are those of one device with `W * B` lesions (of their batch norm, with
    `SyncBatchNorm`).

    Args:
        parts: with a head and a loss.
        forwards: `"joint"` sends all four sets of views through the encoder in one batch; `"separate"` sends them one
            by one, as published. They differ where batch norm is in training mode: its statistics are then those of
            one set.
        chunk_size: largest number of lesions whose activations are in memory at a time. A larger batch is embedded in
            chunks, each twice (gradient caching); its views stay where the loader put them, and each chunk is moved to
            the device for its turn. `None` embeds the batch at once.
    """

    sections = ("head", "loss")
    takes_negatives = True

    def __init__(
        self, parts: Parts, *, forwards: Literal["joint", "separate"] = "joint", chunk_size: int | None = None
    ) -> None:
        super().__init__(parts)
        if forwards not in ("joint", "separate"):
            raise ValueError(f"forwards must be 'joint' or 'separate', got {forwards!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be 1 lesion or more, or null for a batch at once")
        self.head = parts.head
        self.loss = parts.loss
        self.forwards = forwards
        self.chunk_size = chunk_size

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, dim)`."""
        return cast(Tensor, self.head(learned_features(self.encoder, views)))

    def step(self, batch: ViewPairs, batch_idx: int) -> Step:
        """The loss of the embeddings of all views."""
        out = self.embed(batch)
        if "patient" in batch:
            out["patient"] = batch["patient"]
        gathers = num_ranks() > 1 and getattr(self.loss, "gather_distributed", False)
        loss = cast(Tensor, self.loss(out, gather=self._gather_rows) if gathers else self.loss(out))
        if getattr(self.loss, "reduction", "mean") == "sum":
            # DDP averages the gradients over devices: right for a mean, but a sum over devices has to be made up for.
            loss = loss * num_ranks()
        figures: dict[str, Tensor] = {}
        if "negative_from_other_scan" in batch:
            figures["data/negative_from_other_scan"] = batch["negative_from_other_scan"].float().mean()
        if isinstance(temperature := getattr(self.loss, "temperature", None), Tensor):  # else it is not trained
            figures["temperature"] = temperature
        return Step(loss, out["positive"], figures, out["negative"])

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Rows `(views, n, dim)` of this device to those of all, `(views, devices * n, dim)`, with gradients."""
        gathered = cast(Tensor, self.all_gather(rows, sync_grads=True))
        return gathered.transpose(0, 1).flatten(1, 2)

    def embed(self, batch: ViewPairs) -> ViewPairs:
        """Embed the four sets of views of a batch; the same keys, each `(batch, dim)`.

        With `K` negatives a lesion, `(batch, K, 1, z, y, x)`, their embeddings are `(batch * K, dim)`.
        """
        views = [*batch["positive"], *batch["negative"]]
        if self.chunk_size is None:
            embeddings = self._embed_views(*views)
        else:
            embeddings = embed_in_chunks(self._embed_views, views, self.chunk_size, networks=self, device=self.device)
        pos0, pos1, neg0, neg1 = embeddings
        return {"positive": (pos0, pos1), "negative": (neg0, neg1)}

    def _embed_views(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of each of the sets of views, `(..., 1, z, y, x)`, one row a view."""
        views = tuple(view.flatten(0, view.ndim - 5) for view in views)
        if self.forwards == "joint":
            embeddings: Tensor = self(torch.cat(views))
            return torch.split(embeddings, [len(view) for view in views])
        return tuple(self(view) for view in views)

    def on_fit_start(self) -> None:
        """Warn if devices do not share their negatives."""
        if self.trainer.world_size > 1 and not getattr(self.loss, "gather_distributed", False):
            logger.warning(
                "%s does not gather (it has no gather_distributed=true): each device contrasts its lesions with its "
                "own negatives only", type(self.loss).__name__,
            )  # fmt: skip

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Bring a batch to the device; where it is embedded in chunks, all but its views.

        Patches whose views are still to be made there are no pair of views, and go.
        """
        views = {key: batch[key] for key in ("positive", "negative") if not isinstance(batch[key], Tensor)}
        if self.chunk_size is None or not views:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        others = {key: value for key, value in batch.items() if key not in views}
        return {**views, **super().transfer_batch_to_device(others, device, dataloader_idx)}


def embed_in_chunks(
    embed: Callable[..., tuple[Tensor, ...]],
    views: Sequence[Tensor],
    chunk_size: int,
    *,
    networks: nn.Module,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """What `embed(*views)` gives, with activations of at most `chunk_size` rows held at a time, also in the backward.

    A contrastive loss needs all embeddings of a batch at once, but no activations but those of the chunk whose gradient
    is being computed. So each chunk is a checkpointed region of autograd: it is embedded and its activations are
    dropped; the loss of all embeddings gives the gradient of each; then, chunk by chunk from the last, it is embedded
    again and that gradient goes on to the parameters. The published algorithm does the second half in a loop of the
    training step; here autograd does, and to Lightning the step is an ordinary one: mixed precision and its scaler,
    clipping, accumulation, and DDP's one reduction, which begins once a parameter has the gradient of every chunk.

    The chunks are as even as they can be: 20 rows in chunks of at most 8 are 7, 7 and 6. The second forward of a chunk
    draws the random numbers of the first and leaves every buffer as it was, so that batch norm counts a chunk once.
    A layer whose output depends on a buffer that its own forward changes (spectral norm) is not repeated exactly.

    Args:
        embed: takes a chunk of each of the views on `device`, gives as many tensors, rows in the order of the views'.
        views: tensors of any shape, on any device, cut along their first dimension into as many chunks each.
        chunk_size: largest number of rows of a chunk.
        networks: what `embed` runs; the second pass leaves its buffers unchanged.
        device: where the networks are. Only one chunk of the views is there at a time.

    Returns:
        One tensor of embeddings for each of the views.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """
    num_chunks = max(1, -(-max(len(view) for view in views) // chunk_size))

    def embed_chunk(_: Tensor, *chunk: Tensor) -> tuple[Tensor, ...]:
        return embed(*(view.to(device, non_blocking=True) for view in chunk))

    # `checkpoint` keeps the generators of devices that it sees an argument on, and the views may be on the host.
    witness = torch.empty(0, device=device)
    if num_chunks == 1:
        return embed_chunk(witness, *views)
    chunks = zip(*(view.tensor_split(num_chunks) for view in views), strict=True)
    embedded = [recomputed(embed_chunk, networks, witness, *chunk) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*embedded, strict=True))
