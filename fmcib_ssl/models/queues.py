"""Methods that look at embeddings of earlier steps: the queue that keeps them, NNCLR and SwAV."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fmcib_ssl.losses import gather_rows
from fmcib_ssl.models.pretraining import Parts
from fmcib_ssl.models.two_views import Step, TwoViews, full, lightly_module


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


class NNCLR(TwoViews):
    """The nearest neighbour of one view among earlier embeddings has to be told by the prediction of the other view.

    The loss is that of the paper's pseudo-code: a neighbour against the predictions of all lesions. lightly's example
    puts both through NT-Xent, which also contrasts neighbours with neighbours. The queue is the same on all devices,
    and checkpoints hold it.

    Args:
        parts: without head and loss.
        hidden_dim: units of the heads' hidden layers; 2048 and 4096 in the paper.
        out_dim: of the embedding; 256 in the paper.
        queue_size: embeddings of earlier steps among which neighbours are looked for; 98304 in the paper, for 1.3
            million images. A few batches at least, and no more than the data has lesions, or it holds old versions
            of the same ones.
        temperature: divides the cosines.

    Source: Dwibedi et al. 2021, With a little help from my friends: nearest-neighbor contrastive learning of visual
    representations, equation 2 and algorithm 1.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        hidden_dim: int = 512,
        out_dim: int = 128,
        queue_size: int = 512,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(parts)
        heads = lightly_module("models.modules.heads")
        self.projector: nn.Module = heads.NNCLRProjectionHead(parts.num_features, hidden_dim, out_dim)
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
            self.queue.enqueue(gather_rows(z0))
        return Step(loss, (z0, z1), figures)

    def _contrast(self, neighbours: Tensor, predictions: Tensor) -> Tensor:
        """Which of all predictions belongs to each neighbour, as a cross entropy."""
        candidates = gather_rows(predictions)
        own = torch.arange(len(neighbours), device=neighbours.device) + self.global_rank * len(neighbours)
        return F.cross_entropy(neighbours @ candidates.T / self.temperature, own)


class SwAV(TwoViews):
    """Prototypes are learned with the encoder; assignments share the batch equally among them (Sinkhorn, lightly's).

    Two views, without the paper's small crops. On several devices the assignments are those of all lesions together.
    The queue is the same on all devices, and checkpoints hold it.

    Args:
        parts: without head and loss.
        hidden_dim: units of the head's hidden layer; 2048 in the paper.
        out_dim: of the embedding.
        num_prototypes: clusters; 3000 in the paper. Batch and queue together should hold more lesions than that.
        temperature: of the predictions.
        sinkhorn_epsilon: of the assignments: the smaller, the harder.
        sinkhorn_iterations: rounds of making rows and columns equal.
        queue_size: embeddings of earlier steps, for each view, that are assigned together with a batch; 0 for none.
        queue_from_epoch: the queue is used from this epoch on, once it is full; 15 in the paper.
        frozen_epochs: the prototypes are not trained in as many first epochs.

    Source: Caron et al. 2020, Unsupervised learning of visual features by contrasting cluster assignments, equations 2
    to 5.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        hidden_dim: int = 512,
        out_dim: int = 128,
        num_prototypes: int = 64,
        temperature: float = 0.1,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_size: int = 256,
        queue_from_epoch: int = 5,
        frozen_epochs: int = 1,
    ) -> None:
        super().__init__(parts)
        self.projector: nn.Module = lightly_module("models.modules.heads").SwaVProjectionHead(
            parts.num_features, hidden_dim, out_dim
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
        everyone = gather_rows(z.detach())
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
