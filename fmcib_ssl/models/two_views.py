"""Methods that see only a lesion's two views, and no mined negative: what they share, SimCLR, VICReg and BYOL."""

from __future__ import annotations

import copy
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmcib_ssl.models.pretraining import Parts, Pretraining, detached
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

    Both views go through the encoder in one batch. Mined negatives in the batch are not looked at.
    """

    compares_lesions = True

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

    def full_precision(self) -> torch.autocast:
        """Half precision is for the encoder; heads' outputs are compared in float32, which `full` gives."""
        return torch.autocast(self.device.type, enabled=False)


def full(embeddings: Tensor) -> Tensor:
    """Embeddings in float32, or in float64 if they are."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def lightly_module(name: str) -> ModuleType:
    """Import a module of lightly, such as `loss`, which only the baselines need.

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


class _ComparedByCriterion(TwoViews):
    """Encoder and head, and a loss of lightly's that compares the two views' embeddings over all devices."""

    head: nn.Module
    criterion: nn.Module

    def forward(self, views: Tensor) -> Tensor:
        """Embed views: `(batch, 1, z, y, x)` to `(batch, dim)`."""
        return cast(Tensor, self.head(self.encoder(views)))

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """The criterion over all lesions of all devices."""
        z0, z1 = self(torch.cat([view0, view1])).chunk(2)
        with self.full_precision():
            return Step(self.criterion(full(z0), full(z1)), (z0, z1))


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
        # By keyword: the second place of its signature is the memory bank's. Without processes there is nothing to
        # gather, and it looks by itself.
        self.criterion = lightly_module("loss").NTXentLoss(temperature=temperature, gather_distributed=True)


class VICReg(_ComparedByCriterion):
    """Views agree, every dimension varies, and no two dimensions say the same; lightly's loss and head, no negatives.

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
        heads = lightly_module("models.modules.heads")
        self.head = heads.VICRegProjectionHead(parts.num_features, hidden_dim, out_dim)
        self.criterion = lightly_module("loss").VICRegLoss(
            lambda_param=invariance, mu_param=variance, nu_param=covariance, gather_distributed=True
        )


class BYOL(TwoViews):
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
        super().__init__(parts)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: must be from 0 to 1.")
        heads = lightly_module("models.modules.heads")
        self.projector: nn.Module = heads.BYOLProjectionHead(parts.num_features, hidden_dim, out_dim)
        self.predictor: nn.Module = heads.BYOLPredictionHead(out_dim, hidden_dim, out_dim)
        self.target_encoder = copy.deepcopy(parts.encoder).requires_grad_(False)
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
