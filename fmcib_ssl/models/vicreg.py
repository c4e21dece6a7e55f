"""VICReg: views agree, every dimension varies, and no two dimensions say the same; no negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fmcib_ssl.models.pretraining import NamedParameters
from fmcib_ssl.models.two_views import Step, TwoViews, full, lightly_module


class VICReg(TwoViews):
    """Variance, invariance and covariance of the embeddings, with lightly's loss and head.

    On several devices variance and covariance are those of all lesions together, and loss and gradients those of one
    device with all of them.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        optimizer: as in `Pretraining`.
        schedule: as in `Pretraining`.
        num_features: of the encoder.
        hidden_dim: units of the head's hidden layers; 8192 in the paper.
        out_dim: of the embedding; 8192 in the paper.
        invariance: weight of the views' squared distance.
        variance: weight of the hinge on the dimensions' standard deviation.
        covariance: weight of the squared covariances.
        metadata: as in `Pretraining`.

    Raises:
        ImportError: lightly is not installed.

    Source: Bardes et al. 2022, VICReg, equations 1 to 6; the variance term is the mean of the two views', as in its
    published code, where equation 6 has the sum.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: Callable[[NamedParameters], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        *,
        num_features: int,
        hidden_dim: int = 512,
        out_dim: int = 512,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, metadata=metadata)
        self.head: nn.Module = lightly_module("models.modules.heads").VICRegProjectionHead(
            num_features, hidden_dim, out_dim
        )
        self.criterion = lightly_module("loss").VICRegLoss(
            lambda_param=invariance, mu_param=variance, nu_param=covariance, gather_distributed=True
        )

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, out_dim)`."""
        return cast(Tensor, self.head(self.encoder(views)))

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """The three terms over all lesions of all devices."""
        z0, z1 = self(torch.cat([view0, view1])).chunk(2)
        with self.full_precision():
            return Step(self.criterion(full(z0), full(z1)), (z0, z1))
