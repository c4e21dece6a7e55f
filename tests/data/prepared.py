"""Small archives, stores of them, and what the direct reader cuts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fmcib_ssl.data.annotations import LesionTable, read_annotations
from fmcib_ssl.data.prepare import Summary, prepare_store
from fmcib_ssl.data.scans import Scan, ScanSource, crop_patch, read_scan
from fmcib_ssl.data.store import Store, patch_start

PATCH = (50, 50, 50)


def scan_image(seed: int = 0, size: tuple[int, int, int] = (30, 26, 18), spacing: Any = (1.0, 1.2, 2.0)) -> sitk.Image:
    """Noise in HU, with its middle at LPS (0, 0, 0)."""
    hu = np.random.default_rng(seed).integers(-1000, 400, size[::-1]).astype(np.int16)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin([-(n - 1) / 2 * s for n, s in zip(size, spacing, strict=True)])
    return image


def write_table(folder: Path, rows: list[str], header: str = "image_path,coordX,coordY,coordZ") -> LesionTable:
    path = folder / "lesions.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return read_annotations(path)


def three_scans(folder: Path) -> LesionTable:
    for seed, name in enumerate("abc"):
        sitk.WriteImage(scan_image(seed), str(folder / f"{name}.nrrd"))
    return write_table(folder, ["a.nrrd,1,2,3", "b.nrrd,-4,0,5", "a.nrrd,-6,5,-7", "c.nrrd,0,0,0"])


def run(table: LesionTable, store: Path, **options: Any) -> Summary:
    return prepare_store(table, store, num_workers=0, **options)


def centers(store: Store) -> np.ndarray:
    return store.lesions[["center_z", "center_y", "center_x"]].to_numpy()


def store_patch(store: Store, lesion: int, size: tuple[int, int, int] = PATCH) -> np.ndarray:
    start = patch_start(centers(store)[lesion], size)
    return store.read_patch(store.lesions["scan_id"][lesion], start, size)


@lru_cache(maxsize=1)
def decoded(source: ScanSource) -> Scan:
    return read_scan(*source)


def direct_patch(store: Store, lesion: int, source: ScanSource, size: tuple[int, int, int] = PATCH) -> np.ndarray:
    """What the direct reader cuts round the centre of the store's voxel that holds a lesion."""
    voxel = np.floor(centers(store)[lesion] + 0.5)
    x, y, z = store.grid(store.lesions["scan_id"][lesion]).to_lps_mm(voxel).tolist()
    return crop_patch(decoded(source), (x, y, z), size, store.settings.spacing_mm)


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store but the lock and the file times."""
    files = {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".lock")}


@contextmanager
def claimed_by_another_process(store: Path, shard: tuple[int, int] | None = None) -> Iterator[int]:
    """A run that is at work on a store; gives its process."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from fmcib_ssl.data.store import StoreSettings\nfrom fmcib_ssl.data.store_files import claim_store\n"
        f"with claim_store(Path(sys.argv[1]), StoreSettings(), {shard}): print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(store)], text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        yield process.pid
        process.stdin.close()
