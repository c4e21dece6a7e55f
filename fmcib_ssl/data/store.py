"""The store: many scans on one grid, chunked and compressed, with an index of their lesions.

```
store.json               what it was made with, and whether it is complete
scans/<scan_id>.b2nd     int16 HU (z, y, x), a Blosc2 array of blocks that decompress on their own
scans/<scan_id>.cells    the coarse map, from which negatives are drawn, memory-mapped
scans/<scan_id>.sums     check sums of both, compared when they are read
scans/<scan_id>.json     what is known of the scan and its lesions; written last, so it marks the scan as finished
scans.parquet, lesions.parquet   the index, made from the JSON files at the end
```

A scan's grid has its axes along +x, +y, +z of LPS and isotropic voxels, as few as cover the scan's extent, with the
same middle. Voxel `(z, y, x)` has its centre at `origin + spacing * (x, y, z)`.

JSON files hold a digest of themselves, and `store.json` those of the index. A store from before there were check sums
and digests is read without them; `scripts/prepare.py verify=DIR` adds them.

Reading needs neither SimpleITK nor torch.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int16

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.mining import CoarseMap
from fmcib_ssl.data.scan_file import DamagedScanError, OpenScan, ScanSums, Triple
from fmcib_ssl.io import read_regular, read_sealed_json
from fmcib_ssl.types import PADDING_HU, UserError

#: Of the format; goes up when older versions of this package could not read it.
STORE_VERSION = 1
SETTINGS_FILE = "store.json"
SCANS_FOLDER = "scans"
SCANS_INDEX, LESIONS_INDEX = "scans.parquet", "lesions.parquet"
#: In `store.json`: digests of the index. Where they are, all scans have check sums.
CHECKED = "checked"
#: Another key is one of these with a damaged bit, and what it says would be missed.
_SETTINGS_KEYS = {
    "version", "complete", "settings", "annotations", "num_scans", "num_lesions", "num_rejected_rows", CHECKED,
}  # fmt: skip
#: Of an index: a file of kilobytes may claim any number of rows.
_MOST_ROWS = 50_000_000
#: Scans that a process keeps open: a lesion's patch and its negatives come from one.
_NUM_OPEN = 4
_CENTER = ("center_z", "center_y", "center_x")
#: What rounding may make of a point on the edge of a scan, voxels, and of a point in mm.
_ROUNDING = 0.01
_FARTHEST_VOXEL = 1e6
Interpolation = Literal["linear", "nearest", "bspline"]


class StoreError(UserError, ValueError):
    """A store that cannot be read, written or gone on with."""


class DamagedStoreError(StoreError):
    """A file of a store is not as it was written, or contradicts another one."""


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

    Keeps a few scans open and nothing of what it reads; may be forked, and sent to other processes as its path.

    Args:
        path: its folder.

    Raises:
        StoreError: no store, one of another version, or one that was not finished.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._about = read_settings_file(self.path) or {}
        if not self._about:
            raise StoreError(
                f"{self.path} is not a store (it has no {SETTINGS_FILE}): make one with scripts/prepare.py"
            )
        if not self._about["complete"]:
            raise StoreError(
                f"{self.path} is not complete: run the same scripts/prepare.py command again to go on where it "
                "stopped; after shards have run, once more with merge=true"
            )
        try:
            self.settings = StoreSettings(**self._about["settings"])
        except (TypeError, ValueError) as error:
            raise StoreError(f"{self.path / SETTINGS_FILE} has no settings of a store ({error})") from error
        self._open: OrderedDict[str, OpenScan] = OrderedDict()
        self._known_maps: set[str] = set()

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def lesions(self) -> pd.DataFrame:
        """One row a lesion, in the order of the table; the first use compares the index with itself.

        Columns: `lesion_id`, `scan_id`, `center_z, center_y, center_x` (fractional voxels of the store),
        `center_x_lps_mm` and so on, `row` (in the table), then all columns of the table.
        """
        lesions = self._read_index(LESIONS_INDEX)
        for problem in _problems_of_lesions(lesions, self.scans, self.settings.spacing_mm):
            raise DamagedStoreError(f"{self.path / LESIONS_INDEX} is damaged: {problem}; run scripts/prepare.py again")
        return lesions

    @cached_property
    def scans(self) -> pd.DataFrame:
        """One row a scan, by `scan_id`: where it comes from, its geometry there and here, HU range, body volume."""
        scans = self._read_index(SCANS_INDEX)
        for problem in _problems_of_scans(scans):
            raise DamagedStoreError(f"{self.path / SCANS_INDEX} is damaged: {problem}; run scripts/prepare.py again")
        return scans.set_index("scan_id")

    @cached_property
    def _shapes(self) -> dict[str, Triple]:
        return dict(zip(self.scans.index, map(tuple, self.scans["shape_zyx"]), strict=True))

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
            DamagedStoreError: no such scan, or a damaged file.
        """
        file = self._file(scan_id, "b2nd")
        try:
            while True:
                scan = self._opened(scan_id)
                window = [
                    (max(a, 0), min(a + n, m)) for a, n, m in zip(start_zyx, size_zyx, scan.shape_zyx, strict=True)
                ]
                if not all(low < high for low, high in window):
                    return np.full(tuple(size_zyx), padding_hu, dtype=np.int16)
                voxels = scan.read(window)
                if voxels is not None:
                    break
                del self._open[scan_id]  # prepared anew meanwhile
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{file} is missing: run scripts/prepare.py again to make it anew") from error
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError, OSError) as error:
            raise DamagedStoreError(
                f"{file} is damaged ({error}): run scripts/prepare.py again to make it anew"
            ) from error
        if voxels.shape == tuple(size_zyx):
            return voxels
        patch = np.full(tuple(size_zyx), padding_hu, dtype=np.int16)
        patch[tuple(slice(low - a, high - a) for (low, high), a in zip(window, start_zyx, strict=True))] = voxels
        return patch

    def coarse_map(self, scan_id: str) -> CoarseMap:
        """The coarse map of a scan; each process compares its check sum once.

        Raises:
            DamagedStoreError: no such scan, or a damaged file.
        """
        file = self._file(scan_id, "cells")
        try:
            coarse_map, content = CoarseMap.open(file)
            if scan_id not in self._known_maps:
                if (sums := self._sums(scan_id)) is not None:
                    sums.check_coarse_map(content)
                if (coarse_map.shape_zyx, coarse_map.spacing_mm) != (self._shapes[scan_id], self.settings.spacing_mm):
                    raise ValueError(f"it is of {coarse_map.shape_zyx} voxels of {coarse_map.spacing_mm:g} mm")
                self._known_maps.add(scan_id)
            return coarse_map
        except (OSError, ValueError) as error:
            raise DamagedStoreError(f"{file} cannot be read ({error}): run scripts/prepare.py again") from error

    def _opened(self, scan_id: str) -> OpenScan:
        if scan_id not in self._open:
            scan = OpenScan(self.path / SCANS_FOLDER / f"{scan_id}.b2nd", self._sums(scan_id))
            if scan.shape_zyx != self._shapes[scan_id]:
                raise DamagedScanError(f"it has {scan.shape_zyx} voxels, and the index says {self._shapes[scan_id]}")
            while len(self._open) >= _NUM_OPEN:
                self._open.popitem(last=False)
            self._open[scan_id] = scan
        self._open.move_to_end(scan_id)
        return self._open[scan_id]

    def _sums(self, scan_id: str) -> ScanSums | None:
        try:
            return ScanSums.open(self.path / SCANS_FOLDER / f"{scan_id}.sums", scan_id)
        except FileNotFoundError as error:
            if self._about.get(CHECKED):
                raise DamagedScanError("its check sums are missing") from error
            return None

    def _file(self, scan_id: str, suffix: str) -> Path:
        """A file of a scan; refuses a name that leads out of the store, or is not in its index."""
        if not _is_name(scan_id) or scan_id not in self._shapes:
            raise DamagedStoreError(f"{self.path} is damaged: {scan_id[:200]!r} is no scan of it; prepare it anew")
        return self.path / SCANS_FOLDER / f"{scan_id}.{suffix}"

    def _read_index(self, name: str) -> pd.DataFrame:
        try:
            content = read_regular(self.path / name)
            known = (self._about.get(CHECKED) or {}).get(name)
            if known is not None and known != hashlib.sha256(content).hexdigest():
                raise ValueError(f"it is not the one that {SETTINGS_FILE} was written with: its digest differs")
            if (num_rows := pq.read_metadata(pa.BufferReader(content)).num_rows) > _MOST_ROWS:
                raise ValueError(f"it claims {num_rows} rows")
            table = pq.read_table(pa.BufferReader(content))
            table.validate(full=True)
            frame: pd.DataFrame = table.to_pandas()
            return frame
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
            raise DamagedStoreError(
                f"{self.path / name} cannot be read ({error}): run scripts/prepare.py again"
            ) from error


def read_settings_file(folder: Path) -> dict[str, Any] | None:
    """What `store.json` says; None if there is none.

    Raises:
        DamagedStoreError: it is no such file, or not as it was written.
        StoreError: it is of another version.
    """
    file = folder / SETTINGS_FILE
    try:
        about = read_sealed_json(file)
        if not isinstance(about["complete"], bool) or not isinstance(about["settings"], dict):
            raise TypeError("complete or settings")
        if not isinstance(about.get(CHECKED, {}), dict) or (unknown := about.keys() - _SETTINGS_KEYS):
            raise ValueError(f"it has {CHECKED if not unknown else sorted(unknown)}")
        version = about["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedStoreError(f"{file} cannot be read ({error}): run scripts/prepare.py again") from error
    if version != STORE_VERSION:
        raise StoreError(f"{folder} has version {version}, this package reads {STORE_VERSION}: prepare it anew")
    return about


def sidecar_file(folder: Path, scan_id: str) -> Path:
    """The JSON file of a scan."""
    return folder / SCANS_FOLDER / f"{scan_id}.json"


def _is_name(scan_id: str) -> bool:
    """Whether a text may be the name of a scan; one that leads out of the store may not."""
    return bool(scan_id) and scan_id == Path(scan_id).name and scan_id not in (".", "..") and "\0" not in scan_id


def _problems_of_scans(scans: pd.DataFrame) -> Iterator[str]:
    """What keeps a table from being one of a store's scans."""
    if absent := {"scan_id", "shape_zyx", "origin_lps_mm"} - set(scans):
        yield f"it has no column {', '.join(sorted(absent))}"
        return
    names = scans["scan_id"]
    if not all(isinstance(name, str) and _is_name(name) for name in names):
        yield "a scan_id is no name of a scan"
        return
    if names.duplicated().any():
        yield f"duplicate scan_id {names[names.duplicated()].iloc[0]}"
    for column, kinds in (("shape_zyx", "iu"), ("origin_lps_mm", "iuf")):
        values = [np.asarray(value) for value in scans[column]]
        if any(v.shape != (3,) or v.dtype.kind not in kinds or not (np.abs(v) < _FARTHEST_VOXEL).all() for v in values):
            yield f"{column} is not three numbers in every row"
        elif column == "shape_zyx" and any(value.min() < 1 for value in values):
            yield "a scan has no voxels"


def _problems_of_lesions(lesions: pd.DataFrame, scans: pd.DataFrame, spacing_mm: float) -> Iterator[str]:
    """What keeps a table from being one of lesions in these scans; columns that it has not are not missed here."""
    for name in (name for name in _CENTER if name in lesions):
        bad = ~(pd.to_numeric(lesions[name], errors="coerce").abs() < _FARTHEST_VOXEL)  # NaN is not below it either
        if bad.any():
            yield f"{name} is {lesions[name][bad].iloc[0]} in {int(bad.sum())} rows, first in the {bad.argmax() + 1}."
            return
    for name in (name for name in ("lesion_id", "row") if name in lesions):
        if (twice := lesions[name].duplicated()).any():
            yield f"duplicate {name} {lesions[name][twice].iloc[0]}"
    if not {"scan_id", *_CENTER} <= set(lesions) or len(lesions) == 0:
        return
    numbers = scans.index.get_indexer(pd.Index(lesions["scan_id"]))
    if (numbers < 0).any():
        yield f"{str(lesions['scan_id'][numbers < 0].iloc[0])[:200]!r} is none of the store's scans"
        return
    centers = lesions[list(_CENTER)].to_numpy(dtype=np.float64)
    shapes = np.stack(scans["shape_zyx"].tolist())[numbers]
    outside = ((centers < -0.5 - _ROUNDING) | (centers > shapes - 0.5 + _ROUNDING)).any(axis=1)
    if outside.any():
        first = int(outside.argmax())
        yield (
            f"{int(outside.sum())} lesions lie outside their scans, the first in row {first + 1} of the index, at "
            f"{centers[first].tolist()} of {shapes[first].tolist()} voxels"
        )
    in_mm = [f"{name}_lps_mm" for name in _CENTER]
    if set(in_mm) <= set(lesions):
        origins = np.stack(scans["origin_lps_mm"].tolist())[numbers, ::-1]
        points = lesions[in_mm].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
        moved = ~(np.abs(centers * spacing_mm + origins - points) < _ROUNDING).all(axis=1)
        if moved.any():
            yield (
                f"of {int(moved.sum())} lesions voxel and point in mm differ, at {spacing_mm:g} mm a voxel, "
                f"the first in row {moved.argmax() + 1} of the index"
            )
