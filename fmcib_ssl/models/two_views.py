"""Methods that see only a lesion's two views, and no mined negative: SimCLR, VICReg, BYOL, NNCLR and SwAV."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fmcib_ssl.losses import at_least_float32, gather_rows
from fmcib_ssl.models.encoders import learned_features
from fmcib_ssl.models.pretraining import Parts, Pretraining, Step
from fmcib_ssl.types import ViewPairs


class TwoViews(Pretraining):
    """Pretraining on `batch["positive"]` alone; a subclass implements `compare`.

    Both views go through the encoder in one batch. Mined negatives in the batch are ignored.
    """

    compares_lesions = True

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """The loss of this device's lesions from two views `(batch, 1, z, y, x)`; `batch_idx` counts in the epoch."""
        raise NotImplementedError(f"{type(self).__name__} has no compare")

    def step(self, batch: ViewPairs, batch_idx: int) -> Step:
        """Compare the two views."""
        return self.compare(*batch["positive"], batch_idx)

    def full_precision(self) -> torch.autocast:
        """Turns autocast off: outputs of heads are compared in float32 (`at_least_float32`), only networks use less."""
        return torch.autocast(self.device.type, enabled=False)


def _lightly(module: str) -> Any:
    """A module of lightly, such as `loss`, which only the baselines need.

    Raises:
        ImportError: lightly is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(f"lightly.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this method takes its loss or its heads from lightly: pip install 'fmcib_ssl[baselines]' ({error})"
        ) from error


class _ComparedByCriterion(TwoViews):
    """Encoder and head, and a loss of lightly's that compares the two views' embeddings over all devices."""

    head: nn.Module
    criterion: nn.Module

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, dim)`."""
        return cast(Tensor, self.head(learned_features(self.encoder, views)))

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """The criterion over all lesions of all devices."""
        z0, z1 = self(torch.cat([view0, view1])).chunk(2)
        with self.full_precision():
            return Step(self.criterion(at_least_float32(z0), at_least_float32(z1)), (z0, z1))


class SimCLR(_ComparedByCriterion):
    """A lesion's two views against both views of all other lesions, with lightly's NT-Xent loss.

    On `W` devices with `B` lesions each, loss and gradients are those of one device with `W * B`. The same function as
    `MinedContrast` with `loss.negatives=lesions`, computed by lightly: the baseline, and a check of ours.

    Args:
        parts: with a head.
        temperature: divides the cosines.

    Source: Chen et al. 2020, A simple framework for contrastive learning of visual representations, equation 1.
    """

    sections = ("head",)

    def __init__(self, parts: Parts, *, temperature: float = 0.1) -> None:
        super().__init__(parts)
        self.head = parts.head
        # By keyword: the second argument of its signature is the memory bank's. Without processes there is nothing to
        # gather, and it looks by itself.
        self.criterion = _lightly("loss").NTXentLoss(temperature=temperature, gather_distributed=True)


class VICReg(_ComparedByCriterion):
    """Views agree, every dimension varies, and dimensions are uncorrelated; lightly's loss and head, no negatives.

    On several devices variance and covariance are those of all lesions together, and loss and gradients those of one
    device with all of them.

    Args:
        parts: without head and loss.
        hidden_dim: units of the head's hidden layers; 8192 in the paper.
        out_dim: of the embedding; 8192 in the paper.
        invariance: weight of the views' squared distance.
        variance: weight of the hinge on the dimensions' standard deviation.
        covariance: weight of the squared covariances.

    Source: Bardes et al. 2022, VICReg, equations 1 to 6; the variance term is the mean of the two views', as in its
    published code, where equation 6 has the sum.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        hidden_dim: int = 512,
        out_dim: int = 512,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__(parts)
        heads = _lightly("models.modules.heads")
        self.head = heads.VICRegProjectionHead(parts.num_features, hidden_dim, out_dim)
        self.criterion = _lightly("loss").VICRegLoss(
            lambda_param=invariance, mu_param=variance, nu_param=covariance, gather_distributed=True
        )


class _Predicting(TwoViews):
    """A projector after the encoder, and a predictor after it; both are lightly's."""

    def __init__(self, parts: Parts, name: str, hidden_dim: int, out_dim: int) -> None:
        super().__init__(parts)
        heads = _lightly("models.modules.heads")
        projection, prediction = (getattr(heads, f"{name}{kind}Head") for kind in ("Projection", "Prediction"))
        self.projector: nn.Module = projection(parts.num_features, hidden_dim, out_dim)
        self.predictor: nn.Module = prediction(out_dim, hidden_dim, out_dim)

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, out_dim)`, by the network that is trained."""
        return cast(Tensor, self.projector(learned_features(self.encoder, views)))


class BYOL(_Predicting):
    """One view predicts the other as a slowly following copy of the network, the target, sees it; no negatives.

    The online network is trained and exported; the target follows it as a moving average, once an optimizer step. The
    momentum climbs from `momentum` to 1 in half a cosine and depends on the step alone. Devices hold equal targets,
    since they hold equal online networks. Batch norm of the target uses the batch, as published.

    Args:
        parts: without head and loss.
        hidden_dim: units of the heads' hidden layers; 4096 in the paper.
        out_dim: of the embedding; 256 in the paper.
        momentum: of the target in the first step, 0 to 1; 0.996 in the paper, for runs of tens of thousands of steps. A
            run of `n` steps should leave the target time to follow: `1 / (1 - momentum)` well below `n`.

    Source: Grill et al. 2020, Bootstrap your own latent, equations 1 and 2 and section 3.2.
    """

    compares_lesions = False
    watched_views = 2

    def __init__(self, parts: Parts, *, hidden_dim: int = 512, out_dim: int = 128, momentum: float = 0.99) -> None:
        super().__init__(parts, "BYOL", hidden_dim, out_dim)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: must be from 0 to 1.")
        self.target_encoder = copy.deepcopy(parts.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.momentum = momentum

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """Squared distance of unit vectors, both ways."""
        views = torch.cat([view0, view1])
        embeddings = self(views)
        predictions = self.predictor(embeddings)
        with torch.no_grad():
            targets = self.target_projector(learned_features(self.target_encoder, views))
        with self.full_precision():
            p0, p1 = at_least_float32(predictions).chunk(2)
            t0, t1 = at_least_float32(targets).chunk(2)
            loss = 4 - 2 * (F.cosine_similarity(p0, t1) + F.cosine_similarity(p1, t0)).mean()
        z0, z1 = embeddings.chunk(2)
        return Step(loss, (z0, z1), {"momentum": torch.tensor(self._momentum_now())})

    def _momentum_now(self) -> float:
        """From `momentum` at step 0 to 1 at the last."""
        progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
        return 1 - (1 - self.momentum) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the target follow; with accumulated batches this too is once a step."""
        momentum = self._momentum_now()
        super().optimizer_step(*args, **kwargs)
        pairs = ((self.encoder, self.target_encoder), (self.projector, self.target_projector))
        with torch.no_grad():
            for online, target in pairs:
                for weight, slow in zip(online.parameters(), target.parameters(), strict=True):
                    slow.lerp_(weight, 1 - momentum)


class _FeatureQueue(nn.Module):
    """The last `size` embeddings, in buffers, so that checkpoints include them.

    Differs from lightly's memory bank, which is not in checkpoints, and which drops what does not fit before its end.
    Every device has to enqueue the embeddings of all devices, so that all have the same queue.

    Args:
        size: number of embeddings.
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
        """Replace the oldest by new unit vectors."""
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


class NNCLR(_Predicting):
    """The prediction of one view has to identify the other view's nearest neighbour among earlier embeddings.

    The loss is that of the paper's pseudo-code: a neighbour against the predictions of all lesions. lightly's example
    puts both through NT-Xent, which also contrasts neighbours with neighbours. The queue is the same on all devices
    and saved in checkpoints.

    Args:
        parts: without head and loss.
        hidden_dim: units of the heads' hidden layers; 2048 and 4096 in the paper.
        out_dim: of the embedding; 256 in the paper.
        queue_size: embeddings of earlier steps to search for neighbours; 98304 in the paper, for 1.3 million images. A
            few batches at least, and no more than the data has lesions, or it holds old versions of the same ones.
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
        super().__init__(parts, "NNCLR", hidden_dim, out_dim)
        self.queue = _FeatureQueue(queue_size, out_dim)
        self.temperature = temperature

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """Each view's neighbour against the predictions of the other view."""
        embeddings = self(torch.cat([view0, view1]))
        predictions = self.predictor(embeddings)
        with self.full_precision():
            z0, z1 = F.normalize(at_least_float32(embeddings.detach()), dim=1).chunk(2)
            p0, p1 = F.normalize(at_least_float32(predictions), dim=1).chunk(2)
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
    The queue is the same on all devices and saved in checkpoints.

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
        heads = _lightly("models.modules.heads")
        self.projector: nn.Module = heads.SwaVProjectionHead(parts.num_features, hidden_dim, out_dim)
        self._sinkhorn = _lightly("loss.swav_loss").sinkhorn
        self.prototypes = nn.Linear(out_dim, num_prototypes, bias=False)
        self.queues = nn.ModuleList(_FeatureQueue(queue_size, out_dim) for _ in range(2 if queue_size else 0))
        self.sinkhorn_options = {"iterations": sinkhorn_iterations, "epsilon": sinkhorn_epsilon}
        self.temperature, self.queue_from_epoch, self.frozen_epochs = temperature, queue_from_epoch, frozen_epochs

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to unit vectors `(batch, out_dim)`."""
        return F.normalize(at_least_float32(self.projector(learned_features(self.encoder, views))), dim=1)

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
            queue = cast(_FeatureQueue, self.queues[view])
            if self.current_epoch >= self.queue_from_epoch and queue.is_full:
                points = torch.cat([everyone, queue.features.to(everyone.dtype)])
            queue.enqueue(everyone)
        codes: Tensor = self._sinkhorn(self.prototypes(points), **self.sinkhorn_options)
        first = self.global_rank * len(z)
        return codes[first : first + len(z)]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the prototypes as they are in the first epochs."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.frozen_epochs:
            self.prototypes.weight.grad = None
