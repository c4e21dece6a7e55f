"""Small stores for tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmcib_ssl.data.mining import build_coarse_map
from fmcib_ssl.data.store import CHECKED, SCANS_FOLDER, Store, StoreSettings
from fmcib_ssl.data.store_files import write_index, write_scan, write_settings_file
from fmcib_ssl.io import read_sealed_json, write_sealed_json


def body(shape_zyx: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Noisy soft tissue in air; every voxel of the tissue differs from its neighbours."""
    hu = np.full(shape_zyx, -1000)
    hu[:, 4:-4, 4:-4] = 40
    return (hu + np.random.default_rng(seed).integers(-20, 20, shape_zyx)).astype(np.int16)


def make_store(
    folder: Path,
    scans: dict[str, np.ndarray],
    lesions: Sequence[tuple[Any, ...]],
    settings: StoreSettings = StoreSettings(),  # noqa: B008  (frozen)
    **columns: Any,
) -> Store:
    """A store of 1 mm voxels, without going through files of scans.

    Args:
        folder: is made.
        scans: HU by scan id.
        lesions: scan id and centre z, y, x.
        settings: what the store says of its voxels.
        columns: further ones of the table of lesions, or in place of `lesion_id` and `row`.
    """
    (folder / SCANS_FOLDER).mkdir(parents=True)
    for scan_id, hu in scans.items():
        write_scan(folder, scan_id, hu, build_coarse_map(hu, settings.spacing_mm), {})
    index = pd.DataFrame(
        [{"scan_id": scan_id, "origin_lps_mm": [0.0] * 3, "shape_zyx": list(hu.shape)} for scan_id, hu in scans.items()]
    )
    table = pd.DataFrame(lesions, columns=["scan_id", "center_z", "center_y", "center_x"])
    table = table.assign(**{"lesion_id": range(len(table)), "row": range(1, len(table) + 1), **columns})
    write_settings_file(folder, settings, complete=True, checked=write_index(folder, index, table))
    return Store(folder)


def reseal(folder: Path) -> None:
    """Let `store.json` agree with an index that was changed: what it says is to be found wrong, not its bytes."""
    about = read_sealed_json(folder / "store.json")
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in about[CHECKED]}
    write_sealed_json(folder / "store.json", {**about, CHECKED: digests})


def as_before_check_sums(folder: Path) -> None:
    """Take out of a store what earlier versions did not write."""
    for file in [folder / "store.json", *(folder / SCANS_FOLDER).glob("*.json")]:
        values = read_sealed_json(file)
        values.pop(CHECKED, None)
        values.get("sizes", {}).pop("sums", None)
        file.write_text(json.dumps(values, indent=1))
    for file in (folder / SCANS_FOLDER).glob("*.sums"):
        file.unlink()
