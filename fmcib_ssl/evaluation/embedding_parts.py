"""Embedding an archive: in parts that are on the disk as they are done, by one process or several.

Beside `OUT.parquet` stands `OUT.parts/` while the work is going on: `request.json`, and a file for each shard of 256
lesions. A shard belongs to one process, its batches do not cross its border, and lesions are joined by their id; so the
features are the same bytes however many processes took part and however often they were stopped. No process waits for
another: the one that finds all parts there puts them together.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fmcib_ssl.evaluation.embedding import gather, provenance_of, reading_order, rejected_lesions
from fmcib_ssl.evaluation.embedding_encoders import FrozenEncoder
from fmcib_ssl.evaluation.embedding_inference import EmbeddedShard, Inference, embed_shards
from fmcib_ssl.evaluation.embedding_sources import open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, METADATA_KEY, FeatureTable, FeatureTableError
from fmcib_ssl.io import write_atomically

SHARD_SIZE = 256
REQUEST_FILE = "request.json"
#: What of an provenance decides the features.
_DECISIVE = ("kind", "sha256", "encoder", "seed", "preprocessing", "views", "precision")


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's: every `total`-th shard, from `number`, which counts from 0."""

    number: int = 0
    total: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.total:
            raise FeatureTableError(f"process {self.number} of {self.total}: they are counted from 0")


@dataclass(frozen=True)
class Outcome:
    """What `embed_to_file` did.

    Attributes:
        output: the table of features.
        num_lesions: of the source.
        num_embedded: now, by this process.
        num_missing: lesions of other processes that are not done yet; if there are any, `output` is not there yet.
        num_rejected: rows that have no features; None if `output` was there already, or is not there yet.
        seconds: that embedding took.
    """

    output: Path
    num_lesions: int
    num_embedded: int = 0
    num_missing: int = 0
    num_rejected: int | None = None
    seconds: float = 0.0


def parts_folder(output: Path) -> Path:
    """Where the parts of a table of features are while it is made."""
    return output.with_suffix(".parts")


def rejected_file(output: Path) -> Path:
    """Where it stands which lesions have no features."""
    return output.with_suffix(".rejected.csv")


def embed_to_file(
    encoder: FrozenEncoder,
    source: Mapping[str, Any],
    output: Path | str,
    inference: Inference,
    *,
    share: Share | None = None,
    restart: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: bool = True,
) -> Outcome:
    """Embed this process's share of the lesions of a source; write the table if no part is missing then.

    Called again after an interruption, it goes on from the parts that are there. In half precision the features are
    stored as float16.

    Args:
        encoder: what to embed with.
        source: where the lesions are; see `embedding_sources`.
        output: of the table, ending in `.parquet`.
        inference: how.
        share: of this process; by default everything.
        restart: replace a finished table, and parts of another request.
        shard_size: lesions in a part; the same in all processes.
        progress: show it.

    Raises:
        FeatureTableError: what is there comes from another request, which the message compares; or no lesion could be
            embedded.
        fmcib_ssl.data.store.StoreError: as `open_patches`.
        fmcib_ssl.data.tables.AnnotationsError: as `open_patches`.
    """
    output, share = Path(output), share or Share()
    if output.suffix != ".parquet":
        raise FeatureTableError(f"{output}: call the table of features NAME.parquet")
    lesions, patches, preprocessing = open_patches(source, encoder.preprocessing)
    provenance = provenance_of(encoder, preprocessing, source, patches, inference)
    if output.exists() and not restart:
        _agree(output, _decisive(_provenance_in(output)), _decisive(provenance))
        return Outcome(output, len(lesions))
    places = reading_order(lesions)
    shards = dict(enumerate(np.split(places, range(shard_size, len(places), shard_size))))
    own = {number: shard.tolist() for number, shard in shards.items() if number % share.total == share.number}
    if not own:
        return Outcome(output, len(lesions), num_missing=len(lesions))
    parts = _Parts(parts_folder(output), lesions[ID_COLUMN], provenance, shard_size, restart=restart)
    to_do = {number: shard for number, shard in own.items() if parts.read(number, shard) is None}
    began = time.monotonic()
    num_own, num_to_do = (sum(map(len, some.values())) for some in (own, to_do))
    with tqdm(
        total=num_own,
        initial=num_own - num_to_do,
        desc="Embedding" if share.total == 1 else f"Embedding (process {share.number + 1} of {share.total})",
        unit="lesion",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # in a log a line now and then
    ) as bar:
        for shard in embed_shards(encoder.module, preprocessing, patches, to_do, inference, advance=bar.update):
            parts.write(shard)
    seconds = time.monotonic() - began

    found = {number: parts.read(number, shard.tolist()) for number, shard in shards.items()}
    if missing := sum(len(shards[number]) for number, shard in found.items() if shard is None):
        # Another process is at them, or has just put all together and removed them.
        return Outcome(output, len(lesions), num_to_do, missing if parts.folder.exists() else 0, None, seconds)
    done = [shard for shard in found.values() if shard is not None]
    rejected = rejected_lesions(patches, {k: reason for shard in done for k, reason in shard.failures.items()})
    rejected_file(output).unlink(missing_ok=True)
    if len(rejected):
        rejected.to_csv(rejected_file(output), index=False)
    try:
        gather(done, lesions, provenance).write(output, half=inference.precision != "32")
    except FeatureTableError as error:
        raise FeatureTableError(f"{error}; see {rejected_file(output)}") from error
    finally:
        parts.remove()
    return Outcome(output, len(lesions), num_to_do, 0, len(rejected), seconds)


class _Parts:
    """The folder of parts, each a table of features of its own that names its request."""

    def __init__(
        self, folder: Path, lesion_ids: pd.Series[str], provenance: Mapping[str, Any], shard_size: int, *, restart: bool
    ) -> None:
        self.folder = folder
        self.lesion_ids = lesion_ids.to_numpy()
        self.request = {**_decisive(provenance), "shard_size": shard_size}
        file = folder / REQUEST_FILE
        if file.exists() and not restart:
            _agree(folder, json.loads(file.read_text(encoding="utf-8")), self.request)
        try:
            write_atomically(file, json.dumps(self.request, indent=1))
        except OSError as error:
            raise FeatureTableError(f"{folder} cannot be written: {error.strerror}") from error

    def read(self, number: int, places: list[int]) -> EmbeddedShard | None:
        """A part, if it is there, whole, and of this request."""
        try:
            table = FeatureTable.read(self._file(number))
        except (FileNotFoundError, FeatureTableError):
            return None
        place_of = {self.lesion_ids[place]: place for place in places}
        failures: dict[str, str] = table.provenance["failures"]
        ids = table.lesions[ID_COLUMN].tolist()
        if table.provenance["request"] != self.request or {*ids, *failures} != place_of.keys():
            return None
        return EmbeddedShard(
            number,
            np.array([place_of[lesion] for lesion in ids], dtype=np.int64),
            table.features,
            {place_of[lesion]: reason for lesion, reason in failures.items()},
        )

    def write(self, shard: EmbeddedShard) -> None:
        lesions = pd.DataFrame({ID_COLUMN: self.lesion_ids[shard.places]}, dtype="str")
        failures = {str(self.lesion_ids[place]): reason for place, reason in shard.failures.items()}
        provenance = {"request": self.request, "failures": failures}
        FeatureTable(lesions, shard.features, provenance).write(self._file(shard.number))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"


def _decisive(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What two requests must have in common; as after a journey through JSON."""
    source = provenance.get("source") or {}
    said = {key: provenance.get(key) for key in _DECISIVE}
    found: dict[str, Any] = json.loads(json.dumps({**said, "lesions": source.get("fingerprint")}))
    return found


def _agree(where: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    differences = [
        f"  {key}: {json.dumps(there.get(key))} there, {json.dumps(value)} asked for"
        for key, value in asked.items()
        if there.get(key) != value
    ]
    if differences:
        raise FeatureTableError(
            "\n".join([f"{where} was made by another request:", *differences])
            + "\nchoose another output=FILE.parquet, or restart=true to replace it"
        )


def _provenance_in(output: Path) -> dict[str, Any]:
    """The provenance that a file holds; features are not read."""
    try:
        provenance: dict[str, Any] = json.loads(pq.read_schema(output).metadata[METADATA_KEY])
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
        raise FeatureTableError(
            f"{output} is there, and no table of features: choose another output=FILE.parquet, or restart=true"
        ) from error
    return provenance
