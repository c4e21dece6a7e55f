"""What the methods share that see only a lesion's two views, and no mined negative."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.models.pretraining import Pretraining, detached
from fmcib_ssl.types import ViewPairs


class Step(NamedTuple):
    """What a method makes of one batch.

    Attributes:
        loss: the mean over this device's lesions, with a gradient.
        embeddings: `(z0, z1)` of the two views, each `(batch, dim)`.
        figures: more to log.
    """

    loss: Tensor
    embeddings: tuple[Tensor, Tensor]
    figures: dict[str, Tensor] = {}  # noqa: RUF012  (a default that nobody writes to)


class TwoViews(Pretraining):
    """Pretraining on `batch["positive"]` alone; a subclass gives `compare`.

    Both views go through the encoder in one batch. Arguments are those of `Pretraining`. Mined negatives in the batch
    are not looked at: `data.per_lesion=0` saves making them.

    Attributes:
        compares_lesions: whether the loss needs two lesions on each device.
    """

    compares_lesions: ClassVar[bool] = True

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """The loss of this device's lesions from two views `(batch, 1, z, y, x)`; `batch_idx` counts in the epoch."""
        raise NotImplementedError(f"{type(self).__name__} has no compare")

    def training_step(self, batch: ViewPairs, batch_idx: int) -> dict[str, Any]:
        """One step on one device's batch of views."""
        view0, view1 = batch["positive"]
        step = self.compare(view0, view1, batch_idx)
        self.log("train/loss", step.loss.detach(), prog_bar=True, sync_dist=True, batch_size=len(view0))
        self.log_dict({f"train/{name}": value for name, value in step.figures.items()}, batch_size=len(view0))
        return {"loss": step.loss, "embeddings": detached(*step.embeddings)}

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Half precision is for the encoder; heads' outputs are compared in float32, which `full` gives."""
        with torch.autocast(self.device.type, enabled=False):
            yield

    def gather(
        self, embeddings: Float[Tensor, "batch dim"], *, sync_grads: bool = False
    ) -> Float[Tensor, "all_batches dim"]:
        """Embeddings of all devices in order of rank; with gradients if those are to flow back to their devices."""
        if self.trainer.world_size == 1:
            return embeddings if sync_grads else embeddings.detach()
        gathered = cast(Tensor, self.all_gather(embeddings, sync_grads=sync_grads))  # (world_size, batch, dim)
        return gathered.flatten(0, 1)


def full(embeddings: Tensor) -> Tensor:
    """Embeddings in float32, or in float64 if they are."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def lightly_module(name: str) -> ModuleType:
    """Import a module of lightly, which only the baselines need.

    Args:
        name: below `lightly`, such as `loss`.

    Raises:
        ImportError: lightly is not installed; says how to install it.
    """
    try:
        return importlib.import_module(f"lightly.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "lightly":
            raise ImportError(
                "this method takes its loss or its heads from lightly, which is not installed: "
                "pip install 'fmcib_ssl[baselines]'"
            ) from error
        raise
