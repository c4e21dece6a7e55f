"""Training with labels: an encoder, pretrained or not, and a linear head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import lightning as L
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from fmcib_ssl.models.pretraining import Parts, at_two_rates, with_schedule

#: `view`, float32 `(batch, 1, z, y, x)`; `label`, class numbers or float32 values; `row`, which lesions they are.
_LabelledViews = dict[str, Tensor]


def last_stage(encoder: nn.Module) -> nn.Module:
    """The last child of an encoder that has weights: `layer4` of a ResNet.

    Raises:
        ValueError: no child has weights.
    """
    stages = [child for child in encoder.children() if next(child.parameters(), None) is not None]
    if not stages:
        raise ValueError(f"{type(encoder).__name__} has no stages to choose the last of: train the head or all of it.")
    return stages[-1]


class FineTuning(L.LightningModule):
    """Classes by cross entropy, values by squared error; what is frozen keeps its batch-norm statistics, too.

    The head is linear on features standardised by running statistics, so that its rate does not depend on their scale
    (as in He et al. 2022, Masked autoencoders are scalable vision learners, appendix A). Logs `train/loss`,
    `val/loss` and `val/score`; `predict_step` gives probabilities `(batch, classes)` or values `(batch,)`.

    Args:
        parts: without head and loss; its optimizer is called once for the head, once for the encoder.
        num_classes: 0 for a value, such as a grade.
        class_weights: `(num_classes,)`, of the cross entropy.
        center: of values: what 0 of the head stands for, the training values' mean.
        scale: of values: what 1 of the head stands for, their standard deviation.
        depth: `"head"`, `"last_stage"` (see `last_stage`) or `"all"`.
        encoder_rate: the encoder's learning rate over the head's.
        score: of the validation lesions' labels and probabilities or values; the higher, the better.

    Raises:
        ValueError: no such depth.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        num_classes: int = 2,
        class_weights: Tensor | None = None,
        center: float = 0.0,
        scale: float = 1.0,
        depth: Literal["head", "last_stage", "all"] = "all",
        encoder_rate: float = 0.1,
        score: Callable[[npt.NDArray[Any], npt.NDArray[Any]], float] | None = None,
    ) -> None:
        super().__init__()
        if depth not in ("head", "last_stage", "all"):
            raise ValueError(f"depth must be 'head', 'last_stage' or 'all', got {depth!r}")
        self.encoder = parts.encoder.requires_grad_(depth == "all")
        self.head = nn.Sequential(
            nn.BatchNorm1d(parts.num_features, affine=False), nn.Linear(parts.num_features, max(1, num_classes))
        )
        self.depth = depth
        if depth == "last_stage":
            last_stage(self.encoder).requires_grad_(True)
        self.num_classes = num_classes
        self.encoder_rate = encoder_rate
        self.score = score
        self.register_buffer("class_weights", class_weights)
        self.register_buffer("center", torch.tensor(center, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self._make_optimizer, self._make_schedule, self._metadata = parts.optimizer, parts.schedule, parts.metadata

    def train(self, mode: bool = True) -> FineTuning:
        """Training mode, but for what is frozen: its batch norm keeps to the statistics it came with."""
        super().train(mode)
        if self.depth != "all":
            self.encoder.eval()
        if self.depth == "last_stage":
            last_stage(self.encoder).train(mode)
        return self

    def forward(self, views: Float[Tensor, "batch 1 z y x"]) -> Tensor:
        """Logits `(batch, num_classes)`, or standardised values `(batch,)`."""
        out = cast(Tensor, self.head(self.encoder(views)))
        return out if self.num_classes else out.squeeze(1)

    def loss(self, out: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, each row weighted by its class, over the sum of the weights; or mean squared error."""
        if self.num_classes:
            return F.cross_entropy(out.float(), labels, weight=cast("Tensor | None", self.class_weights))
        return F.mse_loss(out.float(), (labels - cast(Tensor, self.center)) / cast(Tensor, self.scale))

    def training_step(self, batch: _LabelledViews, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(self(batch["view"]), batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, on_epoch=True, on_step=False, batch_size=len(batch["row"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's."""
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: _LabelledViews, batch_idx: int) -> None:
        """Keep a batch's outputs: a weighted loss of all is no mean of those of batches."""
        self._outputs.append((self(batch["view"]), batch["label"]))

    def on_validation_epoch_end(self) -> None:
        """The loss of all validation lesions, and their score."""
        outputs, labels = (torch.cat(column) for column in zip(*self._outputs, strict=True))
        self.log("val/loss", self.loss(outputs, labels), prog_bar=True)
        if self.score is not None:
            self.log("val/score", self.score(labels.cpu().numpy(), self.predicted(outputs).cpu().numpy()))

    def predicted(self, out: Tensor) -> Tensor:
        """Probabilities `(batch, classes)`, or values `(batch,)` in the labels' unit."""
        if self.num_classes:
            return out.float().softmax(1)
        return out.float() * cast(Tensor, self.scale) + cast(Tensor, self.center)

    def predict_step(self, batch: _LabelledViews, batch_idx: int) -> tuple[Tensor, Tensor]:
        """The rows of a batch, and their probabilities or values."""
        return batch["row"], self.predicted(self(batch["view"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer whose groups of the encoder have a rate of their own."""
        of_head = self.head.named_parameters()
        if self.depth == "head":
            optimizer = self._make_optimizer(of_head)
        else:
            optimizer = at_two_rates(self._make_optimizer, of_head, self.encoder, self.encoder_rate)
        return with_schedule(self, optimizer, self._make_schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let every checkpoint say how its encoder is rebuilt."""
        checkpoint["fmcib_ssl"] = {**self._metadata, "step": self.global_step, "epoch": self.current_epoch}
