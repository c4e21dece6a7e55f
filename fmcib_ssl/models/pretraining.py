"""What every way of pretraining shares: an encoder that is kept, an optimizer, a schedule, and what is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fmcib_ssl.types import ViewPairs

_NamedParameters = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Parts:
    """What every method is built from; options of its own are further arguments of its constructor.

    Attributes:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`; what the user keeps.
        optimizer: called with the named parameters, gives the optimizer.
        num_features: that the encoder gives.
        schedule: called with the optimizer and `total_steps`, gives a scheduler that is stepped after every optimizer
            step; None keeps the rate constant.
        head: `(batch, features)` to `(batch, dim)`, thrown away after training; for methods whose `sections` name it.
        loss: takes `{"positive": (pos0, pos1), "negative": (neg0, neg1)}`; likewise.
        metadata: stored in every checkpoint under `"fmcib_ssl"`, so that the encoder can be rebuilt from it.
        encoder_rate: the encoder's learning rate over that of all else.
    """

    encoder: nn.Module
    optimizer: Callable[[_NamedParameters], Optimizer]
    num_features: int = 0
    schedule: Callable[..., LRScheduler] | None = None
    head: nn.Module = field(default_factory=nn.Identity)
    loss: nn.Module = field(default_factory=nn.Identity)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    encoder_rate: float = 1.0


class Step(NamedTuple):
    """What a method makes of one batch.

    Attributes:
        loss: the mean over this device's lesions, with a gradient.
        embeddings: `(z0, z1)` of the two views, each `(batch, dim)`.
        figures: more to log; a name without a `/` gets `train/` before it.
        negatives: the embeddings of both views of mined negatives, of methods that take them.
    """

    loss: Tensor
    embeddings: tuple[Tensor, Tensor]
    figures: dict[str, Tensor] = {}  # noqa: RUF012  (a default that nobody writes to)
    negatives: tuple[Tensor, Tensor] | None = None


class Pretraining(L.LightningModule):
    """A way to train an encoder without labels; a subclass gives `step`.

    `training_step` returns a dictionary: `loss`, to be minimised, and, for callbacks that watch what is learned,
    `embeddings`, the detached embeddings of the two views of the device's lesions, and `negatives`, if there are any.

    Attributes:
        sections: of the configuration that the method takes besides its own; others must not be set for it.
        takes_negatives: whether mined negatives are looked at.
        compares_lesions: whether the loss needs two lesions on each device.
        watched_views: views of a lesion that go through a copy of the network that follows it, forward only.
        flops_per_lesion: operations of a step, for those who measure; None if nobody has counted them.
    """

    sections: ClassVar[tuple[Literal["head", "loss"], ...]] = ()
    takes_negatives: ClassVar[bool] = False
    compares_lesions: ClassVar[bool] = False
    watched_views: ClassVar[int] = 0

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.encoder = parts.encoder
        self.metadata = parts.metadata
        self.make_optimizer, self.encoder_rate = parts.optimizer, parts.encoder_rate
        self._make_schedule = parts.schedule
        self.flops_per_lesion: int | None = None
        self._row: dict[str, Tensor] = {}

    def trained_views(self, num_negatives: int) -> int:
        """Views of a lesion, and of as many negatives mined for it, that go through the network, forward and back."""
        return 2 + 2 * num_negatives if self.takes_negatives else 2

    def step(self, batch: ViewPairs, batch_idx: int) -> Step:
        """The loss of one device's batch of views; `batch_idx` counts in the epoch."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def training_step(self, batch: ViewPairs, batch_idx: int) -> dict[str, Any]:
        """Log the loss and the figures of `step`."""
        step = self.step(batch, batch_idx)
        self.log("train/loss", step.loss, sync_dist=True)
        self.log_dict({name if "/" in name else f"train/{name}": value for name, value in step.figures.items()})
        watched = {"embeddings": step.embeddings, "negatives": step.negatives}
        return {"loss": step.loss} | {key: tuple(z.detach() for z in views) for key, views in watched.items() if views}

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Record a figure for the metrics' next row; on several devices the first one's, with `sync_dist` the mean.

        Lightning's own `log` would repeat a figure in all rows of the epoch, and a run that is resumed would not.
        """
        value = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
        if options.get("sync_dist") and self.trainer.world_size > 1:
            value = self.trainer.strategy.reduce(value, reduce_op="mean")
        self._row[name] = self.trainer.callback_metrics[name] = value

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the row of the step, once the callbacks have logged too."""
        if row_is_due(self.trainer, batch_idx):
            self._write_row()
        elif batch_idx + 1 == self.trainer.num_training_batches:
            self._row.clear()  # as Lightning does

    def on_train_epoch_end(self) -> None:
        """Write what callbacks have logged of an epoch as a row of its own."""
        self._write_row()

    def _write_row(self) -> None:
        if self._row:
            row = {name: value.item() for name, value in self._row.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics({**row, "epoch": self.current_epoch}, step=self.global_step - 1)
                logger.save()
        self._row.clear()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the whole gradient, before it is clipped, and the rate this step is taken with."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
        self.log("lr", optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all parameters, and a schedule stepped once per optimizer step."""
        if self.encoder_rate == 1:
            optimizer = self.make_optimizer(self.named_parameters())
        else:
            of_encoder = {id(parameter) for parameter in self.encoder.parameters()}
            others = [(name, value) for name, value in self.named_parameters() if id(value) not in of_encoder]
            optimizer = at_two_rates(self.make_optimizer, others, self.encoder, self.encoder_rate)
        return with_schedule(self, optimizer, self._make_schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let every checkpoint say how its encoder is rebuilt."""
        checkpoint["fmcib_ssl"] = {**self.metadata, "step": self.global_step, "epoch": self.current_epoch}


def row_is_due(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this batch ends an optimizer step that gets a row in the metrics; call it after the step."""
    is_last = batch_idx + 1 == trainer.num_training_batches
    steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (
        bool(steps)
        and (is_last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0)
        and (trainer.global_step % steps == 0)
    )


def at_two_rates(
    make_optimizer: Callable[[_NamedParameters], Optimizer], others: _NamedParameters, encoder: nn.Module, rate: float
) -> Optimizer:
    """One optimizer whose groups of the encoder, after the others, have `rate` times the others' learning rate."""
    optimizer = make_optimizer(others)
    for group in make_optimizer(encoder.named_parameters()).param_groups:
        optimizer.add_param_group({**group, "lr": group["lr"] * rate})
    return optimizer


def with_schedule(
    module: L.LightningModule, optimizer: Optimizer, make_schedule: Callable[..., LRScheduler] | None
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns: a schedule is stepped once per optimizer step."""
    if make_schedule is None:
        return optimizer
    scheduler = make_schedule(optimizer, total_steps=int(module.trainer.estimated_stepping_batches))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}
