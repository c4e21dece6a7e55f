"""What every way of pretraining shares: an encoder that is kept, an optimizer, a schedule, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class Pretraining(L.LightningModule):
    """A way to train an encoder without labels; a subclass gives the `training_step`.

    `training_step` returns a dictionary: `loss`, to be minimised, and, for callbacks that watch what is learned,
    `embeddings`, the detached embeddings `(z0, z1)` of the two views of the device's lesions, each `(batch, dim)`;
    methods with mined negatives add theirs as `negatives`.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`; what the user keeps.
        optimizer: called with the named parameters, gives the optimizer.
        schedule: called with the optimizer and `total_steps`, gives a scheduler that is stepped after every
            optimizer step; `None` keeps the rate constant.
        metadata: stored in every checkpoint under `"fmcib_ssl"`, so that the encoder can be rebuilt from it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: Callable[[NamedParameters], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        *,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.metadata = metadata or {}
        self._make_optimizer = optimizer
        self._make_schedule = schedule

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One step on one device's batch of views."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the whole gradient, before it is clipped, and the rate this step is taken with."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
        self.log("lr", optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all parameters, and a schedule stepped once per optimizer step."""
        optimizer = self._make_optimizer(self.named_parameters())
        if self._make_schedule is None:
            return optimizer
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self._make_schedule(optimizer, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let every checkpoint say how its encoder is rebuilt."""
        checkpoint["fmcib_ssl"] = {**self.metadata, "step": self.global_step, "epoch": self.current_epoch}


def detached(*embeddings: Tensor) -> tuple[Tensor, ...]:
    """Embeddings for those who only look."""
    return tuple(embedding.detach() for embedding in embeddings)
