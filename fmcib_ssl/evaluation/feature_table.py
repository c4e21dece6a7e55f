"""Features of lesions as one Parquet file, with every column of the lesions' table and where the features came from.

Whoever reads such a file with pandas or polars finds the lesions' columns and a column `features`, a list of numbers.
What made them is JSON in the schema's metadata, under `fmcib_ssl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fmcib_ssl.io import atomic_write, digest_of, parse_json
from fmcib_ssl.types import UserError

FEATURES_COLUMN = "features"
ID_COLUMN = "lesion_id"
#: Key of the provenance in the metadata of the Parquet schema.
METADATA_KEY = b"fmcib_ssl"
#: In the file's metadata: digest of all values. Files of earlier versions have none, or one of their bytes.
_DIGEST_KEY = b"fmcib_ssl_values"

_NUM_SHOWN = 5
_MAX_ROWS = 50_000_000
_LARGEST_HALF = float(np.finfo(np.float16).max)


class FeatureTableError(UserError, ValueError):
    """A table of features that cannot be made, read, written or joined; the message says what to do."""


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of lesions, one row a lesion.

    Attributes:
        lesions: every column of the lesions' table. `lesion_id`, unique text, is what rows are joined by.
        features: `(lesions, dim)` float32; row i belongs to `lesions.iloc[i]`.
        provenance: where the features came from; plain values, for JSON. `name` for people; `kind`, one of "encoder",
            "random_weights", "raw_voxels" and "columns"; `weights` and `sha256`, the file; `encoder`, the `_target_`
            and arguments that build it; `preprocessing`; `source`, which `open_patches` takes to open the same lesions
            again; `views`, `precision`, `versions`. What does not apply is None.

    Raises:
        FeatureTableError: rows that do not fit together, missing or duplicate ids, or a provenance that is not plain
            values.
    """

    lesions: pd.DataFrame
    features: npt.NDArray[np.float32]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype != np.float32 or len(self.features) != len(self.lesions):
            raise FeatureTableError(
                f"features should be float32 ({len(self.lesions)}, dim), a row a lesion; they are "
                f"{self.features.dtype} {self.features.shape}"
            )
        if ID_COLUMN not in self.lesions:
            raise FeatureTableError(f"the table of lesions has no column {ID_COLUMN!r}")
        if FEATURES_COLUMN in self.lesions:
            raise FeatureTableError(f"the table of lesions already has a column {FEATURES_COLUMN!r}")
        ids = self.lesions[ID_COLUMN]
        if wrong := [value for value in ids if not isinstance(value, str)]:
            raise FeatureTableError(f"{ID_COLUMN} should be text in every row; it is {some_of(wrong)}")
        if ids.duplicated().any():
            raise FeatureTableError(f"duplicate {ID_COLUMN}: {some_of(ids[ids.duplicated()].unique())}")
        try:
            json.dumps(self.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise FeatureTableError(f"the provenance may hold only plain values: {error}") from error

    def __len__(self) -> int:
        return len(self.lesions)

    @property
    def name(self) -> str:
        """For people."""
        return str(self.provenance.get("name") or "features")

    def aligned(self, lesion_ids: Iterable[str]) -> FeatureTable:
        """The rows of these lesions, in this order; joined by `lesion_id`, never by position.

        Raises:
            FeatureTableError: a lesion that this table has not, or one that is asked for twice.
        """
        ids = pd.Index(lesion_ids)
        rows = pd.Index(self.lesions[ID_COLUMN]).get_indexer(ids)
        if len(absent := ids[rows < 0]):
            raise FeatureTableError(
                f"{self.name!r} has no features of {len(absent)} of {len(ids)} lesions: {some_of(absent)}"
            )
        return FeatureTable(self.lesions.iloc[rows].reset_index(drop=True), self.features[rows], self.provenance)

    @staticmethod
    def side_by_side(tables: Sequence[FeatureTable]) -> FeatureTable:
        """All features of the lesions that every table has; columns and provenance are those of the first table."""
        if len(tables) == 1:
            return tables[0]
        shared = shared_lesions(tables)[ID_COLUMN]
        parts = [table.aligned(shared) for table in tables]
        about = {**parts[0].provenance, "name": " + ".join(part.name for part in parts), "kind": "side_by_side"}
        return FeatureTable(parts[0].lesions, np.hstack([part.features for part in parts]), about)

    def write(self, path: Path | str, *, half: bool = False) -> Path:
        """Write one Parquet file, whole or not at all; one that was there is replaced.

        Args:
            path: of the file; its folder is made.
            half: keep the features as float16, unless one is too large for it.

        Raises:
            FeatureTableError: a column that Parquet cannot hold, or a file that cannot be written.
        """
        path = Path(path)
        half = half and (self.features.size == 0 or float(np.abs(self.features).max()) <= _LARGEST_HALF)
        values = pa.array(np.ascontiguousarray(self.features, dtype=np.float16 if half else np.float32).ravel())
        try:
            table = pa.Table.from_pandas(self.lesions, preserve_index=False)
        except pa.ArrowException as error:
            raise FeatureTableError(f"{path}: a column of the lesions cannot be written: {error}") from error
        column = pa.FixedSizeListArray.from_arrays(values, self.features.shape[1])
        table = table.append_column(FEATURES_COLUMN, column)
        metadata = {**(table.schema.metadata or {}), METADATA_KEY: json.dumps(self.provenance).encode()}
        table = table.replace_schema_metadata(metadata)
        table = table.replace_schema_metadata({**metadata, _DIGEST_KEY: _digest(table)})
        try:
            with atomic_write(path) as file:
                # Features are noise to a dictionary and to a compressor; the lesions' columns are not.
                names = [str(name) for name in self.lesions]
                pq.write_table(table, file, use_dictionary=names, compression=dict.fromkeys(names, "zstd"))
        except OSError as error:
            raise FeatureTableError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    @classmethod
    def read(cls, path: Path | str) -> FeatureTable:
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: no such file.
            FeatureTableError: not such a file, or a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; fmcib-ssl embed makes one")
        try:
            if (num_rows := pq.read_metadata(path).num_rows) > _MAX_ROWS:  # a file of kilobytes may claim any number
                raise ValueError(f"it claims {num_rows} rows")
            table = pq.read_table(path)
            table.validate(full=True)
            if _DIGEST_KEY in table.schema.metadata and table.schema.metadata[_DIGEST_KEY] != _digest(table):
                raise ValueError("its values are not those that were written")
            provenance = parse_json(table.schema.metadata[METADATA_KEY])
            if not isinstance(provenance, dict):
                raise TypeError(f"its provenance is {type(provenance).__name__}")
            column = table[FEATURES_COLUMN].combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            features = values.reshape(len(table), column.type.list_size)
            lesions = table.drop_columns([FEATURES_COLUMN]).to_pandas()
        except (pa.ArrowException, OSError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise FeatureTableError(
                f"{path}: not a whole table of features of fmcib_ssl ({type(error).__name__}: {error}); make it again "
                "with fmcib-ssl embed"
            ) from error
        return cls(lesions, features, provenance)


def _digest(table: pa.Table) -> bytes:
    """Of all names, values and metadata, whatever the bytes in which a file keeps them."""
    features = table[FEATURES_COLUMN].combine_chunks()
    numbers = hashlib.sha256(features.flatten().to_numpy(zero_copy_only=False).tobytes()).hexdigest()
    metadata = {str(key): str(value) for key, value in table.schema.metadata.items() if key != _DIGEST_KEY}
    lesions = table.drop_columns([FEATURES_COLUMN]).to_pydict()
    return digest_of(features.type.list_size, numbers, metadata, list(lesions), lesions).encode()


def some_of(values: Collection[object]) -> str:
    """The first of them, and how many more there are, for a message."""
    more = f" and {len(values) - _NUM_SHOWN} more" if len(values) > _NUM_SHOWN else ""
    return ", ".join(map(repr, list(values)[:_NUM_SHOWN])) + more


def shared_lesions(tables: Iterable[FeatureTable]) -> pd.DataFrame:
    """Rows of the first table's lesions that every table has features of."""
    first, *others = (table.lesions for table in tables)
    shared = set(first[ID_COLUMN]).intersection(*(lesions[ID_COLUMN] for lesions in others))
    return first[first[ID_COLUMN].isin(shared)].reset_index(drop=True)
