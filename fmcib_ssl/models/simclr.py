"""SimCLR: every other lesion of the batch is a negative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fmcib_ssl.models.pretraining import NamedParameters
from fmcib_ssl.models.two_views import Step, TwoViews, full, lightly_module


class SimCLR(TwoViews):
    """A lesion's two views against both views of all other lesions, with lightly's NT-Xent loss.

    On `W` devices with `B` lesions each, loss and gradients are those of one device with `W * B`. The same function as
    `MinedContrast` with `loss.negatives=lesions`, computed by lightly: the baseline, and a check of ours.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        head: `(batch, features)` to `(batch, dim)`.
        optimizer: as in `Pretraining`.
        schedule: as in `Pretraining`.
        temperature: divides the cosines.
        metadata: as in `Pretraining`.

    Raises:
        ImportError: lightly is not installed.

    Source: Chen et al. 2020, A simple framework for contrastive learning of visual representations, equation 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        optimizer: Callable[[NamedParameters], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        *,
        temperature: float = 0.1,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, metadata=metadata)
        self.head = head
        # By keyword: the second place of its signature is the memory bank's. Without processes there is nothing to
        # gather, and it looks by itself.
        self.criterion = lightly_module("loss").NTXentLoss(temperature=temperature, gather_distributed=True)

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, dim)`."""
        return cast(Tensor, self.head(self.encoder(views)))

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """NT-Xent over all lesions of all devices."""
        z0, z1 = self(torch.cat([view0, view1])).chunk(2)
        with self.full_precision():
            return Step(self.criterion(full(z0), full(z1)), (z0, z1))
