"""BYOL: one view predicts the other as a slowly following copy of the network sees it; no negatives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fmcib_ssl.models.pretraining import NamedParameters
from fmcib_ssl.models.two_views import Step, TwoViews, full, lightly_module


class BYOL(TwoViews):
    """The online network is trained and exported; the target follows it as a moving average, once an optimizer step.

    The momentum climbs from `momentum` to 1 in half a cosine and depends on the step alone. Devices hold equal targets,
    since they hold equal online networks. Batch norm of the target uses the batch, as published.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        optimizer: as in `Pretraining`.
        schedule: as in `Pretraining`.
        num_features: of the encoder.
        hidden_dim: units of the heads' hidden layers; 4096 in the paper.
        out_dim: of the embedding; 256 in the paper.
        momentum: of the target in the first step; 0.996 in the paper, for runs of tens of thousands of steps. A run of
            `n` steps should leave the target time to follow: `1 / (1 - momentum)` well below `n`.
        metadata: as in `Pretraining`.

    Raises:
        ImportError: lightly, which the heads are from, is not installed.
        ValueError: the momentum is not from 0 to 1.

    Source: Grill et al. 2020, Bootstrap your own latent, equations 1 and 2 and section 3.2.
    """

    compares_lesions = False
    watched_views = 2

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: Callable[[NamedParameters], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        *,
        num_features: int,
        hidden_dim: int = 512,
        out_dim: int = 128,
        momentum: float = 0.99,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, metadata=metadata)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: must be from 0 to 1.")
        heads = lightly_module("models.modules.heads")
        self.projector: nn.Module = heads.BYOLProjectionHead(num_features, hidden_dim, out_dim)
        self.predictor: nn.Module = heads.BYOLPredictionHead(out_dim, hidden_dim, out_dim)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.momentum = momentum

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, out_dim)`, by the online network."""
        return cast(Tensor, self.projector(self.encoder(views)))

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """Squared distance of unit vectors, both ways."""
        views = torch.cat([view0, view1])
        embeddings = self(views)
        predictions = self.predictor(embeddings)
        with torch.no_grad():
            targets = self.target_projector(self.target_encoder(views))
        with self.full_precision():
            p0, p1 = full(predictions).chunk(2)
            t0, t1 = full(targets).chunk(2)
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
