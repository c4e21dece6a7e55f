"""The store: many scans on one grid, chunked and compressed, with an index of their lesions.

```
store.json               what it was made with, and whether it is complete
scans/<scan_id>.b2nd     int16 HU (z, y, x), a Blosc2 array of blocks that decompress on their own
scans/<scan_id>.cells    the coarse map, from which negatives are drawn, memory-mapped
scans/<scan_id>.json     what is known of the scan and its lesions; written last, so it marks the scan as finished
scans.parquet, lesions.parquet   the index, made from the JSON files at the end
```

A scan's grid has its axes along +x, +y, +z of LPS and isotropic voxels, as few as cover the scan's extent, with the
same middle. Voxel `(z, y, x)` has its centre at `origin + spacing * (x, y, z)`.

Reading needs neither SimpleITK nor torch.
"""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import blosc2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int16

from fmcib_ssl.data.coarse_map import CoarseMap
from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.types import PADDING_HU
from fmcib_ssl.whole_file import write_whole

#: Of the format; goes up when older versions of this package could not read it.
STORE_VERSION = 1
SETTINGS_FILE = "store.json"
SCANS_FOLDER = "scans"
SCANS_INDEX, LESIONS_INDEX = "scans.parquet", "lesions.parquet"
#: Of the candidates measured on CT (docs/prepare.md) the fastest to read; 50 voxels of an edge touch 27 blocks.
CHUNK_EDGE, BLOCK_EDGE = 128, 32

#: Of an index: a file of kilobytes may claim any number of rows.
_MOST_ROWS = 50_000_000
#: In the header of a Blosc2 frame: arrays that are computed, from an expression or a function in the file, or fetched.
_NOT_PLAIN = (b"LazyArray", b"b2o", b"proxy-source")
_LONGEST_HEADER = 1 << 20
_CENTER = ("center_z", "center_y", "center_x")
_FARTHEST_VOXEL = 1e6

Interpolation = Literal["linear", "nearest", "bspline"]
Triple = tuple[int, int, int]


class StoreError(ValueError):
    """A store that cannot be read, written or gone on with."""


@dataclass(frozen=True)
class StoreSettings:
    """What decides the voxels of a store; one store has one.

    Attributes:
        spacing_mm: edge of the voxels.
        interpolation: between the voxels of the scan.
        padding_hu: what stands on the grid outside the scan, and the lowest value in it.
    """

    spacing_mm: float = 1.0
    interpolation: Interpolation = "linear"
    padding_hu: int = PADDING_HU

    def __post_init__(self) -> None:
        if not 0.1 <= self.spacing_mm <= 20:
            raise StoreError(f"spacing_mm={self.spacing_mm:g} must be between 0.1 and 20")
        if self.interpolation not in get_args(Interpolation):
            raise StoreError(f"interpolation={self.interpolation!r} is not one of {', '.join(get_args(Interpolation))}")


@dataclass(frozen=True)
class StoreGrid:
    """The voxels of one scan in a store.

    Attributes:
        origin_lps_mm: centre of voxel (0, 0, 0), x, y, z.
        shape_zyx: number of voxels.
        spacing_mm: edge of a voxel.
    """

    origin_lps_mm: tuple[float, float, float]
    shape_zyx: Triple
    spacing_mm: float

    @classmethod
    def of(cls, scan: ScanGeometry, spacing_mm: float) -> StoreGrid:
        """The grid that covers a scan, however the scan is turned."""
        lowest, highest = scan.bounds_lps_mm()
        # A direction is a rotation to rounding only: a thousandth of a voxel is not worth another layer.
        size = np.maximum(np.ceil((highest - lowest) / spacing_mm - 1e-3), 1)
        # What is to spare is shared by both ends: no voxel's centre lies on the scan's very edge, neither in nor out.
        ox, oy, oz = ((lowest + highest - (size - 1) * spacing_mm) / 2).tolist()
        x, y, z = size.astype(int).tolist()
        return cls((ox, oy, oz), (z, y, x), spacing_mm)

    def to_zyx(self, points_lps_mm: Float[np.ndarray, "*points 3"]) -> Float[np.ndarray, "*points 3"]:
        """Fractional voxel z, y, x of a point in LPS mm."""
        index: Float[np.ndarray, "*points 3"] = (points_lps_mm - np.array(self.origin_lps_mm)) / self.spacing_mm
        return index[..., ::-1]

    def to_lps_mm(self, voxels_zyx: Float[np.ndarray, "*points 3"]) -> Float[np.ndarray, "*points 3"]:
        """Centre of a voxel, or the place of a fractional one; the inverse of `to_zyx`."""
        points: Float[np.ndarray, "*points 3"] = voxels_zyx[..., ::-1] * self.spacing_mm + np.array(self.origin_lps_mm)
        return points


def patch_start(center_zyx: Sequence[float], size_zyx: Sequence[int]) -> Triple:
    """First voxel of the patch whose voxel `size // 2` is the one that holds a point.

    The point is at most half a voxel from that voxel's centre along each axis.
    """
    z, y, x = (int(np.floor(c + 0.5)) - n // 2 for c, n in zip(center_zyx, size_zyx, strict=True))
    return z, y, x


class Store:
    """A finished store, for reading.

    Holds no file open and keeps nothing of what it reads, so it may be forked, sent to other processes (as its
    path), and used for any number of scans.

    Args:
        path: its folder.

    Raises:
        StoreError: no store, one of another version, or one that was not finished.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        found = read_settings_file(self.path)
        if found is None:
            raise StoreError(
                f"{self.path} is not a store (it has no {SETTINGS_FILE}): make one with scripts/prepare.py"
            )
        if not found["complete"]:
            raise StoreError(
                f"{self.path} is not complete: run the same scripts/prepare.py command again to go on where it "
                "stopped; after shards have run, once more with merge=true"
            )
        try:
            self.settings = StoreSettings(**found["settings"])
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.path / SETTINGS_FILE} has no settings of a store ({error})") from error
        self._plain: set[str] = set()

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def lesions(self) -> pd.DataFrame:
        """One row a lesion, in the order of the table.

        Columns: `lesion_id`, `scan_id`, `center_z, center_y, center_x` (fractional voxels of the store),
        `center_x_lps_mm` and so on, `row` (in the table), then all columns of the table.
        """
        lesions = self._read_index(LESIONS_INDEX)
        problem = _problem_of_lesions(lesions)
        if problem is not None:
            raise StoreError(f"{self.path / LESIONS_INDEX} is damaged: {problem}; run scripts/prepare.py again")
        return lesions

    @cached_property
    def scans(self) -> pd.DataFrame:
        """One row a scan, by `scan_id`: where it comes from, its geometry there and here, HU range, body volume."""
        return self._read_index(SCANS_INDEX).set_index("scan_id")

    def grid(self, scan_id: str) -> StoreGrid:
        """The voxels of a scan."""
        scan = self.scans.loc[scan_id]
        x, y, z = map(float, scan["origin_lps_mm"])
        nz, ny, nx = map(int, scan["shape_zyx"])
        return StoreGrid((x, y, z), (nz, ny, nx), self.settings.spacing_mm)

    def read_patch(
        self, scan_id: str, start_zyx: Sequence[int], size_zyx: Sequence[int], padding_hu: int = PADDING_HU
    ) -> Int16[np.ndarray, "z y x"]:
        """Voxels `start` to `start + size` of a scan; what lies outside it is `padding_hu`.

        Raises:
            StoreError: no such scan, or a damaged file.
        """
        file = self.path / SCANS_FOLDER / f"{scan_id}.b2nd"
        try:
            if scan_id not in self._plain:
                _check_scan_file(self.path, scan_id)
                self._plain.add(scan_id)
            # One thread: the caller's workers are the parallelism, and a pool of threads does not survive a fork.
            # Not memory-mapped: as fast from the page cache, three times as fast from the disk (docs/prepare.md).
            array = blosc2.open(str(file), mode="r", dparams=blosc2.DParams(nthreads=1))
            if array.ndim != 3 or array.dtype != np.int16:
                raise RuntimeError(f"{array.dtype} in {array.ndim} dimensions, not int16 in 3")
            window = [(max(a, 0), min(a + n, m)) for a, n, m in zip(start_zyx, size_zyx, array.shape, strict=True)]
            patch = np.full(tuple(size_zyx), padding_hu, dtype=np.int16)
            if all(low < high for low, high in window):
                here = tuple(slice(low, high) for low, high in window)
                there = tuple(slice(low - a, high - a) for (low, high), a in zip(window, start_zyx, strict=True))
                patch[there] = array[here]
        except FileNotFoundError as error:
            raise StoreError(f"{file} is missing: run scripts/prepare.py again to make it anew") from error
        except StoreError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError, OSError) as error:
            raise StoreError(f"{file} is damaged ({error}): delete it and run scripts/prepare.py again") from error
        return patch

    def coarse_map(self, scan_id: str) -> CoarseMap:
        """The coarse map of a scan.

        Raises:
            StoreError: no such scan, or a damaged file.
        """
        file = self.path / SCANS_FOLDER / f"{scan_id}.cells"
        try:
            _check_scan_id(self.path, scan_id)
            return CoarseMap.open(file)
        except (OSError, ValueError) as error:
            raise StoreError(f"{file} cannot be read ({error}): run scripts/prepare.py again") from error

    def _read_index(self, name: str) -> pd.DataFrame:
        try:
            if (num_rows := pq.read_metadata(self.path / name).num_rows) > _MOST_ROWS:
                raise ValueError(f"it claims {num_rows} rows")
            table = pq.read_table(self.path / name)
            table.validate(full=True)
            frame: pd.DataFrame = table.to_pandas()
            return frame
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
            raise StoreError(f"{self.path / name} cannot be read ({error}): run scripts/prepare.py again") from error


def _problem_of_lesions(lesions: pd.DataFrame) -> str | None:
    """What keeps a table from being one of lesions in a store."""
    if "scan_id" in lesions and not all(isinstance(scan_id, str) for scan_id in lesions["scan_id"]):
        return "a scan_id is no text"
    for name in (name for name in _CENTER if name in lesions):
        bad = ~(pd.to_numeric(lesions[name], errors="coerce").abs() < _FARTHEST_VOXEL)  # NaN is not below it either
        if bad.any():
            return f"{name} is {lesions[name][bad].iloc[0]} in {int(bad.sum())} rows, first in the {bad.argmax() + 1}."
    return None


def _check_scan_id(folder: Path, scan_id: str) -> None:
    """Refuse a name that leads out of the store."""
    if not scan_id or scan_id != Path(scan_id).name or scan_id in (".", "..") or "\0" in scan_id:
        raise StoreError(f"{folder} is damaged: {scan_id[:200]!r} is no name of a scan; prepare it anew")


def _check_scan_file(folder: Path, scan_id: str) -> None:
    """Refuse a file whose opening could run something: Blosc2 keeps functions and expressions in its headers."""
    _check_scan_id(folder, scan_id)
    path = folder / SCANS_FOLDER / f"{scan_id}.b2nd"
    with path.open("rb") as file:
        header = file.read(_LONGEST_HEADER)
    length = int.from_bytes(header[11:15], "big")
    if header[2:9] != b"b2frame" or not 15 < length <= _LONGEST_HEADER:
        raise StoreError(f"{path} is damaged (no Blosc2 array): delete it and run scripts/prepare.py again")
    if found := [mark.decode() for mark in _NOT_PLAIN if mark in header[:length]]:
        raise StoreError(f"{path} holds no voxels but {', '.join(found)}, which is not read: prepare the store anew")


def read_settings_file(folder: Path) -> dict[str, Any] | None:
    """What `store.json` says; None if there is none.

    Raises:
        StoreError: it is no such file, or of another version.
    """
    file = folder / SETTINGS_FILE
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = found["version"]
        if not isinstance(found["complete"], bool) or not isinstance(found["settings"], dict):
            raise TypeError("complete or settings")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read ({error})") from error
    if version != STORE_VERSION:
        raise StoreError(f"{folder} has version {version}, this package reads {STORE_VERSION}: prepare it anew")
    return found


def write_settings_file(folder: Path, settings: StoreSettings, *, complete: bool, **about: object) -> None:
    """Write `store.json`; `about` is for people who look at it."""
    write_json(
        folder / SETTINGS_FILE,
        {"version": STORE_VERSION, "complete": complete, "settings": asdict(settings), **about},
    )


def sidecar_file(folder: Path, scan_id: str) -> Path:
    """The JSON file of a scan."""
    return folder / SCANS_FOLDER / f"{scan_id}.json"


def write_scan(
    folder: Path,
    scan_id: str,
    hu_zyx: Int16[np.ndarray, "z y x"],
    coarse_map: CoarseMap,
    sidecar: Mapping[str, object],
) -> int:
    """Write a scan's three files, the JSON last, each whole or not at all; gives the compressed size in bytes.

    Raises:
        StoreError: the folder cannot be written.
    """
    remove_file(sidecar_file(folder, scan_id))  # of an earlier version: what follows is not its voxels
    array = blosc2.asarray(
        hu_zyx,
        chunks=(CHUNK_EDGE,) * 3,
        blocks=(BLOCK_EDGE,) * 3,
        cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=9, filters=[blosc2.Filter.SHUFFLE], nthreads=1),
    )
    # Through memory, because Blosc2's own writing has no error for a full disk, and a memory map dies of it.
    contents = {"b2nd": array.to_cframe(), "cells": coarse_map.to_bytes()}
    for suffix, content in contents.items():
        write_bytes(folder / SCANS_FOLDER / f"{scan_id}.{suffix}", content)
    sizes = {suffix: len(content) for suffix, content in contents.items()}
    write_json(sidecar_file(folder, scan_id), {**sidecar, "sizes": sizes})
    return sum(sizes.values())


def is_whole(folder: Path, scan_id: str, sidecar: Mapping[str, Any]) -> bool:
    """Whether a scan's files are there, as large as its JSON file says."""
    files = {folder / SCANS_FOLDER / f"{scan_id}.{suffix}": size for suffix, size in sidecar["sizes"].items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in files.items())


def write_index(folder: Path, scans: pd.DataFrame, lesions: pd.DataFrame) -> None:
    """Write the two index files, each whole or not at all."""
    for name, frame in ((SCANS_INDEX, scans), (LESIONS_INDEX, lesions)):
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_bytes(folder / name, buffer.getvalue())


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write JSON, whole or not at all; NumPy's scalars become plain numbers."""
    text = json.dumps(values, indent=1, ensure_ascii=False, default=lambda value: value.item())
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also if the machine stops.

    Raises:
        StoreError: it cannot be written; says what to do.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise StoreError(cannot_write(path, error)) from error


def remove_file(path: Path) -> None:
    """Remove a file of a store, if it is there.

    Raises:
        StoreError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: OSError) -> str:
    """What is wrong with a folder that cannot be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room" if full else "make it writable, or choose another store=DIR"
    return f"{path} cannot be written: {error.strerror}; {remedy}, then run the same command again to go on"
