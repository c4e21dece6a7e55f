"""Contrastive pretraining with explicitly mined negatives.

Differs from the published module in three ways: all views go through the encoder in one batch (`forwards="separate"`
restores four passes, which batch norm can tell apart); on several devices only what the loss needs is gathered, by
Lightning's own `all_gather` or round a ring; and the schedule counts the steps it is stepped in. Large batches are
explained in `docs/large_batches.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fmcib_ssl.models.gradient_cache import embed_in_chunks
from fmcib_ssl.models.pretraining import NamedParameters, Pretraining, detached
from fmcib_ssl.types import ViewPairs


class MinedContrast(Pretraining):
    """Encoder and head, trained so that a lesion's two views agree against its negatives.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`; what the user keeps.
        head: `(batch, features)` to `(batch, dim)`; thrown away after training.
        loss: takes `{"positive": (pos0, pos1), "negative": (neg0, neg1)}`. Its attribute `negatives` says what has to
            be gathered from other devices: `"mined"` (also assumed where there is none), `"mined_and_lesions"` or
            `"lesions"`.
        optimizer: called with the named parameters, gives the optimizer.
        schedule: called with the optimizer and `total_steps`, gives a scheduler that is stepped after every
            optimizer step; `None` keeps the rate constant.
        forwards: `"joint"` sends all four sets of views through the encoder in one batch; `"separate"` sends them one
            by one, as published. They differ where batch norm is in training mode: its statistics are then those of
            one set.
        gather: how negatives of other devices are met. `"all"` gathers them at once; `"ring"` takes one device's after
            the other, in a loss that can (the losses of this package), and never holds those of more than two.
        chunk_size: the most lesions whose activations are held at a time. A larger batch is embedded in chunks, each
            twice (gradient caching); its views stay where the loader put them, and each chunk comes to the device when
            it is its turn. `None` embeds the batch at once.
        metadata: stored in every checkpoint under `"fmcib_ssl"`, so that the encoder can be rebuilt from it.

    On `W` devices with `B` lesions each, the loss is the mean over all `W * B` lesions and the parameter gradients
    are those of one device with `W * B` lesions (of their batch norm, with `SyncBatchNorm`).
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        loss: nn.Module,
        optimizer: Callable[[NamedParameters], Optimizer],
        schedule: Callable[..., LRScheduler] | None = None,
        *,
        forwards: Literal["joint", "separate"] = "joint",
        gather: Literal["all", "ring"] = "all",
        chunk_size: int | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, metadata=metadata)
        if forwards not in ("joint", "separate"):
            raise ValueError(f"forwards must be 'joint' or 'separate', got {forwards!r}")
        if gather not in ("all", "ring"):
            raise ValueError(f"gather must be 'all' or 'ring', got {gather!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(
                f"chunk_size must be at least 1 lesion, or null to embed a batch at once; got {chunk_size}"
            )
        if gather == "ring":
            if not hasattr(loss, "gather_distributed"):
                raise ValueError(
                    f"gather='ring' needs a loss that goes round the ring when its gather_distributed is 'ring', and "
                    f"{type(loss).__name__} has no such attribute: set gather='all'"
                )
            cast(Any, loss).gather_distributed = "ring"
        elif getattr(loss, "gather_distributed", False):
            raise ValueError("MinedContrast gathers by itself: build the loss with gather_distributed=False")
        self.head = head
        self.loss = loss
        self.forwards = forwards
        self.gather = gather
        self.chunk_size = chunk_size

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, dim)`."""
        return cast(Tensor, self.head(self.encoder(views)))

    def trained_views(self, num_negatives: int) -> int:
        """Views of a lesion and of its negatives that go through the network, forward and back."""
        return 2 + 2 * num_negatives

    def embed(self, batch: ViewPairs) -> ViewPairs:
        """Embed the four sets of views of a batch; the same keys, each `(batch, dim)`.

        With `K` negatives a lesion, `(batch, K, 1, z, y, x)`, their embeddings are `(batch * K, dim)`.
        """
        views = [*batch["positive"], *batch["negative"]]
        if self.chunk_size is None:
            embeddings = self._embed_views(*views)
        else:
            embeddings = embed_in_chunks(self._embed_views, views, self.chunk_size, networks=self, device=self.device)
        pos0, pos1, neg0, neg1 = embeddings
        return {"positive": (pos0, pos1), "negative": (neg0, neg1)}

    def _embed_views(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of each of the sets of views, `(..., 1, z, y, x)`, one row a view."""
        views = tuple(view.flatten(0, view.ndim - 5) for view in views)
        if self.forwards == "joint":
            embeddings: Tensor = self(torch.cat(views))
            return torch.split(embeddings, [len(view) for view in views])
        return tuple(self(view) for view in views)

    def contrast(self, out: ViewPairs) -> Tensor:
        """The loss of this device's lesions against the negatives of all devices.

        Args:
            out: this device's embeddings.

        Raises:
            ValueError: on every device, if the devices hold batches of different sizes.
        """
        world_size = self.trainer.world_size
        if world_size == 1:
            return cast(Tensor, self.loss(out))
        options: dict[str, Any] = {}
        if self.gather == "all":  # else the loss compares the sizes and meets the others by itself
            self._check_equal_batches(out)
            negatives = getattr(self.loss, "negatives", "mined")
            if negatives != "lesions":
                out = {"positive": out["positive"], "negative": self._gather_views(out["negative"])}
            if negatives != "mined":
                options["lesions"] = self._gather_views(out["positive"])
                options["first_lesion"] = self.global_rank * len(out["positive"][0])
        loss = cast(Tensor, self.loss(out, **options))
        # DDP averages the gradients over devices: right for a mean, but a sum over devices has to be made up for.
        return loss * world_size if getattr(self.loss, "reduction", "mean") == "sum" else loss

    def _gather_views(self, views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both views of all devices in order of rank, `(world_size * batch, dim)` each, in one collective."""
        both = torch.stack(views)
        # Half precision is for the encoder; the gradients that come back from other devices are summed in float32.
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        gathered = cast(Tensor, self.all_gather(both, sync_grads=True))  # (world_size, 2, batch, dim)
        return gathered[:, 0].flatten(0, 1), gathered[:, 1].flatten(0, 1)

    def _check_equal_batches(self, out: ViewPairs) -> None:
        """Compare batch sizes before any larger collective, which would hang or crash on unequal ones."""
        local = torch.tensor([len(out["positive"][0]), len(out["negative"][0])], device=self.device)
        sizes = cast(Tensor, self.all_gather(local)).tolist()
        if any(size != sizes[0] for size in sizes):
            held = ", ".join(f"rank {rank}: {p} lesions and {n} negatives" for rank, (p, n) in enumerate(sizes))
            raise ValueError(
                f"the devices hold batches of different sizes ({held}). Their negatives are shared, so the sizes "
                "must be equal: drop the incomplete last batch, as LesionDataModule does, or give every rank as many."
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Bring a batch to the device; where it is embedded in chunks, all but its views.

        Patches whose views are still to be made there are no pair of views, and go.
        """
        views = {key: batch[key] for key in ("positive", "negative") if not isinstance(batch[key], Tensor)}
        if self.chunk_size is None or not views:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        others = {key: value for key, value in batch.items() if key not in views}
        return {**views, **super().transfer_batch_to_device(others, device, dataloader_idx)}

    def training_step(self, batch: ViewPairs, batch_idx: int) -> dict[str, Any]:
        """One step on one device's batch of views."""
        out = self.embed(batch)
        loss = self.contrast(out)
        num_lesions = len(batch["positive"][0])
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=num_lesions)
        figures: dict[str, Tensor] = {}
        if "negative_from_other_scan" in batch:
            figures["data/negative_from_other_scan"] = batch["negative_from_other_scan"].float().mean()
        if isinstance(temperature := getattr(self.loss, "temperature", None), Tensor):  # else it is not trained
            figures["train/temperature"] = temperature.detach()
        self.log_dict(figures, batch_size=num_lesions)
        return {"loss": loss, "embeddings": detached(*out["positive"]), "negatives": detached(*out["negative"])}
