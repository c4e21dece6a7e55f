"""Small stores for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fmcib_ssl.data.coarse_map import build_coarse_map
from fmcib_ssl.data.store import SCANS_FOLDER, Store, StoreSettings, write_index, write_scan, write_settings_file


def body(shape_zyx: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Noisy soft tissue in air; every voxel of the tissue differs from its neighbours."""
    hu = np.full(shape_zyx, -1000)
    hu[:, 4:-4, 4:-4] = 40
    return (hu + np.random.default_rng(seed).integers(-20, 20, shape_zyx)).astype(np.int16)


def make_store(folder: Path, scans: dict[str, np.ndarray], lesions: list[tuple[str, float, float, float]]) -> Store:
    """A store of 1 mm voxels, without going through files of scans.

    Args:
        folder: is made.
        scans: HU by scan id.
        lesions: scan id and centre z, y, x.
    """
    (folder / SCANS_FOLDER).mkdir(parents=True)
    settings = StoreSettings()
    for scan_id, hu in scans.items():
        write_scan(folder, scan_id, hu, build_coarse_map(hu, settings.spacing_mm), {})
    index = pd.DataFrame(
        [{"scan_id": scan_id, "origin_lps_mm": [0.0] * 3, "shape_zyx": list(hu.shape)} for scan_id, hu in scans.items()]
    )
    table = pd.DataFrame(lesions, columns=["scan_id", "center_z", "center_y", "center_x"])
    write_index(folder, index, table.assign(lesion_id=range(len(table)), row=range(1, len(table) + 1)))
    write_settings_file(folder, settings, complete=True)
    return Store(folder)
