"""Where the lesions of a run come from: a prepared store, or scans read as they are.

Only the second needs SimpleITK, so that is imported when it is asked for: training from a store must not need it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.data.tables import SelectionError, selected
from fmcib_ssl.io import digest_of
from fmcib_ssl.training.settings import ConfigError, Data, Settings
from fmcib_ssl.types import Preprocessing

if TYPE_CHECKING:
    from fmcib_ssl.data.annotations import LesionTable
    from fmcib_ssl.data.scans import ScanSource
    from fmcib_ssl.data.store import Store


@dataclass(frozen=True)
class LesionSource:
    """The lesions that a run is trained on.

    Attributes:
        patches: a dataset of `PatchPair`s, one item a lesion, with `title(lesion)` for pictures.
        preprocessing: how its patches are cut.
        num_scans: that the lesions lie in.
        origin: for the log.
        checksum: of which lesions they are, in which order, and of their scans; not of how files are called or written.
    """

    patches: Any
    preprocessing: Preprocessing
    num_scans: int
    origin: str
    checksum: str


def open_lesions(settings: Settings, *, main_process: bool) -> LesionSource:
    """Open the store or the table that the configuration names.

    Args:
        settings: of the run.
        main_process: only this one writes `rejected.csv` and shows progress.

    Raises:
        ConfigError: settings that do not fit the data.
        fmcib_ssl.data.tables.AnnotationsError: a table that cannot be used.
        fmcib_ssl.data.store.StoreError: a store that cannot be used.
    """
    if settings.data.store is not None:
        return _from_store(settings)
    return _from_scans(settings, main_process)


def _from_store(settings: Settings) -> LesionSource:
    from fmcib_ssl.data.patches import LesionPatches
    from fmcib_ssl.data.store import Store

    data = settings.data
    assert data.store is not None
    store = Store(data.store)
    spacing_mm = store.settings.spacing_mm
    if data.spacing_mm not in (None, spacing_mm):
        raise ConfigError(
            f"data.spacing_mm={data.spacing_mm:g}, but {data.store} was prepared with {spacing_mm:g}: leave it out, or "
            f"prepare another store with spacing_mm={data.spacing_mm:g}"
        )
    patches = LesionPatches(
        store,
        data.patch_size,
        seed=settings.seed,
        mining=data.mining,
        per_lesion=data.per_lesion,
        select=(keep := _selected(data, store.lesions)),
        padding_hu=store.settings.padding_hu,
        padding=data.padding,
        on_bad_row=data.on_bad_row,
    )
    preprocessing = Preprocessing(data.patch_size, spacing_mm, store.settings.padding_hu, padding=data.padding)
    num_scans = patches.lesions["scan_id"].nunique()
    return LesionSource(patches, preprocessing, num_scans, f"store {data.store}", _store_checksum(store, keep))


def _from_scans(settings: Settings, main_process: bool) -> LesionSource:
    from fmcib_ssl.data.annotations import check_annotations, read_annotations
    from fmcib_ssl.data.phantom import make_archive
    from fmcib_ssl.data.volumes import VolumePatches

    data = settings.data
    assert data.annotations is not None
    if (phantom := data.phantom) is not None:
        # Processes that start together all write it; every scan is the same from each, and put in place when whole.
        workers = max(1, settings.hardware.num_workers)
        try:
            make_archive(
                phantom.folder, phantom.num_scans, seed=phantom.seed, num_workers=workers, progress=main_process
            )
        except ValueError as error:
            raise ConfigError(f"data.phantom: {error}") from error
    table = read_annotations(data.annotations, data.image_root, data.coordinates, data.path_prefix)
    spacing_mm = 1.0 if data.spacing_mm is None else data.spacing_mm
    preprocessing = Preprocessing(data.patch_size, spacing_mm, padding=data.padding)
    table = check_annotations(
        table.select(_selected(data, table.rows)),
        preprocessing,
        on_bad_row=data.on_bad_row,
        check=data.check,
        allow_short_scans=data.allow_short_scans,
        rejected_csv=settings.paths.run / "rejected.csv" if main_process else None,
    ).usable
    patches = VolumePatches(
        table,
        preprocessing,
        seed=settings.seed,
        cache_scans=data.cache_scans,
        on_bad_row=data.on_bad_row,
        mining=data.mining,
        per_lesion=data.per_lesion,
    )
    scans = list(dict.fromkeys(table.scan_of(i) for i in range(len(table))))
    origin = f"scans of {data.annotations}, read directly"
    return LesionSource(patches, preprocessing, len(scans), origin, _table_checksum(table, scans))


def _store_checksum(store: Store, keep: npt.NDArray[np.bool_]) -> str:
    """Of a store's lesions, those that are chosen, and what their scans were made from."""
    scan_ids, scans = np.unique(store.lesions["scan_id"].to_numpy(dtype=str), return_inverse=True)
    centers = store.lesions[["center_z", "center_y", "center_x"]].to_numpy(dtype=float)
    known = [name for name in ("sha256", "shape_zyx", "origin_lps_mm") if name in store.scans]
    made_from = store.scans.reindex(scan_ids)[known].to_numpy()
    return digest_of(asdict(store.settings), scans, _to_micrometers(centers), np.flatnonzero(keep), made_from)


def _table_checksum(table: LesionTable, scans: list[ScanSource]) -> str:
    """Of the lesions of a table and of what else is annotated in their scans; scans may have been moved."""
    places = [scans.index(table.scan_of(i)) for i in range(len(table))]
    named = [(scan.path.name, scan.series_uid, _to_micrometers(table.annotated_lps_mm[scan])) for scan in scans]
    return digest_of(_to_micrometers(table.centers_lps_mm), places, named)


def _to_micrometers(points: npt.NDArray[np.float64]) -> list[list[int]]:
    """Points in thousandths, whatever the last bit says."""
    whole: list[list[int]] = np.rint(points * 1000).astype(np.int64).tolist()
    return whole


def _selected(data: Data, rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """A mask of the rows that `data.select` asks for."""
    where = data.store or data.annotations
    try:
        keep = selected(rows, data.select, key="data.select", where=where)
    except SelectionError as error:
        raise ConfigError(str(error)) from error
    if not keep.any():
        raise ConfigError(f"no row of {where} has data.select={data.select}")
    return keep
