"""What turns patches into features: an encoder from a file, the same encoder never trained, or no encoder at all."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmcib_ssl.evaluation.feature_table import FeatureTableError
from fmcib_ssl.models.export import find_builder, load_encoder
from fmcib_ssl.types import Preprocessing


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder, the patches that it takes, and what a table of features says of it.

    Attributes:
        module: `(batch, 1, z, y, x)` to `(batch, features)`.
        preprocessing: of its patches.
        about: `name`, `kind`, `weights`, `sha256`, `encoder` and `seed` of a `FeatureTable`'s provenance.
    """

    module: nn.Module
    preprocessing: Preprocessing
    about: dict[str, Any]


class RawVoxels(nn.Module):
    """The baseline that knows nothing: normalised voxels, z slowest, as features."""

    def forward(self, patches: Float[Tensor, "batch 1 z y x"]) -> Float[Tensor, "batch voxels"]:
        """Flatten."""
        return patches.flatten(1)


def trained_encoder(path: Path | str, *, trusted_targets: Collection[str] = ()) -> FrozenEncoder:
    """An encoder from an exported file or a training checkpoint.

    Args:
        path: as `load_encoder`, which also says what is raised.
        trusted_targets: as `load_encoder`.
    """
    path = Path(path)
    module = load_encoder(path, trusted_targets=trusted_targets)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "name": path.stem, "kind": "encoder", "weights": str(path.absolute()), "sha256": sha256,
        "encoder": module.spec, "seed": None,
    }  # fmt: skip
    preprocessing = module.preprocessing
    assert isinstance(preprocessing, Preprocessing)
    return FrozenEncoder(module, preprocessing, about)


def random_encoder(
    spec: Mapping[str, Any], preprocessing: Preprocessing, seed: int = 0, *, trusted_targets: Collection[str] = ()
) -> FrozenEncoder:
    """An encoder with the weights that it is built with; a function of `spec` and `seed`.

    Args:
        spec: `_target_` and arguments.
        preprocessing: of its patches.
        seed: of the weights.
        trusted_targets: dotted names, besides this package's own encoders, that may be imported and called.

    Raises:
        FeatureTableError: a target that is not trusted, or that cannot be built so.
    """
    arguments = dict(spec)
    target = str(arguments.pop("_target_", None))
    try:
        build = find_builder(target, trusted_targets, "random weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build(**arguments)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise FeatureTableError(f"{target} with {arguments} cannot be built: {error}") from error
    about = {
        "name": "random weights", "kind": "random_weights", "weights": None, "sha256": None,
        "encoder": dict(spec), "seed": seed,
    }  # fmt: skip
    return FrozenEncoder(module.eval(), preprocessing, about)


def raw_voxels(preprocessing: Preprocessing) -> FrozenEncoder:
    """The voxels themselves."""
    about = {
        "name": "raw voxels", "kind": "raw_voxels", "weights": None, "sha256": None, "encoder": None, "seed": None,
    }  # fmt: skip
    return FrozenEncoder(RawVoxels(), preprocessing, about)
