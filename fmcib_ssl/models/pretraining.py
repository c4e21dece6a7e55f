"""What every way of pretraining shares: an encoder that is kept, an optimizer, a schedule, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

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

    Attributes:
        watched_views: views of a lesion that go through a copy of the network that follows it, forward only.
        flops_per_lesion: operations of a step, for those who measure; None if nobody has counted them.
    """

    watched_views: ClassVar[int] = 0

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
        self.make_optimizer = optimizer
        self._make_schedule = schedule
        self.flops_per_lesion: int | None = None

    def trained_views(self, num_negatives: int) -> int:
        """Views of a lesion, and of as many negatives mined for it, that go through the network, forward and back."""
        return 2

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One step on one device's batch of views."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget what was logged once it stands in a row: Lightning would repeat it in all rows of the epoch."""
        trainer = self.trainer
        row_is_written = trainer.global_step % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if row_is_written and batch_idx % trainer.accumulate_grad_batches == 0:
            for logged in (trainer._results or {}).values():
                if logged.meta.on_step and not logged.meta.on_epoch:
                    logged.reset()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the whole gradient, before it is clipped, and the rate this step is taken with."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
        self.log("lr", optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all parameters, and a schedule stepped once per optimizer step."""
        optimizer = self.make_optimizer(self.named_parameters())
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
