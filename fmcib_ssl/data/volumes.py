"""Patches straight from scans: a lesion and a negative mined for it, nothing prepared beforehand.

Good for a quick start and for small archives; every sample may decode a scan.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int16
from torch import Tensor
from torch.utils.data import Dataset

from fmcib_ssl.data.annotations import LesionTable
from fmcib_ssl.data.coarse_map import CELL_MM, CoarseMap, build_coarse_map
from fmcib_ssl.data.geometry import PatchGrid, ScanGeometry
from fmcib_ssl.data.mining import MiningStrategy, NegativeMiner, NegativeQuery, mining_strategy, no_place, stand_ins
from fmcib_ssl.data.scans import Scan, ScanSource, crop_patch, read_scan
from fmcib_ssl.data.tables import AnnotationsError, OnBadRow
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey, ScanError

#: Voxels that the coarse map of a scan read directly is made from, two to the edge of a cell. Negatives are centred on
#: them.
MAP_SPACING_MM = CELL_MM / 2


@dataclass(frozen=True)
class _Map:
    coarse: CoarseMap
    origin_lps_mm: npt.NDArray[np.float64]

    def to_zyx(self, points_lps_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return ((points_lps_mm - self.origin_lps_mm) / self.coarse.spacing_mm)[..., ::-1]

    def to_lps_mm(self, voxel_zyx: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return voxel_zyx[::-1] * self.coarse.spacing_mm + self.origin_lps_mm


@dataclass
class _Decoded:
    scan: Scan
    map: _Map | None = None  # made when first asked for: embedding needs none


class VolumePatches(Dataset[PatchPair]):
    """A lesion's patch and negatives for it, int16 HU, canonical LPS, cut from the scans as they are.

    `positive` is `(1, z, y, x)`; `negative` has the same shape, or `(K, 1, z, y, x)` with `per_lesion=K` other than 1.

    `dataset[SampleKey(epoch, index)]` is a function of `(seed, epoch, index)` and of the files, of nothing else: not
    of the worker, nor of what was asked before. `dataset[index]` is epoch 0.

    Where a lesion's scan has no place for negatives, another scan gives them, and `negative_from_other_scan` says so.

    Args:
        table: usable lesions, as `check_annotations` gives them.
        preprocessing: the patch to cut.
        seed: not negative.
        cache_scans: decoded scans that each worker keeps, 30 to 150 MB apiece for a chest CT.
        on_bad_row: when a scan that passed the check cannot be decoded: "refuse" raises; "skip" warns once for each
            file and lets another lesion stand in, which the sample's `lesion` names.
        mining: `"background"`, `"near"`, `"hard"` or `"uniform"`, or a strategy of `fmcib_ssl.data.mining`.
        per_lesion: negatives of each lesion.

    Raises:
        ValueError: a number that makes no sense, or a strategy that does not exist.
    """

    def __init__(
        self,
        table: LesionTable,
        preprocessing: Preprocessing,
        *,
        seed: int = 0,
        cache_scans: int = 2,
        on_bad_row: OnBadRow = "refuse",
        mining: str | MiningStrategy = "background",
        per_lesion: int = 1,
    ) -> None:
        if cache_scans < 1:
            raise ValueError(f"cache_scans={cache_scans}: at least the scan in use is kept, so 1 or more")
        self.table = table
        self.preprocessing = preprocessing
        self.seed = seed
        self.cache_scans = cache_scans
        self.on_bad_row = on_bad_row
        self._scans = list(dict.fromkeys(table.scan_of(i) for i in range(len(table))))
        self._cache: OrderedDict[ScanSource, _Decoded] = OrderedDict()
        self._failed: dict[ScanSource, ScanError] = {}
        self._number = {scan: number for number, scan in enumerate(self._scans)}
        self._miner = NegativeMiner(mining_strategy(mining), len(self._scans), per_lesion, seed)

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_failed": {}}

    def __getitem__(self, key: SampleKey | int) -> PatchPair:
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        for lesion in stand_ins(key, len(self), self.seed):
            try:
                positive = self.positive(lesion)
            except ScanError:
                if self.on_bad_row == "refuse":
                    raise
                continue
            own = self._number[self.table.scan_of(lesion)]
            scan, negatives = self._negatives(key, own, lesion)
            return PatchPair(
                positive=positive,
                negative=negatives[0] if self._miner.per_lesion == 1 else negatives,
                lesion=lesion,
                negative_from_other_scan=scan != own,
            )
        raise ScanError(self.table.source, "none of its scans can be decoded")

    def positive(self, index: int) -> Int16[Tensor, "1 z y x"]:
        """The patch round a lesion, by its place in the table. Nothing is mined, and no other lesion stands in.

        Raises:
            ScanError: the scan cannot be decoded; names file and row.
        """
        scan = self.table.scan_of(index)
        try:
            return self.patch_at(scan, self.table.centers_lps_mm[index])
        except ScanError as error:
            raise ScanError(
                error.path, f"{error.reason} (row {self.table.rows.index[index]} of {self.table.source})"
            ) from error

    def patch_at(self, scan: ScanSource, center_lps_mm: npt.ArrayLike) -> Int16[Tensor, "1 z y x"]:
        """The patch round any point of a scan, LPS mm."""
        x, y, z = np.asarray(center_lps_mm, dtype=np.float64).tolist()
        grid = PatchGrid((x, y, z), self.preprocessing.patch_size_zyx, self.preprocessing.spacing_mm)
        patch = crop_patch(self._decoded(scan).scan, grid, self.preprocessing.padding_hu, self.preprocessing.padding)
        return torch.from_numpy(patch)[None]

    def title(self, index: int) -> str:
        """A lesion's name for people: its scan, and its row in the table."""
        return f"{self.table.scan_of(index).path.name}, row {self.table.rows.index[index]}"

    def negative_query(self, scan: int, index: int) -> NegativeQuery:
        """What the mining strategy is asked for a lesion, in its own scan or another.

        Args:
            scan: number of the scan, in the order of the table.
            index: the lesion's place in the table.
        """
        source, own = self._scans[scan], self.table.scan_of(index)
        center = self.table.centers_lps_mm[index]
        tissue = (own_map := self._map(own)).coarse.tissue_at(own_map.to_zyx(center))
        asked = self._map(source)
        return NegativeQuery(
            asked.coarse,
            np.array(self.preprocessing.patch_size_zyx) * self.preprocessing.spacing_mm / asked.coarse.spacing_mm,
            asked.to_zyx(self.table.annotated_lps_mm.get(source, np.empty((0, 3)))),
            asked.to_zyx(center) if source == own else None,
            tissue,
        )

    def _negatives(self, key: SampleKey, own: int, lesion: int) -> tuple[int, Int16[Tensor, "per_lesion 1 z y x"]]:
        def query(scan: int) -> NegativeQuery | None:
            try:
                return self.negative_query(scan, lesion)
            except ScanError:
                if self.on_bad_row == "refuse":
                    raise
                return None

        if (drawn := self._miner.draw(key, own, query)) is None:
            extent = [n * self.preprocessing.spacing_mm for n in self.preprocessing.patch_size_zyx]
            raise AnnotationsError(f"{self.table.source}: {no_place(extent)}")
        scan, centers = drawn
        source = self._scans[scan]
        patches = torch.empty((len(centers), 1, *self.preprocessing.patch_size_zyx), dtype=torch.int16)
        for patch, center in zip(patches, centers, strict=True):
            patch[:] = self.patch_at(source, self._map(source).to_lps_mm(center))
        return scan, patches

    def _map(self, source: ScanSource) -> _Map:
        decoded = self._decoded(source)
        if decoded.map is None:
            decoded.map = _make_map(decoded.scan, self.preprocessing.padding_hu)
        return decoded.map

    def _decoded(self, source: ScanSource) -> _Decoded:
        if source in self._failed:
            raise self._failed[source]
        if source not in self._cache:
            while len(self._cache) >= self.cache_scans:
                self._cache.popitem(last=False)
            try:
                self._cache[source] = _Decoded(read_scan(*source))
            except ScanError as error:
                if self.on_bad_row == "skip":
                    self._failed[source] = error
                    warnings.warn(f"Skipping the lesions of a scan: {error}", stacklevel=2)
                raise
        self._cache.move_to_end(source)
        return self._cache[source]


def _make_map(scan: Scan, padding_hu: int) -> _Map:
    grid = covering_grid(scan.geometry, MAP_SPACING_MM)
    hu = crop_patch(scan.thinned(MAP_SPACING_MM), grid, padding_hu)
    return _Map(build_coarse_map(hu, MAP_SPACING_MM), np.array(grid.origin_lps_mm))


def covering_grid(scan: ScanGeometry, spacing_mm: float) -> PatchGrid:
    """A grid along LPS whose voxels cover a scan, however it is turned."""
    lowest, highest = scan.bounds_lps_mm()
    x, y, z = np.ceil((highest - lowest) / spacing_mm - 1e-3).astype(int).tolist()
    center = lowest + spacing_mm / 2 + (np.array([x, y, z]) // 2) * spacing_mm
    return PatchGrid((float(center[0]), float(center[1]), float(center[2])), (z, y, x), spacing_mm)
