"""The contenders of benchmarks/sarcoma.py: each is a command line of train.py, composed, built and trained as there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import lightning as L
import numpy as np
import torch
from contenders import composed, embedded, pretrained, what_decides
from sarcoma_data import NUM_NEGATIVES, SIZE_ZYX, Sarcomas
from torch import Tensor, nn

from fmcib_ssl.training import Settings, build_part
from fmcib_ssl.types import Array, PatchPair, SampleKey

_PatchOf = Callable[[SampleKey], Tensor]

#: What all share unless they say otherwise: the recipe for nodules with the small encoder, and views that keep what
#: lies round the point, since a sarcoma fills its patch.
SHARED = ("+experiment=nodule_recipe", "encoder=small", "~augment.transforms.surroundings")
#: Lesions of a step, unless a contender says otherwise, with as many steps, the same learning rate and as many views.
BATCH_SIZE = 64


@dataclass(frozen=True)
class Contender:
    """One way to get features.

    Attributes:
        name: in tables.
        kind: `trained`, `random` (the encoder as it is initialised), or what needs no encoder.
        overrides: of the shared command line.
        pool: what stands beside the places: negatives by one of the mining strategies, `none`; these as further
            lesions, `instances`.
    """

    name: str
    kind: Literal["trained", "random", "voxels", "statistics"] = "trained"
    overrides: tuple[str, ...] = ()
    pool: str = "background"

    def settings(self, seed: int, epochs: int) -> Settings:
        """Everything about its training."""
        return composed(*SHARED, f"seed={seed}", f"trainer.max_epochs={epochs}", *self.overrides)

    def key(self, epochs: int) -> str:
        """Name and a checksum of the configuration: pieces that are kept are used again for the same only."""
        if self.kind not in ("trained", "random"):
            return self.name
        decides = what_decides(self.settings(0, epochs), self.kind)
        digest = hashlib.sha256(json.dumps([list(decides.values()), self.pool], sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"


def _contrast(negatives: str, *others: str) -> tuple[str, ...]:
    mined = 0 if negatives == "lesions" else 1
    return (f"loss.negatives={negatives}", f"data.negatives_per_lesion={mined}", *others)


_INFONCE = ("loss=infonce", "loss.temperature=0.1")
_INSTANCES = ("data.batch_size=128", "optimizer.base_lr=4e-3")
CONTENDERS = (
    Contender("mined", overrides=_contrast("mined")),
    Contender("lesions", overrides=_contrast("lesions"), pool="none"),
    Contender("both", overrides=_contrast("mined_and_lesions")),
    Contender("random", "random"),
    Contender("hu_statistics", "statistics"),
    Contender("raw_voxels", "voxels"),
    Contender("lesions_ignore", overrides=_contrast("lesions", "loss.same_patient=ignore"), pool="none"),
    Contender("lesions_attract", overrides=_contrast("lesions", "loss.same_patient=attract"), pool="none"),
    Contender("mined_hard", overrides=_contrast("mined"), pool="hard"),
    Contender("both_hard", overrides=_contrast("mined_and_lesions"), pool="hard"),
    Contender("instances", overrides=_contrast("lesions", *_INSTANCES), pool="instances"),
    Contender("both_ignore", overrides=_contrast("mined_and_lesions", "loss.same_patient=ignore")),
    Contender("both_attract", overrides=_contrast("mined_and_lesions", "loss.same_patient=attract")),
    Contender("mined_near", overrides=_contrast("mined"), pool="near"),
    Contender("mined_uniform", overrides=_contrast("mined"), pool="uniform"),
    Contender("infonce_both", overrides=_contrast("mined_and_lesions", *_INFONCE)),
)
BY_NAME: Mapping[str, Contender] = {contender.name: contender for contender in CONTENDERS}


class TrainingPlaces:
    """Pairs of patches that lie in memory.

    Args:
        num: how many there are.
        patients: a number for the patient of each, `(num,)`.
        positive: the patch of a key, int16 `(1, z, y, x)`.
        negative: those beside it, `(1, z, y, x)` or `(K, 1, z, y, x)`.
    """

    def __init__(self, num: int, patients: Array, positive: _PatchOf, negative: _PatchOf) -> None:
        self.num, self.patients, self.positive, self.negative = num, patients, positive, negative

    def __len__(self) -> int:
        """Number of places."""
        return self.num

    def __getitem__(self, key: SampleKey, /) -> PatchPair:
        """The pair that `key` names."""
        return PatchPair(
            positive=self.positive(key), negative=self.negative(key), lesion=key.index,
            negative_from_other_scan=False, patient=int(self.patients[key.index]),
        )  # fmt: skip

    def title(self, lesion: int, /) -> str:
        """What names a place in a picture."""
        return f"place {lesion}"


def training_places(pool: str, sarcomas: Sarcomas, rows: Array, seed: int) -> TrainingPlaces:
    """What a contender with this pool is trained on.

    Args:
        pool: as of `Contender`.
        sarcomas: where the patches are.
        rows: among the places inside, those that may be seen.
        seed: with epoch and index it decides which negatives are drawn.
    """
    inside = sarcomas.rows_of("inside")[rows]
    patches, num = sarcomas.patches[torch.from_numpy(inside)], len(rows)
    patients = np.unique(sarcomas.patients[inside], return_inverse=True)[1]
    none = torch.empty((0, 1, *SIZE_ZYX.tolist()), dtype=torch.int16)
    if pool == "none":
        return TrainingPlaces(num, patients, lambda key: patches[key.index], lambda key: none)
    beside = sarcomas.pools["background" if pool == "instances" else pool][torch.from_numpy(rows)]

    def drawn(key: SampleKey) -> Tensor:
        return beside[key.index % num, np.random.default_rng([seed, *key]).integers(NUM_NEGATIVES)]

    if pool == "instances":
        return TrainingPlaces(
            2 * num, np.tile(patients, 2), lambda key: patches[key.index] if key.index < num else drawn(key),
            lambda key: none,
        )  # fmt: skip
    return TrainingPlaces(num, patients, lambda key: patches[key.index], drawn)


def features(contender: Contender, sarcomas: Sarcomas, train_patients: Array, *, seed: int, epochs: int) -> list[Array]:
    """Features of all places and of all nodules by an encoder that was pretrained, without labels, on some patients.

    Args:
        contender: `trained` or `random`.
        sarcomas: what is trained on and embedded.
        train_patients: those whose places the pretraining may see.
        seed: of weights, order, negatives and views.
        epochs: passes over the places.
    """
    L.seed_everything(seed, verbose=False)
    if contender.kind == "random":
        encoder: nn.Module = build_part("encoder", contender.settings(seed, epochs).network)
    else:
        rows = np.flatnonzero(np.isin(sarcomas.patients[sarcomas.rows_of("inside")], train_patients))
        places = training_places(contender.pool, sarcomas, rows, seed)
        encoder = pretrained(contender.settings(seed, epochs), places, epochs * (len(rows) // BATCH_SIZE))
    return embedded(encoder, sarcomas.patches, sarcomas.nodule_patches)
