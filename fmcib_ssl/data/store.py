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
and digests is read without them; `prepare`, run again, adds them.

Reading needs neither SimpleITK nor torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int16

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.mining import CoarseMap
from fmcib_ssl.data.scan_file import OpenScan, ScanSums, Triple
from fmcib_ssl.data.tables import require_columns
from fmcib_ssl.io import read_regular, read_sealed_json
from fmcib_ssl.types import PADDING_HU, UserError

#: Of the format; goes up when older versions of this package could not read it.
STORE_VERSION = 1
SETTINGS_FILE = "store.json"
SCANS_FOLDER = "scans"
SCANS_INDEX, LESIONS_INDEX = "scans.parquet", "lesions.parquet"
#: In `store.json`: digests of the index. Where they are, all scans have check sums.
CHECKED = "checked"
#: Of an index: a file of kilobytes may claim any number of rows.
_MAX_ROWS = 50_000_000
#: Scans that a process keeps open: a lesion's patch and its negatives come from one.
_NUM_OPEN = 4
_CENTER = ["center_z", "center_y", "center_x"]
#: What rounding may make of a point on the edge of a scan, voxels, and of a point in mm.
_ROUNDING = 0.01
_FARTHEST_MM = 1e6
_Interpolation = Literal["linear", "nearest", "bspline"]


class StoreError(UserError, ValueError):
    """A store that cannot be read, written or resumed."""


class DamagedStoreError(StoreError):
    """A file of a store is not as it was written, or contradicts another one."""

    @classmethod
    def of(cls, file: Path, error: object) -> DamagedStoreError:
        """With the remedy that all of them have."""
        return cls(f"{file} is damaged ({error}): run fmcib-ssl prepare again")


@dataclass(frozen=True)
class StoreSettings:
    """What decides the voxels of a store; one store has one.

    Attributes:
        spacing_mm: edge of the voxels.
        interpolation: between the voxels of the scan.
        padding_hu: what stands on the grid outside the scan, and the lowest value in it.
    """

    spacing_mm: float = 1.0
    interpolation: _Interpolation = "linear"
    padding_hu: int = PADDING_HU

    def __post_init__(self) -> None:
        if not 0.1 <= self.spacing_mm <= 20:
            raise StoreError(f"spacing_mm={self.spacing_mm:g} must be between 0.1 and 20")
        if self.interpolation not in get_args(_Interpolation):
            allowed = ", ".join(get_args(_Interpolation))
            raise StoreError(f"interpolation={self.interpolation!r} is not one of {allowed}")


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
        self._about = read_settings_file(self.path)
        if not self._about["complete"]:
            raise StoreError(
                f"{self.path} is not complete: run the same fmcib-ssl prepare command again to resume it; after "
                "shards have run, once more with merge=true"
            )
        self.settings: StoreSettings = self._about["settings"]
        self._open: dict[str, OpenScan] = {}  # the one that was read last at the end
        self._compared_maps: set[str] = set()

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return type(self), (self.path,)

    @cached_property
    def lesions(self) -> pd.DataFrame:
        """One row a lesion, in the order of the table; the first use compares the index with itself.

        Columns: `lesion_id`, `scan_id`, `center_z, center_y, center_x` (fractional voxels of the store),
        `center_x_lps_mm` and so on, `row` (in the table), then all columns of the table.
        """
        scans, spacing_mm = self.scans, self.settings.spacing_mm
        return self._read_index(LESIONS_INDEX, lambda lesions: _check_lesions(lesions, scans, spacing_mm))

    @cached_property
    def scans(self) -> pd.DataFrame:
        """One row a scan, by `scan_id`: where it comes from, its geometry there and here, HU range, body volume."""
        return self._read_index(SCANS_INDEX, _check_scans).set_index("scan_id")

    @cached_property
    def shapes(self) -> dict[str, Triple]:
        """Voxels along z, y, x, by `scan_id`."""
        return dict(zip(self.scans.index, map(tuple, self.scans["shape_zyx"]), strict=True))

    def grid(self, scan_id: str) -> StoreGrid:
        """The voxels of a scan."""
        scan = self.scans.loc[scan_id]
        x, y, z = map(float, scan["origin_lps_mm"])
        nz, ny, nx = map(int, scan["shape_zyx"])
        return StoreGrid((x, y, z), (nz, ny, nx), self.settings.spacing_mm)

    def read_patch(self, scan_id: str, start_zyx: Sequence[int], size_zyx: Sequence[int]) -> Int16[np.ndarray, "z y x"]:
        """Voxels `start` to `start + size` of a scan; what lies outside it is `settings.padding_hu`.

        Raises:
            DamagedStoreError: no such scan, or a damaged file.
        """
        file = self._file(scan_id, "b2nd")
        try:
            scan = self._opened(scan_id)
            window = [(max(a, 0), min(a + n, m)) for a, n, m in zip(start_zyx, size_zyx, scan.shape_zyx, strict=True)]
            voxels = scan.read(window) if all(low < high for low, high in window) else None
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, MemoryError, OSError) as error:
            raise DamagedStoreError.of(file, error) from error
        if voxels is not None and voxels.shape == tuple(size_zyx):
            return voxels
        patch: npt.NDArray[np.int16] = np.full(tuple(size_zyx), self.settings.padding_hu, dtype=np.int16)
        if voxels is not None:
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
            if scan_id not in self._compared_maps:
                if (sums := self._sums(scan_id)) is not None:
                    sums.check_coarse_map(content)
                if (coarse_map.shape_zyx, coarse_map.spacing_mm) != (self.shapes[scan_id], self.settings.spacing_mm):
                    raise ValueError(f"it is of {coarse_map.shape_zyx} voxels of {coarse_map.spacing_mm:g} mm")
                self._compared_maps.add(scan_id)
            return coarse_map
        except (OSError, ValueError) as error:
            raise DamagedStoreError.of(file, error) from error

    def _opened(self, scan_id: str) -> OpenScan:
        scan = self._open.pop(scan_id, None)
        if scan is None or not scan.is_current():
            scan = OpenScan(self.path / SCANS_FOLDER / f"{scan_id}.b2nd", self._sums(scan_id))
            if scan.shape_zyx != self.shapes[scan_id]:
                raise ValueError(f"it has {scan.shape_zyx} voxels, and the index says {self.shapes[scan_id]}")
            if len(self._open) >= _NUM_OPEN:
                del self._open[next(iter(self._open))]
        self._open[scan_id] = scan
        return scan

    def _sums(self, scan_id: str) -> ScanSums | None:
        try:
            return ScanSums.open(self.path / SCANS_FOLDER / f"{scan_id}.sums", scan_id)
        except FileNotFoundError as error:
            if self._about.get(CHECKED):
                raise ValueError("its check sums are missing") from error
            return None

    def _file(self, scan_id: str, suffix: str) -> Path:
        """A file of a scan; the index has no name that leads out of the store."""
        if scan_id not in self.shapes:
            raise DamagedStoreError(f"{self.path} is damaged: {scan_id[:200]!r} is no scan of it; prepare it anew")
        return self.path / SCANS_FOLDER / f"{scan_id}.{suffix}"

    def _read_index(self, name: str, check: Callable[[pd.DataFrame], None]) -> pd.DataFrame:
        try:
            content = read_regular(self.path / name)
            expected = (self._about.get(CHECKED) or {}).get(name)
            if expected is not None and expected != hashlib.sha256(content).hexdigest():
                raise ValueError(f"it is not the one that {SETTINGS_FILE} was written with: its digest differs")
            if (num_rows := pq.read_metadata(pa.BufferReader(content)).num_rows) > _MAX_ROWS:
                raise ValueError(f"it claims {num_rows} rows")
            table = pq.read_table(pa.BufferReader(content))
            table.validate(full=True)
            frame: pd.DataFrame = table.to_pandas()
            check(frame)
            return frame
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise DamagedStoreError.of(self.path / name, error) from error


def read_settings_file(folder: Path) -> dict[str, Any]:
    """What `store.json` says, its `settings` as `StoreSettings`.

    Raises:
        DamagedStoreError: it is not as it was written.
        StoreError: there is none, or it is of another version.
    """
    file = folder / SETTINGS_FILE
    try:
        about = read_sealed_json(file)
        if (version := about["version"]) == STORE_VERSION:
            return {**about, "complete": bool(about["complete"]), "settings": StoreSettings(**about["settings"])}
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{folder} is not a store (it has no {SETTINGS_FILE}): make one with fmcib-ssl prepare"
        raise StoreError(message) from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedStoreError.of(file, error) from error
    raise StoreError(f"{folder} has version {version}, this package reads {STORE_VERSION}: prepare it anew")


def _is_name(scan_id: object) -> bool:
    """Whether a value may be the name of a scan; one that leads out of the store may not."""
    return isinstance(scan_id, str) and scan_id == Path(scan_id).name not in ("", "..") and "\0" not in scan_id


def _check_scans(scans: pd.DataFrame) -> None:
    """Raise a ValueError if a table cannot be one of a store's scans."""
    require_columns(SCANS_INDEX, scans, ("scan_id", "shape_zyx", "origin_lps_mm"))
    if not all(map(_is_name, scans["scan_id"])):
        raise ValueError("a scan_id is no file name")
    if (doubled := scans["scan_id"].duplicated()).any():
        raise ValueError(f"duplicate scan_id {scans['scan_id'][doubled].iloc[0]}")
    for column, kinds, lowest in (("shape_zyx", "iu", 1), ("origin_lps_mm", "iuf", -_FARTHEST_MM)):
        for value in map(np.asarray, scans[column]):
            if value.shape != (3,) or value.dtype.kind not in kinds:
                raise ValueError(f"{column} is not three numbers in every row")
            if not ((value >= lowest) & (value < _FARTHEST_MM)).all():
                raise ValueError(f"{column} has {value.tolist()}")


def _check_lesions(lesions: pd.DataFrame, scans: pd.DataFrame, spacing_mm: float) -> None:
    """Raise a ValueError if a table cannot be one of lesions in these scans."""

    def refuse(bad: npt.ArrayLike, what: str) -> None:
        if np.any(bad):
            first = int(np.argmax(bad))
            values = str(lesions[["scan_id", *_CENTER]].iloc[first].tolist())[:200]
            raise ValueError(f"{what} in {np.sum(bad)} rows, the first is row {first + 1} of the index: {values}")

    require_columns(LESIONS_INDEX, lesions, ("scan_id", *_CENTER))
    for name in (name for name in ("lesion_id", "row") if name in lesions):
        refuse(lesions[name].duplicated(), f"duplicate {name}")
    numbers = scans.index.get_indexer(pd.Index(lesions["scan_id"]))
    refuse(numbers < 0, "a scan_id that is not in the index of scans")
    centers = lesions[_CENTER].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    shapes = np.stack(scans["shape_zyx"].tolist())[numbers]
    is_inside = ((centers >= -0.5 - _ROUNDING) & (centers <= shapes - 0.5 + _ROUNDING)).all(axis=1)  # NaN is not
    refuse(~is_inside, "a point outside its scan")
    in_mm = [f"{name}_lps_mm" for name in _CENTER]
    if set(in_mm) <= set(lesions):
        origins = np.stack(scans["origin_lps_mm"].tolist())[numbers, ::-1]
        points = lesions[in_mm].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
        agrees = (np.abs(centers * spacing_mm + origins - points) < _ROUNDING).all(axis=1)
        refuse(~agrees, f"voxel and point in mm differ, at {spacing_mm:g} mm a voxel,")
