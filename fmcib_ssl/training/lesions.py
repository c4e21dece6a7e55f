"""Where the lesions of a run come from: a store, or a table, for which a store is prepared first.

Only preparing needs SimpleITK, so that is imported when it is asked for: training from a store must not need it.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.data import AnnotationsError, BadRowsError, LesionPatches, Store, StoreSettings, selected
from fmcib_ssl.io import digest_of
from fmcib_ssl.training.settings import ConfigError, Settings

logger = logging.getLogger(__name__)


def open_lesions(settings: Settings, *, main_process: bool) -> tuple[LesionPatches, str]:
    """The lesions of the store that the configuration names, or of its table's, with a checksum.

    It is of which lesions they are, in which order, and of their scans; not of how files are called or written.

    Args:
        settings: of the run.
        main_process: only this one writes `rejected.csv`.

    Raises:
        ConfigError: settings that do not fit the data.
        fmcib_ssl.data.tables.AnnotationsError: a table that cannot be used.
        fmcib_ssl.data.store.StoreError: a store that cannot be used, or made.
    """
    data = settings.data
    store = Store(data.store or _prepared(settings, main_process))
    spacing_mm = store.settings.spacing_mm
    if data.spacing_mm not in (None, spacing_mm):
        raise ConfigError(
            f"data.spacing_mm={data.spacing_mm:g}, but {data.store} was prepared with {spacing_mm:g}: leave it out, or "
            f"prepare another store with spacing_mm={data.spacing_mm:g}"
        )
    try:
        keep = selected(store.lesions, data.select, key="data.select", where=data.store or data.annotations)
    except AnnotationsError as error:
        raise ConfigError(str(error)) from error
    if not keep.any():
        raise ConfigError(f"no row of {data.store or data.annotations} has data.select={data.select}")
    patches = LesionPatches(
        store,
        data.patch_size,
        seed=settings.seed,
        mining=data.mining,
        negatives_per_lesion=data.negatives_per_lesion,
        select=keep,
        padding=data.padding,
        on_bad_row=data.on_bad_row,
    )
    return patches, _checksum(store, keep)


def _prepared(settings: Settings, main_process: bool) -> Path:
    """The store of a table, or of the phantom; it is prepared unless it is finished."""
    data, rejected_csv = settings.data, settings.paths.run / "rejected.csv"
    from fmcib_ssl.data import make_archive, store_for_table  # noqa: PLC0415  (they need SimpleITK, and a store does not)

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
    try:
        summary = store_for_table(
            data.annotations,
            settings.paths.data / "stores",
            StoreSettings(data.spacing_mm or 1.0),
            image_root=data.image_root,
            path_prefix=data.path_prefix,
            coordinates=data.coordinates,
            on_bad_row=data.on_bad_row,
        )
    except BadRowsError as error:
        _write_rejected(error.rejected, rejected_csv, main_process)
        raise
    _write_rejected(summary.rejected, rejected_csv, main_process)
    return summary.store


def _write_rejected(rejected: pd.DataFrame | None, file: Path, main_process: bool) -> None:
    if main_process and rejected is not None and len(rejected):
        rejected.to_csv(file, index=False)
        logger.info("%d rows of the table are rejected: %s", len(rejected), file)


def _checksum(store: Store, keep: npt.NDArray[np.bool_]) -> str:
    """Of a store's lesions, those that are chosen, and what their scans were made from."""
    scan_ids, scans = np.unique(store.lesions["scan_id"].to_numpy(dtype=str), return_inverse=True)
    centers = store.lesions[["center_z", "center_y", "center_x"]].to_numpy(dtype=float)
    thousandths = np.rint(centers * 1000).astype(np.int64).tolist()  # whatever the last bit says
    known = [name for name in ("sha256", "shape_zyx", "origin_lps_mm") if name in store.scans]
    made_from = store.scans.reindex(scan_ids)[known].to_numpy()
    return digest_of(asdict(store.settings), scans, thousandths, np.flatnonzero(keep), made_from)
