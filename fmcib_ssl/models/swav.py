"""SwAV: one view has to tell to which cluster the other was assigned."""

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


class SwAV(TwoViews):
    """Prototypes are learned with the encoder; assignments share the batch equally among them (Sinkhorn, lightly's).

    Two views, without the paper's small crops. On several devices the assignments are those of all lesions together.
    The queue is the same on all devices, and checkpoints hold it.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        optimizer: as in `Pretraining`.
        schedule: as in `Pretraining`.
        num_features: of the encoder.
        hidden_dim: units of the head's hidden layer; 2048 in the paper.
        out_dim: of the embedding.
        num_prototypes: clusters; 3000 in the paper. Batch and queue together should hold more lesions than that.
        temperature: of the predictions.
        sinkhorn_epsilon: of the assignments: the smaller, the harder.
        sinkhorn_iterations: rounds of making rows and columns equal.
        queue_size: embeddings of earlier steps, for each view, that are assigned together with a batch; 0 for none.
        queue_from_epoch: the queue is used from this epoch on, once it is full; 15 in the paper.
        frozen_epochs: the prototypes are not trained in as many first epochs.
        metadata: as in `Pretraining`.

    Raises:
        ImportError: lightly is not installed.

    Source: Caron et al. 2020, Unsupervised learning of visual features by contrasting cluster assignments, equations 2
    to 5.
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
        num_prototypes: int = 64,
        temperature: float = 0.1,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_size: int = 256,
        queue_from_epoch: int = 5,
        frozen_epochs: int = 1,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, metadata=metadata)
        self.projector: nn.Module = lightly_module("models.modules.heads").SwaVProjectionHead(
            num_features, hidden_dim, out_dim
        )
        self._sinkhorn = lightly_module("loss.swav_loss").sinkhorn
        self.prototypes = nn.Linear(out_dim, num_prototypes, bias=False)
        self.queues = nn.ModuleList(FeatureQueue(queue_size, out_dim) for _ in range(2 if queue_size else 0))
        self.temperature = temperature
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.queue_from_epoch = queue_from_epoch
        self.frozen_epochs = frozen_epochs

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to unit vectors `(batch, out_dim)`."""
        return F.normalize(full(self.projector(self.encoder(views))), dim=1)

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """Cross entropy between each view's prediction and the other's assignment."""
        with torch.no_grad():  # prototypes are unit vectors, too
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        embeddings = self(torch.cat([view0, view1])).chunk(2)
        with self.full_precision():
            assignments = [self._assign(number, z) for number, z in enumerate(embeddings)]
            predictions = [F.log_softmax(self.prototypes(z) / self.temperature, dim=1) for z in embeddings]
            loss = -sum((assignments[i] * predictions[1 - i]).sum(1).mean() for i in range(2)) / 2
            usage = torch.cat(assignments).mean(0)
            # Prototypes in use: the exponential of their entropy; it falls to 1 if all lesions go to one.
            figures = {"prototypes_used": torch.special.entr(usage).sum().exp()}
        return Step(cast(Tensor, loss), (embeddings[0], embeddings[1]), figures)

    @torch.no_grad()
    def _assign(self, view: int, z: Tensor) -> Tensor:
        """Assign this device's lesions, `(batch, num_prototypes)`, together with all devices' and the queue's."""
        everyone = self.gather(z.detach())
        points = everyone
        if self.queues:
            queue = cast(FeatureQueue, self.queues[view])
            if self.current_epoch >= self.queue_from_epoch and queue.is_full:
                points = torch.cat([everyone, queue.features.to(everyone.dtype)])
            queue.enqueue(everyone)
        codes: Tensor = self._sinkhorn(
            self.prototypes(points), iterations=self.sinkhorn_iterations, epsilon=self.sinkhorn_epsilon
        )
        first = self.global_rank * len(z)
        return codes[first : first + len(z)]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.frozen_epochs:
            self.prototypes.weight.grad = None
