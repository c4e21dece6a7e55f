"""Patches through an encoder, in batches: precision, views, and lesions that cannot be read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int16
from torch import Tensor, nn
from torch.utils.data import Dataset

from fmcib_ssl.data.store import StoreError
from fmcib_ssl.data.workers import WatchedLoader, no_worker_left
from fmcib_ssl.evaluation.embedding_sources import SourcePatches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTableError
from fmcib_ssl.types import Preprocessing, ScanError

Precision = Literal["32", "bf16", "fp16"]
#: The patch alone, or the mean over it and its seven mirror images.
Views = Literal[1, 8]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: A patch that cannot be read is one of these; anything else is an error of ours.
_UNREADABLE = (ScanError, StoreError, OSError, MemoryError)


@dataclass(frozen=True)
class Inference:
    """How patches go through an encoder.

    Attributes:
        batch_size: patches in one forward.
        precision: "32" is float32 throughout (no TF32); "bf16" and "fp16" are torch's autocast.
        views: 1, or 8 for the mean of the features of a patch and of its mirror images.
        device: where; by default a GPU if there is one.
        num_workers: processes that read patches; 0 reads in this one.

    Raises:
        FeatureTableError: a value that cannot be, or half precision that the device does not have.
    """

    batch_size: int = 32
    precision: Precision = "32"
    views: Views = 1
    device: str | torch.device | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise FeatureTableError(f"batch_size={self.batch_size}, num_workers={self.num_workers}: too few")
        for name, allowed in (("precision", get_args(Precision)), ("views", get_args(Views))):
            if getattr(self, name) not in allowed:
                raise FeatureTableError(f"{name}={getattr(self, name)} is not one of {', '.join(map(str, allowed))}")
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            raise FeatureTableError("precision=fp16 is for GPUs; on the CPU take precision=bf16 or 32")

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def encode(
    encoder: nn.Module,
    patches_hu: Int16[Tensor, "batch 1 z y x"],
    preprocessing: Preprocessing,
    *,
    precision: Precision = "32",
    views: Views = 1,
) -> Float[Tensor, "batch dim"]:
    """Features of patches, float32, on the device where they and the encoder are.

    With one view in float32 it is `encoder(preprocessing.normalize(patches_hu))`. The encoder's mode is the caller's.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, dim)`.
        patches_hu: HU.
        preprocessing: how the encoder was trained to see them.
        precision: see `Inference`.
        views: see `Inference`.
    """
    normalized = preprocessing.normalize(patches_hu)
    flips = [dims for n in range(4) for dims in itertools.combinations((2, 3, 4), n)] if views == 8 else [()]
    with torch.inference_mode(), _autocast(normalized.device, precision):
        return torch.stack([encoder(normalized.flip(dims)).float() for dims in flips]).mean(0)


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    if precision != "32":
        return torch.autocast(device.type, _AUTOCAST[precision])
    if device.type == "cuda":  # convolutions would else round to the ten bits of TF32
        return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    return nullcontext()


class EmbeddedShard(NamedTuple):
    """Features of some of the lesions of a source."""

    number: int
    places: npt.NDArray[np.int64]  # in the source's table, of those that have features
    features: npt.NDArray[np.float32]  # (places, dim); (0, 1) if there are none
    failures: dict[int, str]  # why the others have none, by place


def embed_shards(
    encoder: nn.Module,
    preprocessing: Preprocessing,
    patches: SourcePatches,
    shards: Mapping[int, Sequence[int]],
    inference: Inference,
    *,
    advance: Callable[[int], object] = int,
) -> Iterator[EmbeddedShard]:
    """Embed shards one after the other, and yield each when it is whole.

    What a shard's features are does not depend on the other shards: batches do not cross its border.

    Args:
        encoder: moved to the device, and in evaluation mode while it is used.
        preprocessing: of its patches.
        patches: what to embed.
        shards: places of lesions by the number of the shard, none empty.
        inference: how.
        advance: told after each batch how many lesions it had, for a progress bar.
    """
    size = inference.batch_size
    batches = [(k, list(shard[i : i + size])) for k, shard in shards.items() for i in range(0, len(shard), size)]
    device = inference.torch_device
    loader = WatchedLoader(
        _Reader(patches),
        batch_sampler=[places for _, places in batches],
        num_workers=inference.num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        title=lambda place: str(patches.lesions[ID_COLUMN].iloc[place]),
        generator=torch.Generator(),  # or it would draw from torch's own
    )
    encoder = encoder.to(device)
    was_training = encoder.training
    encoder.eval()
    places: list[int] = []
    features: list[npt.NDArray[np.float32]] = []
    failures: dict[int, str] = {}
    try:
        with no_worker_left():
            for position, ((number, wanted), batch) in enumerate(zip(batches, loader, strict=True)):
                failures |= batch.failures
                if batch.patches is not None:
                    on_device = batch.patches.to(device, non_blocking=True)
                    found = encode(
                        encoder, on_device, preprocessing, precision=inference.precision, views=inference.views
                    )
                    values = found.cpu().numpy()
                    finite = np.isfinite(values).all(axis=1)
                    for place in np.array(batch.places)[~finite].tolist():
                        failures[place] = f"the encoder gives NaN or infinity in precision {inference.precision}"
                    places += np.array(batch.places)[finite].tolist()
                    features.append(values[finite])
                advance(len(wanted))
                if position + 1 == len(batches) or batches[position + 1][0] != number:
                    joined = np.concatenate(features) if places else np.empty((0, 1), np.float32)
                    yield EmbeddedShard(number, np.array(places, dtype=np.int64), joined, failures)
                    places, features, failures = [], [], {}
    finally:
        encoder.train(was_training)


class _Batch(NamedTuple):
    places: list[int]
    patches: Tensor | None  # int16 (places, 1, z, y, x)
    failures: dict[int, str]


class _Reader(Dataset[tuple[int, "Tensor | str"]]):
    """Patches by place; for one that cannot be read, the reason."""

    def __init__(self, patches: SourcePatches) -> None:
        self.patches = patches

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        try:
            return place, self.patches[place]
        except _UNREADABLE as error:
            return place, str(error) or type(error).__name__


def _collate(read: list[tuple[int, Tensor | str]]) -> _Batch:
    patches = {place: found for place, found in read if isinstance(found, Tensor)}
    failures = {place: found for place, found in read if isinstance(found, str)}
    return _Batch(list(patches), torch.stack(list(patches.values())) if patches else None, failures)
