"""Where the lesions of a run come from: a prepared store, or scans read as they are.

Only the second needs SimpleITK, so that is imported when it is asked for: training from a store must not need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.data.tables import SelectionError, selected
from fmcib_ssl.settings import ConfigError, Data, Settings
from fmcib_ssl.types import Preprocessing


@dataclass(frozen=True)
class LesionSource:
    """The lesions that a run is trained on.

    Attributes:
        patches: a dataset of `PatchPair`s, one item a lesion, with `title(lesion)` for pictures.
        preprocessing: how its patches are cut.
        num_scans: that the lesions lie in.
        origin: for the log.
    """

    patches: Any
    preprocessing: Preprocessing
    num_scans: int
    origin: str


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
        select=_selected(data, store.lesions),
        padding_hu=store.settings.padding_hu,
        on_bad_row=data.on_bad_row,
    )
    preprocessing = Preprocessing(data.patch_size, spacing_mm, store.settings.padding_hu)
    return LesionSource(patches, preprocessing, patches.lesions["scan_id"].nunique(), f"store {data.store}")


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
    preprocessing = Preprocessing(data.patch_size, 1.0 if data.spacing_mm is None else data.spacing_mm)
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
    num_scans = len({table.scan_of(i) for i in range(len(table))})
    return LesionSource(patches, preprocessing, num_scans, f"scans of {data.annotations}, read directly")


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
