"""The lesions to embed, wherever they lie: a store, or a table of scans or of files of one cropped lesion each.

A source is a dictionary of plain values, so that a table of features can say where its lesions were and they can be
opened again:

- `{"kind": "store", "path": DIR}`
- `{"kind": "scans", "annotations": FILE.csv, "image_root": DIR, "path_prefix": None, "coordinates": "lps",
  "on_bad_row": "skip", "stores": DIR}`; all but the first two may be left out. A store of the table is prepared below
  `stores` unless it is there.
- `{"kind": "medmnist", ...}`: see `medmnist_source`.

The first two take `select`, `{column: value or values}`, and may hold `preprocessing`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from jaxtyping import Int16
from torch import Tensor

from fmcib_ssl.data.tables import REJECTED_COLUMNS, SelectionError, selected, text_of
from fmcib_ssl.evaluation.feature_table import FEATURES_COLUMN, ID_COLUMN, FeatureTableError
from fmcib_ssl.types import Preprocessing

#: Where a table's store is prepared if its source does not say.
STORES = Path("data") / "stores"
#: Scans are read in the order of this column, so that each is opened once.
SCAN_COLUMN = "scan_id"


@dataclass(frozen=True)
class SourcePatches:
    """The patch round each lesion of a source, int16 HU `(1, z, y, x)`: `patches[i]` is of `lesions.iloc[i]`.

    Attributes:
        lesions: one row a lesion; `lesion_id` and `scan_id` are the same from a store and from its scans.
        read: gives a patch by its place.
        rejected: rows of the table that cannot be used, known before any patch is read: `REJECTED_COLUMNS`.
        fingerprint: SHA-256 of the table, or of a store's index of lesions and scans, and of how it is read.
    """

    lesions: pd.DataFrame
    read: Callable[[int], Int16[Tensor, "1 z y x"]]
    rejected: pd.DataFrame
    fingerprint: str

    def __len__(self) -> int:
        return len(self.lesions)

    def __getitem__(self, index: int) -> Int16[Tensor, "1 z y x"]:
        if not 0 <= index < len(self):
            raise IndexError(f"lesion {index} of {len(self)}")
        return self.read(index)


def open_patches(
    source: Mapping[str, Any], preprocessing: Preprocessing | None = None
) -> tuple[pd.DataFrame, SourcePatches, Preprocessing]:
    """Open the lesions of a source.

    Args:
        source: see the module.
        preprocessing: the patch to cut, as the weights say. By default what `source` holds under `preprocessing`, else
            50 voxels of 1 mm, or of the store's spacing.

    Returns:
        The lesions, their patches, and how these are cut.

    Raises:
        FeatureTableError: a source that is none, a selection that leaves nothing, or a store whose voxels are not
            those of `preprocessing`.
        fmcib_ssl.data.store.StoreError: no store that can be read.
        fmcib_ssl.data.tables.AnnotationsError: no table that can be read, or no row that can be used.
    """
    if preprocessing is None and source.get("preprocessing"):
        preprocessing = Preprocessing.from_dict(source["preprocessing"])
    kinds = {"store": _open_store, "scans": _open_scans, "medmnist": _open_medmnist}
    if source.get("kind") not in kinds:
        raise FeatureTableError(f"a source is of kind 'store', 'scans' or 'medmnist', not {source.get('kind')!r}")
    patches, preprocessing = kinds[source["kind"]](source, preprocessing)
    return patches.lesions, patches, preprocessing


def _open_store(source: Mapping[str, Any], preprocessing: Preprocessing | None) -> tuple[SourcePatches, Preprocessing]:
    from fmcib_ssl.data.patches import LesionPatches  # noqa: PLC0415  # a table of features is read without Blosc2
    from fmcib_ssl.data.store import LESIONS_INDEX, SCANS_INDEX, Store  # noqa: PLC0415

    store = Store(source["path"])
    there = store.settings
    wanted = preprocessing or Preprocessing(spacing_mm=there.spacing_mm, padding_hu=there.padding_hu)
    if (wanted.spacing_mm, wanted.padding_hu) != (there.spacing_mm, there.padding_hu):
        raise FeatureTableError(
            f"{store.path} has voxels of {there.spacing_mm:g} mm and {there.padding_hu} HU outside the scans; the "
            f"encoder was trained on {wanted.spacing_mm:g} mm and {wanted.padding_hu} HU: prepare a store with "
            f"spacing_mm={wanted.spacing_mm:g}, or give its table in place of it (annotations=TABLE.csv)"
        )
    keep = _selected(source, store.lesions, store.path)
    patches = LesionPatches(  # no negative is asked for
        store, wanted.patch_size_zyx, per_lesion=0, select=keep, padding_hu=wanted.padding_hu, padding=wanted.padding
    )
    lesions = _ready(patches.lesions)
    indices = [(store.path / name).read_bytes() for name in (LESIONS_INDEX, SCANS_INDEX)]
    none = pd.DataFrame(columns=[*REJECTED_COLUMNS])
    return SourcePatches(lesions, patches.positive, none, _fingerprint(indices, source)), wanted


def _open_scans(source: Mapping[str, Any], preprocessing: Preprocessing | None) -> tuple[SourcePatches, Preprocessing]:
    from fmcib_ssl.data.prepare import store_for_table  # noqa: PLC0415  # needs SimpleITK
    from fmcib_ssl.data.store import StoreSettings  # noqa: PLC0415

    wanted, file, root = preprocessing or Preprocessing(), Path(source["annotations"]), source.get("image_root")
    summary = store_for_table(
        file,
        Path(source.get("stores") or STORES),
        StoreSettings(wanted.spacing_mm, padding_hu=wanted.padding_hu),
        image_root=None if root is None else Path(root),
        path_prefix=source.get("path_prefix"),
        coordinates=source.get("coordinates", "lps"),
        on_bad_row=source.get("on_bad_row", "skip"),
    )
    patches, wanted = _open_store({"path": summary.store, "select": source.get("select")}, wanted)
    fingerprint = _fingerprint([file.read_bytes()], source)
    return replace(patches, rejected=summary.rejected, fingerprint=fingerprint), wanted


def _open_medmnist(
    source: Mapping[str, Any], preprocessing: Preprocessing | None
) -> tuple[SourcePatches, Preprocessing]:
    from fmcib_ssl.evaluation.medmnist_source import open_medmnist  # noqa: PLC0415  # which needs this module

    return open_medmnist(source, preprocessing)


def _selected(source: Mapping[str, Any], rows: pd.DataFrame, where: Path) -> npt.NDArray[np.bool_]:
    try:
        keep = selected(rows, source.get("select"), key="select", where=where)
    except SelectionError as error:
        raise FeatureTableError(str(error)) from error
    if not keep.any():
        raise FeatureTableError(f"no row of {where} has select={source.get('select')}")
    return keep


def _ready(lesions: pd.DataFrame) -> pd.DataFrame:
    """The lesions as a table of features takes them: ids are text, Parquet can hold every column."""
    lesions = lesions.assign(**{ID_COLUMN: text_of(lesions[ID_COLUMN])})
    lesions = _kept_beside(lesions, {FEATURES_COLUMN})
    mixed = [
        str(name)
        for name in lesions
        if lesions[name].dtype == object
        and pd.api.types.infer_dtype(lesions[name], skipna=True).startswith("mixed")
        and lesions[name].dropna().map(type).isin((str, int, float, bool)).all()
    ]  # of a long CSV file, whose beginning looks like numbers
    return lesions.assign(**{name: lesions[name].map(str, na_action="ignore") for name in mixed})


def _kept_beside(rows: pd.DataFrame, taken: set[str]) -> pd.DataFrame:
    """Columns whose names are taken by ours keep their values as `table_...`, as in a store."""
    return rows.rename(columns={name: f"table_{name}" for name in rows if name in taken})


def _fingerprint(contents: list[bytes], source: Mapping[str, Any]) -> str:
    """Of what was asked for, not of what can be read of it: a scan may come back before the work is gone on with."""
    how = [source.get(key) for key in ("select", "coordinates", "path_prefix")]
    digest = hashlib.sha256(json.dumps(how, default=str).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
