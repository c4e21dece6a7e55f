"""The contenders of benchmarks/lidc.py: each is a command line of train.py, composed, built and trained as there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import lightning as L
import numpy as np
import torch
from contenders import composed, embedded, pretrained, what_decides
from lidc_data import Nodules
from torch import nn

from fmcib_ssl.data import TensorPatches
from fmcib_ssl.evaluation import compact, hu_statistics
from fmcib_ssl.models.point_features import point_derivatives, point_features
from fmcib_ssl.training import Settings, build_part
from fmcib_ssl.types import Array

#: What all contenders share with the recipe, unless they say otherwise; so the budget is equal.
RECIPE = "+experiment=nodule_recipe"
#: The same views without what is the recipe's own.
PLAIN_VIEWS = "~augment.transforms.surroundings"


@dataclass(frozen=True)
class Contender:
    """One way to get features.

    Attributes:
        name: in tables.
        kind: `trained`, `random` (the encoder as it is initialised), or what needs no encoder.
        overrides: of the recipe's command line.
    """

    name: str
    kind: Literal["trained", "random", "voxels", "statistics", "points", "diameter"] = "trained"
    overrides: tuple[str, ...] = field(default=())

    def settings(self, seed: int, epochs: int | None) -> Settings:
        """Everything about its training."""
        length = [] if epochs is None else [f"trainer.max_epochs={epochs}"]
        return composed(RECIPE, f"seed={seed}", *length, *self.overrides)

    def key(self, epochs: int | None) -> str:
        """Name and a checksum of the configuration: features that are kept are used again for the same only."""
        if self.kind not in ("trained", "random"):
            return self.name
        decides = what_decides(self.settings(0, epochs), self.kind)
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"


SMALL = ("encoder=small", PLAIN_VIEWS)
OWN = ("encoder=concentric", PLAIN_VIEWS)
BOTH = ("loss.negatives=mined_and_lesions", "data.negatives_per_lesion=1")
CONTENDERS = (
    Contender("recipe"),
    Contender("learned_only", overrides=("encoder.point_features=false",)),
    Contender("point_features", "points"),
    Contender("random", "random", ("encoder=small",)),
    Contender("concentric", overrides=("encoder=concentric",)),
    Contender("random_radial", "random"),
    Contender("random_concentric", "random", ("encoder=concentric",)),
    Contender("raw_voxels", "voxels"),
    Contender("hu_statistics", "statistics"),
    Contender("diameter", "diameter"),
    Contender("lightly_simclr", overrides=("method=simclr", *SMALL)),
    Contender("lightly_simclr_concentric", overrides=("method=simclr", *OWN)),
    Contender("mined", overrides=("loss.negatives=mined", "data.negatives_per_lesion=1", *SMALL)),
    Contender("mined_and_lesions", overrides=(*BOTH, *SMALL)),
    Contender("nnclr", overrides=("method=nnclr", *SMALL)),
    Contender("vicreg", overrides=("method=vicreg", *SMALL)),
    Contender("infonce_margin", overrides=("loss=infonce", "loss.temperature=0.1", *BOTH, *SMALL)),
    Contender("denoising", overrides=("method=denoising", *SMALL)),
)
BY_NAME: Mapping[str, Contender] = {contender.name: contender for contender in CONTENDERS}


def features(
    contender: Contender,
    nodules: Nodules,
    train_rows: Array,
    *,
    seed: int,
    epochs: int | None = None,
    accelerator: str = "cpu",
) -> Array:
    """Features of all nodules, float32 `(n, dim)`.

    Args:
        contender: whose.
        nodules: all of them.
        train_rows: those that a pretraining may see, without their labels.
        seed: of weights, order, negatives and views.
        epochs: instead of the recipe's.
        accelerator: Lightning's name of what it is trained on.
    """
    if contender.kind == "diameter":
        return nodules.lesions[["diameter_mm"]].to_numpy(np.float32)
    if contender.kind == "voxels":
        return compact(nodules.patches.flatten(1).clamp_min(-1024).float().numpy()).astype(np.float32)
    if contender.kind == "statistics":
        return hu_statistics(nodules.patches)
    if contender.kind == "points":
        hu = nodules.patches.clamp_min(-1024).float()
        return point_features(hu, point_derivatives(hu)).numpy()
    settings = contender.settings(seed, epochs)
    L.seed_everything(seed, verbose=False)
    if contender.kind == "random":
        encoder: nn.Module = build_part("encoder", settings.network)
    else:
        patches = nodules.patches[torch.from_numpy(train_rows)]
        pairs = TensorPatches(patches, nodules.pool, seed, settings.data.negatives_per_lesion)
        assert isinstance(settings.data.batch_size, int)
        assert settings.trainer.max_epochs is not None
        steps_per_epoch = len(pairs) // settings.data.batch_size
        encoder = pretrained(settings, pairs, settings.trainer.max_epochs * steps_per_epoch, accelerator)
    return embedded(encoder, nodules.patches)[0]
