"""Embeddings of earlier steps: first in, first out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The last `size` embeddings, in buffers, so that checkpoints hold them.

    Differs from lightly's memory bank, which no checkpoint holds, and which drops what does not fit before its end. On
    several devices every one has to enqueue the embeddings of all, so that all hold the same queue.

    Args:
        size: embeddings kept.
        dim: of an embedding.

    Raises:
        ValueError: a size below 1.
    """

    features: Tensor  # (size, dim), unit vectors; random ones where none has been enqueued yet
    num_enqueued: Tensor  # (), since the beginning

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of {size} embeddings: it must hold at least 1.")
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.long))

    @property
    def is_full(self) -> bool:
        """Whether no random vector is left."""
        return int(self.num_enqueued) >= len(self.features)

    @torch.no_grad()
    def enqueue(self, embeddings: Float[Tensor, "batch dim"]) -> None:
        """Put unit vectors in the place of the oldest."""
        newest = embeddings[-len(self.features) :]
        skipped = len(embeddings) - len(newest)
        steps = torch.arange(skipped, len(embeddings), device=self.features.device)
        self.features[(self.num_enqueued + steps) % len(self.features)] = newest.to(self.features.dtype)
        self.num_enqueued += len(embeddings)

    def nearest(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The most similar of the queue for each unit vector; no gradient flows through it."""
        with torch.no_grad():
            features = self.features.to(embeddings.dtype)
            return features[(embeddings @ features.T).argmax(1)]
