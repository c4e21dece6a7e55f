"""From lesions and an encoder to a table of features, in memory or in parts on the disk, and to its baselines.

`embed_to_file` is for archives. Beside `OUT.parquet` stands `OUT.parts/` until it is whole, with a file for
each shard of 256 lesions. A shard belongs to one process, its batches do not cross its border, and lesions are joined
by their id; so the features are the same bytes however many processes took part and however often they were stopped. No
process waits for another: the one that finds all parts there puts them together.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import fmcib_ssl
from fmcib_ssl.data import REJECTED_COLUMNS, StoreError, WatchedLoader, no_worker_left
from fmcib_ssl.evaluation.embedding_sources import (
    RADIOMICS,
    SCAN_COLUMN,
    FrozenEncoder,
    Inference,
    Precision,
    SourcePatches,
    encode,
    open_patches,
    random_encoder,
    raw_voxels,
    statistics_encoder,
)
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable, FeatureTableError, some_of
from fmcib_ssl.models import evaluation_mode
from fmcib_ssl.types import Preprocessing

logger = logging.getLogger(__name__)

_SHARD_SIZE = 256
_PACKAGES = ("torch", "monai", "numpy")
#: What of a provenance decides the features.
_DECISIVE = ("kind", "sha256", "encoder", "seed", "preprocessing", "views", "precision")


class _Reader(Dataset[tuple[int, "Tensor | str"]]):
    """Patches by the lesion's number; for one that cannot be read, the reason."""

    def __init__(self, patches: SourcePatches) -> None:
        self.patches = patches

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.patches.read(index)
        except (StoreError, OSError, MemoryError) as error:  # anything else is an error of ours
            return index, str(error) or type(error).__name__


def _embed(
    encoder: FrozenEncoder,
    patches: SourcePatches,
    shards: Mapping[int, Sequence[int]],
    inference: Inference,
    advance: Callable[[int], object] = int,
) -> Iterator[tuple[int, FeatureTable]]:
    """Embed shards, numbers of lesions, one after the other, and yield each when it is whole.

    Of each a table of ids and features; its provenance says under `failures` why other lesions of it have none. What a
    shard's features are does not depend on the other shards: batches do not cross its border. `advance` is told after
    each batch how many lesions it had.
    """
    size, device = inference.batch_size, inference.torch_device
    batches = [list(shard[i : i + size]) for shard in shards.values() for i in range(0, len(shard), size)]
    ids = patches.lesions[ID_COLUMN].tolist()
    loader = WatchedLoader(
        _Reader(patches),
        batch_sampler=batches,
        num_workers=inference.num_workers,
        collate_fn=list,
        pin_memory=device.type == "cuda",
        title=lambda index: ids[index],
        generator=torch.Generator(),  # or it would draw from torch's own
    )
    module = encoder.module.to(device)
    with evaluation_mode(module), no_worker_left():
        results = iter(loader)
        for number, shard in shards.items():
            names: list[str] = []
            features: list[npt.NDArray[np.float32]] = []
            failures: dict[str, str] = {}
            for _ in range(0, len(shard), size):
                read = next(results)
                failures |= {ids[index]: reason for index, reason in read if isinstance(reason, str)}
                loaded = [(ids[index], patch) for index, patch in read if isinstance(patch, Tensor)]
                if loaded:
                    batch = torch.stack([patch for _, patch in loaded]).to(device, non_blocking=True)
                    options: Any = {"precision": inference.precision, "views": inference.views}
                    values = encode(module, batch, patches.preprocessing, **options).cpu().numpy()
                    finite = np.isfinite(values).all(axis=1)
                    features.append(values[finite])
                    names += [name for (name, _), is_finite in zip(loaded, finite, strict=True) if is_finite]
                    reason = f"the encoder gives NaN or infinity in precision {inference.precision}"
                    failures |= {loaded[k][0]: reason for k in np.flatnonzero(~finite)}
                advance(len(read))
            joined = np.concatenate(features) if names else np.empty((0, 1), np.float32)
            yield number, FeatureTable(pd.DataFrame({ID_COLUMN: names}, dtype="str"), joined, {"failures": failures})


def _joined(parts: Iterable[FeatureTable], lesions: pd.DataFrame, provenance: Mapping[str, Any]) -> FeatureTable:
    """One table of all parts, in the order of the lesions' table."""
    filled = [part for part in parts if len(part)]
    if not filled:
        raise FeatureTableError("no lesion could be embedded")
    ids = pd.Index(np.concatenate([part.lesions[ID_COLUMN] for part in filled]))
    rows = ids.get_indexer(pd.Index(lesions[ID_COLUMN]))
    features = np.concatenate([part.features for part in filled])[rows[rows >= 0]]
    return FeatureTable(lesions[rows >= 0].reset_index(drop=True), features, dict(provenance))


def _reading_order(lesions: pd.DataFrame) -> npt.NDArray[np.int64]:
    return np.argsort(lesions[SCAN_COLUMN].to_numpy(dtype=str), kind="stable")


def _provenance(
    encoder: FrozenEncoder, source: Mapping[str, Any], patches: SourcePatches, inference: Inference
) -> dict[str, Any]:
    plain = patches.preprocessing.to_dict()
    plain["patch_size_zyx"] = list(plain["patch_size_zyx"])
    return {
        **encoder.about,
        "preprocessing": plain,
        "source": {**source, "preprocessing": plain, "fingerprint": patches.fingerprint},
        "views": inference.views,
        "precision": inference.precision,
        "versions": {"fmcib_ssl": fmcib_ssl.__version__, **{name: metadata.version(name) for name in _PACKAGES}},
    }


def _open(source: Mapping[str, Any], encoder: FrozenEncoder) -> SourcePatches:
    return open_patches(source, encoder.preprocessing, masks=encoder.about.get("kind") == RADIOMICS)


def embed_source(
    encoder: FrozenEncoder,
    source: Mapping[str, Any],
    inference: Inference | None = None,
    lesion_ids: Collection[str] | None = None,
) -> FeatureTable:
    """Embed the lesions of a source in this process.

    A lesion whose patch cannot be read, or for which the encoder gives no finite number, is left out with a warning.

    Args:
        encoder: from `trained_encoder`, `random_encoder` or `raw_voxels`.
        source: names the lesions; see `embedding_sources`.
        inference: batch size, precision, views, device; by default float32 in batches of 32, on a GPU if there is one.
        lesion_ids: embed these and no others, in this order.

    Raises:
        FeatureTableError: as `open_patches`, no lesion embedded, or a lesion that the source does not have.
        fmcib_ssl.data.store.StoreError: as `open_patches`.
        fmcib_ssl.data.tables.AnnotationsError: as `open_patches`.
    """
    inference = inference or Inference()
    patches = _open(source, encoder)
    lesions = patches.lesions
    rows = np.arange(len(lesions))
    if lesion_ids is not None:
        rows = pd.Index(lesions[ID_COLUMN]).get_indexer(pd.Index(lesion_ids))
        if absent := [lesion for lesion, row in zip(lesion_ids, rows, strict=True) if row < 0]:
            raise FeatureTableError(f"no lesions {some_of(absent)} in the source {dict(source)}")
    order = rows[_reading_order(lesions.iloc[rows])]
    ((_, part),) = _embed(encoder, patches, {0: order.tolist()}, inference)
    failures = part.provenance["failures"]
    for lesion, reason in failures.items():
        logger.warning("lesion %s is skipped: %s", lesion, reason)
    table = _joined([part], lesions, _provenance(encoder, source, patches, inference))
    return table.aligned([lesion for lesion in lesions[ID_COLUMN].iloc[rows] if lesion not in failures])


def inference_of(table: FeatureTable, device: str | torch.device | None = None) -> Inference:
    """How a table was embedded, on this device; fp16 of another machine may be what this one has not."""
    provenance = table.provenance
    precision: Precision = "32" if provenance["precision"] == "fp16" else provenance["precision"]
    return Inference(precision=precision, views=provenance["views"], device=device)


def baseline_tables(
    table: FeatureTable, *, seed: int = 0, device: str | torch.device | None = None
) -> dict[str, FeatureTable]:
    """What an encoder has to beat, of the same lesions, read and preprocessed in the same way.

    `random weights`: the same encoder with the weights it is built with, never trained; left out if the table does not
    say what builds its encoder. `HU statistics`: numbers made by hand, `hu_statistics`. `raw voxels`: the normalised
    patch, flattened, for a probe that reduces it first.

    Args:
        table: its source is opened again.
        seed: of the random weights, 0 or more.
        device: a GPU if there is one, by default.

    Raises:
        FeatureTableError: the table does not say where its lesions are, or they cannot be found any more.
        fmcib_ssl.data.store.StoreError: as `open_patches`.
        fmcib_ssl.data.tables.AnnotationsError: as `open_patches`.
    """
    provenance, ids = table.provenance, table.lesions[ID_COLUMN]
    if not provenance.get("source") or not provenance.get("preprocessing"):
        raise FeatureTableError(
            f"{table.name!r} does not say where its lesions are, so no baseline can be made of them: "
            "embed them with fmcib-ssl embed"
        )
    preprocessing = Preprocessing.from_dict(provenance["preprocessing"])
    plain = Inference(device=device)
    encoders = {"HU statistics": (statistics_encoder(preprocessing), plain)}
    encoders["raw voxels"] = raw_voxels(preprocessing), plain
    if provenance.get("encoder"):
        untrained = random_encoder(provenance["encoder"], preprocessing, seed)
        encoders = {"random weights": (untrained, inference_of(table, device)), **encoders}
    baselines = {}
    for name, (encoder, inference) in encoders.items():
        features = embed_source(encoder, provenance["source"], inference, ids.tolist()).aligned(ids)
        baselines[name] = FeatureTable(table.lesions, features.features, features.provenance)
    return baselines


@dataclass(frozen=True)
class Outcome:
    """What `embed_to_file` did.

    Attributes:
        output: the table of features.
        num_lesions: in the source.
        num_embedded: now, by this process.
        num_missing: lesions of other processes that are not done yet; if there are any, `output` does not exist yet.
        num_rejected: rows that have no features, listed in `rejected_file`; None unless this process made `output`.
        seconds: that embedding took.
    """

    output: Path
    num_lesions: int
    num_embedded: int = 0
    num_missing: int = 0
    num_rejected: int | None = None
    seconds: float = 0.0


def rejected_file(output: Path) -> Path:
    """Where it stands which lesions have no features."""
    return output.with_suffix(".rejected.csv")


def embed_to_file(
    encoder: FrozenEncoder,
    source: Mapping[str, Any],
    output: Path | str,
    inference: Inference,
    *,
    share: tuple[int, int] = (0, 1),
    restart: bool = False,
    shard_size: int = _SHARD_SIZE,
    progress: bool = True,
) -> Outcome:
    """Embed this process's share of the lesions of a source; write the table if no part is missing then.

    Called again after an interruption, it resumes with the parts that are there. In half precision the features are
    stored as float16.

    Args:
        encoder: from `trained_encoder`, `random_encoder` or `raw_voxels`.
        source: names the lesions; see `embedding_sources`.
        output: `NAME.parquet`; parts go to `NAME.parts/`, what has no features to `NAME.rejected.csv`.
        inference: batch size, precision, views, device.
        share: number of this process, from 0, and of all: it embeds every `total`-th shard.
        restart: replace a finished table, and parts of another request.
        shard_size: lesions in a part; the same in all processes.
        progress: show it.

    Raises:
        FeatureTableError: `output` or its parts were made by another request, which the message compares; or no lesion
            could be embedded.
        fmcib_ssl.data.store.StoreError: as `open_patches`.
        fmcib_ssl.data.tables.AnnotationsError: as `open_patches`.
    """
    output, (rank, total) = Path(output), share
    if output.suffix != ".parquet":
        raise FeatureTableError(f"{output}: the output should be named NAME.parquet")
    patches, folder = _open(source, encoder), output.with_suffix(".parts")
    lesions = patches.lesions
    provenance = _provenance(encoder, source, patches, inference)
    request = {**_decisive(provenance), "shard_size": shard_size}
    if output.exists() and not restart:
        _check_finished(output, provenance)
        return Outcome(output, len(lesions))
    order = _reading_order(lesions)
    shards = dict(enumerate(np.split(order, range(shard_size, len(order), shard_size))))
    ids = {number: lesions[ID_COLUMN].iloc[shard].tolist() for number, shard in shards.items()}
    begun = next(filter(None, map(_read_part, sorted(folder.glob("*.parquet")))), None)
    if begun is not None and not restart:
        _check_same_request(folder, begun.provenance["request"], request)

    files = {number: folder / f"{number:06d}.parquet" for number in shards}
    own = [number for number in shards if number % total == rank]
    absent = [number for number in own if _whole_part(files[number], request, ids[number]) is None]
    to_do = {number: shards[number].tolist() for number in absent}
    num_own, num_to_do = (sum(len(shards[number]) for number in numbers) for numbers in (own, to_do))
    start = time.monotonic()
    with _bar(num_own, num_own - num_to_do, share, disable=not progress) as bar:
        for number, part in _embed(encoder, patches, to_do, inference, bar.update):
            replace(part, provenance={"request": request, **part.provenance}).write(files[number])
    seconds = time.monotonic() - start

    whole = {number: _whole_part(files[number], request, ids[number]) for number in shards}
    parts = [part for part in whole.values() if part is not None]
    if missing := sum(len(ids[number]) for number, part in whole.items() if part is None):
        # Another process is at them, or has just put all together and removed them.
        is_whole = output.exists() and not folder.exists()
        return Outcome(output, len(lesions), num_to_do, 0 if is_whole else missing, None, seconds)
    num_rejected = _write_rejected(patches, parts, rejected_file(output))
    try:
        _joined(parts, lesions, provenance).write(output, half=inference.precision != "32")
    except FeatureTableError as error:
        raise FeatureTableError(f"{error}; see {rejected_file(output)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(output, len(lesions), num_to_do, 0, num_rejected, seconds)


def _bar(total: int, done: int, share: tuple[int, int], *, disable: bool) -> tqdm[Any]:
    name = "Embedding" if share[1] == 1 else f"Embedding (process {share[0] + 1} of {share[1]})"
    every_s = 0.5 if sys.stderr.isatty() else 30  # in a log a line now and then
    return tqdm(total=total, initial=done, desc=name, unit="lesion", disable=disable, mininterval=every_s)


def _read_part(file: Path) -> FeatureTable | None:
    """A table of features of its own, which names its request; None if it is absent or damaged."""
    try:
        return FeatureTable.read(file)
    except (FileNotFoundError, FeatureTableError):
        return None


def _whole_part(file: Path, request: Mapping[str, Any], ids: Sequence[str]) -> FeatureTable | None:
    """A part, if it is there, whole, and of this request."""
    part = _read_part(file)
    if part is None or part.provenance["request"] != request:
        return None
    return part if {*part.lesions[ID_COLUMN], *part.provenance["failures"]} == set(ids) else None


def _write_rejected(patches: SourcePatches, parts: Iterable[FeatureTable], file: Path) -> int:
    """List the rows that have no features: `REJECTED_COLUMNS`, and `lesion_id` where it has one; how many there are."""
    failures = {lesion: reason for part in parts for lesion, reason in part.provenance["failures"].items()}
    failed = patches.lesions.set_index(ID_COLUMN, drop=False).loc[list(failures)]
    failed = failed.reindex(columns=[ID_COLUMN, "row", "image_path"])
    remedy = "repair the scan or its file in the store, then embed again"
    failed = failed.assign(value="", reason=list(failures.values()), remedy=remedy)
    file.unlink(missing_ok=True)
    if tables := [table for table in (patches.rejected, failed) if len(table)]:
        pd.concat(tables).reindex(columns=[*REJECTED_COLUMNS, ID_COLUMN]).to_csv(file, index=False)
    return sum(map(len, tables))


def _decisive(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What two requests must have in common; as after a journey through JSON."""
    values = {key: provenance.get(key) for key in _DECISIVE}
    values["lesions"] = (provenance.get("source") or {}).get("fingerprint")
    return dict(json.loads(json.dumps(values)))


def _check_finished(output: Path, provenance: Mapping[str, Any]) -> None:
    try:
        existing = FeatureTable.read(output).provenance
    except FeatureTableError as error:
        raise FeatureTableError(
            f"{output} exists and is not a table of features: choose another output=FILE.parquet, or restart=true"
        ) from error
    _check_same_request(output, _decisive(existing), _decisive(provenance))


def _check_same_request(where: Path, existing: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    differences = [
        f"  {key}: {json.dumps(existing.get(key))}, now {json.dumps(value)}"
        for key, value in request.items()
        if existing.get(key) != value
    ]
    if differences:
        raise FeatureTableError(
            "\n".join([f"{where} was made by another request:", *differences])
            + "\nchoose another output=FILE.parquet, or restart=true to replace it"
        )
