"""NNCLR: a lesion's positive is the earlier lesion most like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fmcib_ssl.models.pretraining import NamedParameters
from fmcib_ssl.models.queue import FeatureQueue
from fmcib_ssl.models.two_views import Step, TwoViews, full, lightly_module


class NNCLR(TwoViews):
    """The nearest neighbour of one view among earlier embeddings has to be told by the prediction of the other view.

    The loss is that of the paper's pseudo-code: a neighbour against the predictions of all lesions. lightly's example
    puts both through NT-Xent, which also contrasts neighbours with neighbours. The queue is the same on all devices,
    and checkpoints hold it.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        optimizer: as in `Pretraining`.
        schedule: as in `Pretraining`.
        num_features: of the encoder.
        hidden_dim: units of the heads' hidden layers; 2048 and 4096 in the paper.
        out_dim: of the embedding; 256 in the paper.
        queue_size: embeddings of earlier steps among which neighbours are looked for; 98304 in the paper, for 1.3
            million images. A few batches at least, and no more than the data has lesions, or it holds old versions
            of the same ones.
        temperature: divides the cosines.
        metadata: as in `Pretraining`.

    Raises:
        ImportError: lightly, which the heads are from, is not installed.
        ValueError: a queue without a place.

    Source: Dwibedi et al. 2021, With a little help from my friends: nearest-neighbor contrastive learning of visual
    representations, equation 2 and algorithm 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: Callable[[NamedParameters], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        *,
        num_features: int,
        hidden_dim: int = 512,
        out_dim: int = 128,
        queue_size: int = 512,
        temperature: float = 0.1,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, metadata=metadata)
        heads = lightly_module("models.modules.heads")
        self.projector: nn.Module = heads.NNCLRProjectionHead(num_features, hidden_dim, out_dim)
        self.predictor: nn.Module = heads.NNCLRPredictionHead(out_dim, hidden_dim, out_dim)
        self.queue = FeatureQueue(queue_size, out_dim)
        self.temperature = temperature

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, out_dim)`."""
        return cast(Tensor, self.projector(self.encoder(views)))

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """Each view's neighbour against the predictions of the other view."""
        embeddings = self(torch.cat([view0, view1]))
        predictions = self.predictor(embeddings)
        with self.full_precision():
            z0, z1 = F.normalize(full(embeddings.detach()), dim=1).chunk(2)
            p0, p1 = F.normalize(full(predictions), dim=1).chunk(2)
            neighbour0, neighbour1 = self.queue.nearest(z0), self.queue.nearest(z1)
            loss = (self._contrast(neighbour0, p1) + self._contrast(neighbour1, p0)) / 2
            figures = {"neighbour_cosine": (neighbour0 * z0).sum(1).mean()}  # how near the nearest is
            self.queue.enqueue(self.gather(z0))
        return Step(loss, (z0, z1), figures)

    def _contrast(self, neighbours: Tensor, predictions: Tensor) -> Tensor:
        """Which of all predictions belongs to each neighbour, as a cross entropy."""
        candidates = self.gather(predictions, sync_grads=True)
        own = torch.arange(len(neighbours), device=neighbours.device) + self.global_rank * len(neighbours)
        return F.cross_entropy(neighbours @ candidates.T / self.temperature, own)
