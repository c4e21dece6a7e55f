"""From lesions and an encoder to a table of features, and to the baselines that stand beside it.

`embedding_parts.embed_to_file` does the same for archives: in parts on the disk, in several processes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn

import fmcib_ssl
from fmcib_ssl.data.tables import REJECTED_COLUMNS
from fmcib_ssl.evaluation.embedding_encoders import FrozenEncoder, random_encoder, raw_voxels
from fmcib_ssl.evaluation.embedding_inference import EmbeddedShard, Inference, Precision, Views, embed_shards
from fmcib_ssl.evaluation.embedding_sources import SCAN_COLUMN, SourcePatches, open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable, FeatureTableError
from fmcib_ssl.types import Preprocessing

__all__ = ["baseline_tables", "embed_source", "open_patches"]

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "monai", "numpy")


def embed_source(
    encoder: nn.Module | FrozenEncoder,
    source: Mapping[str, Any],
    preprocessing: Preprocessing | None = None,
    *,
    batch_size: int = 32,
    precision: Precision = "32",
    views: Views = 1,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    name: str = "encoder",
    lesion_ids: Collection[str] | None = None,
) -> FeatureTable:
    """Embed the lesions of a source in this process.

    A lesion whose patch cannot be read, or for which the encoder gives no finite number, is left out with a warning.

    Args:
        encoder: an encoder of a file (`trained_encoder`), or any module `(batch, 1, z, y, x)` to `(batch, dim)`.
        source: where the lesions are; see `embedding_sources`.
        preprocessing: of the encoder's patches; by default its own.
        batch_size: patches in one forward.
        precision: "32", "bf16" or "fp16".
        views: 1, or 8 for the mean over mirror images.
        device: a GPU if there is one, by default.
        num_workers: processes that read patches.
        name: of a module that is not from a file.
        lesion_ids: embed these and no others, in this order.

    Raises:
        FeatureTableError: a source or a value that cannot be, no lesion left, or a lesion asked for that is not there.
        fmcib_ssl.data.store.StoreError: no store that can be read.
        fmcib_ssl.data.tables.AnnotationsError: no table that can be read.
    """
    inference = Inference(batch_size, precision, views, device, num_workers)
    frozen = _frozen(encoder, preprocessing, name)
    lesions, patches, preprocessing = open_patches(source, preprocessing or frozen.preprocessing)
    places = np.arange(len(lesions))
    if lesion_ids is not None:
        places = pd.Index(lesions[ID_COLUMN]).get_indexer(pd.Index(lesion_ids))
        if (places < 0).any():
            absent = [lesion for lesion, place in zip(lesion_ids, places, strict=True) if place < 0]
            raise FeatureTableError(f"the source {dict(source)} has not the lesions {', '.join(absent[:5])} (...)")
    order = reading_order(lesions.iloc[places])
    (shard,) = embed_shards(frozen.module, preprocessing, patches, {0: places[order].tolist()}, inference)
    for place, reason in shard.failures.items():
        logger.warning("lesion %s is left out: %s", lesions[ID_COLUMN].iloc[place], reason)
    provenance = provenance_of(frozen, preprocessing, source, patches, inference)
    return gather([shard], lesions, provenance).aligned(
        lesions[ID_COLUMN].iloc[[place for place in places.tolist() if place not in shard.failures]]
    )


def baseline_tables(
    table: FeatureTable,
    *,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    trusted_targets: Collection[str] = (),
) -> dict[str, FeatureTable]:
    """What an encoder has to beat, of the same lesions, read and preprocessed in the same way.

    `random weights`: the same encoder with the weights it is built with, never trained; left out if the table does not
    say what builds its encoder. `raw voxels`: the normalised patch, flattened, for a probe that reduces it first.

    Args:
        table: as `embed_source` gives it; its source is opened again.
        seed: of the random weights.
        batch_size: patches in one forward.
        device: a GPU if there is one, by default.
        num_workers: processes that read patches.
        trusted_targets: dotted names of foreign encoders that may be built.

    Raises:
        FeatureTableError: the table does not say where its lesions are, or they are there no more.
        fmcib_ssl.data.store.StoreError: as `open_patches`.
        fmcib_ssl.data.tables.AnnotationsError: as `open_patches`.
    """
    provenance = table.provenance
    if not provenance.get("source") or not provenance.get("preprocessing"):
        raise FeatureTableError(
            f"{provenance.get('name')!r} does not say where its lesions are, so no baseline can be made of them: "
            "embed them with scripts/embed.py"
        )
    preprocessing = Preprocessing.from_dict(provenance["preprocessing"])
    encoders = {"raw voxels": raw_voxels(preprocessing)}
    if provenance.get("encoder"):
        untrained = random_encoder(provenance["encoder"], preprocessing, seed, trusted_targets=trusted_targets)
        encoders = {"random weights": untrained, **encoders}
    baselines = {}
    for name, encoder in encoders.items():
        same = encoder.about["kind"] == "random_weights"
        found = embed_source(
            encoder,
            provenance["source"],
            batch_size=batch_size,
            # Half precision of another machine may be one that this device has not.
            precision=provenance["precision"] if same and provenance["precision"] != "fp16" else "32",
            views=provenance["views"] if same else 1,
            device=device,
            num_workers=num_workers,
            lesion_ids=table.lesions[ID_COLUMN].tolist(),
        ).aligned(table.lesions[ID_COLUMN])
        baselines[name] = FeatureTable(table.lesions, found.features, found.provenance)
    return baselines


def reading_order(lesions: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Places of lesions, those of one scan beside each other."""
    return np.argsort(lesions[SCAN_COLUMN].to_numpy(dtype=str), kind="stable")


def provenance_of(
    encoder: FrozenEncoder,
    preprocessing: Preprocessing,
    source: Mapping[str, Any],
    patches: SourcePatches,
    inference: Inference,
) -> dict[str, Any]:
    """Where features come from, for a `FeatureTable`."""
    plain = {**preprocessing.to_dict(), "patch_size_zyx": list(preprocessing.patch_size_zyx)}
    return {
        **encoder.about,
        "preprocessing": plain,
        "source": {**source, "preprocessing": plain, "fingerprint": patches.fingerprint},
        "views": inference.views,
        "precision": inference.precision,
        "versions": {"fmcib_ssl": fmcib_ssl.__version__, **{name: metadata.version(name) for name in _PACKAGES}},
    }


def gather(shards: Iterable[EmbeddedShard], lesions: pd.DataFrame, provenance: Mapping[str, Any]) -> FeatureTable:
    """One table of all shards, in the order of the lesions' table.

    Raises:
        FeatureTableError: not one lesion has features.
    """
    filled = [shard for shard in shards if len(shard.places)]
    if not filled:
        raise FeatureTableError("no lesion could be embedded")
    places = np.concatenate([shard.places for shard in filled])
    features = np.concatenate([shard.features for shard in filled])
    order = np.argsort(places)
    return FeatureTable(lesions.iloc[places[order]].reset_index(drop=True), features[order], dict(provenance))


def rejected_lesions(patches: SourcePatches, failures: Mapping[int, str]) -> pd.DataFrame:
    """Rows of the table that have no features: `REJECTED_COLUMNS`, and `lesion_id` where it has one."""
    failed = patches.lesions.iloc[list(failures)].reindex(columns=[ID_COLUMN, "row", "image_path"])
    remedy = "repair the scan or its file in the store, then embed again"
    failed = failed.assign(value="", reason=list(failures.values()), remedy=remedy)
    both = [frame for frame in (patches.rejected, failed) if len(frame)]
    columns = [*REJECTED_COLUMNS, ID_COLUMN]
    return pd.concat(both).reindex(columns=columns) if both else pd.DataFrame(columns=columns)


def _frozen(encoder: nn.Module | FrozenEncoder, preprocessing: Preprocessing | None, name: str) -> FrozenEncoder:
    if isinstance(encoder, FrozenEncoder):
        return encoder
    own = preprocessing or getattr(encoder, "preprocessing", None)
    if not isinstance(own, Preprocessing):
        raise FeatureTableError("this encoder does not say how its patches are cut: give preprocessing=")
    spec = getattr(encoder, "spec", None)
    about = {"name": name, "kind": "encoder", "weights": None, "sha256": None, "encoder": spec, "seed": None}
    return FrozenEncoder(encoder, own, about)
