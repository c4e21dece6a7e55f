"""Patches straight from scans: a lesion and a negative mined for it, nothing prepared beforehand.

Good for a quick start and for small archives; every sample may decode a scan.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int16
from torch import Tensor
from torch.utils.data import Dataset

from fmcib_ssl.data.annotations import LesionTable, OnBadRow
from fmcib_ssl.data.geometry import PatchGrid
from fmcib_ssl.data.mining import LegalCenters, background_centers, coarse_grid
from fmcib_ssl.data.scans import Scan, ScanError, ScanSource, crop_patch, read_scan
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey


@dataclass
class _Decoded:
    scan: Scan
    legal: LegalCenters | None = None  # found when first asked for: embedding needs none


class VolumePatches(Dataset[PatchPair]):
    """A lesion's patch and a negative from its scan, both int16 HU `(1, z, y, x)`, canonical LPS.

    `dataset[SampleKey(epoch, index)]` is a function of `(seed, epoch, index)` and of the files, of nothing else: not
    of the worker, nor of what was asked before. `dataset[index]` is epoch 0.

    Where a lesion's scan has no place for a negative, another scan gives it, and `negative_from_other_scan` says so.

    Args:
        table: usable lesions, as `check_annotations` gives them.
        preprocessing: the patch to cut.
        seed: not negative.
        cache_scans: decoded scans that each worker keeps, 30 to 150 MB apiece for a chest CT.
        on_bad_row: when a scan that passed the check cannot be decoded: "refuse" raises; "skip" warns once for each
            file and lets another lesion stand in, which the sample's `lesion` names.
    """

    def __init__(
        self,
        table: LesionTable,
        preprocessing: Preprocessing,
        seed: int = 0,
        cache_scans: int = 2,
        on_bad_row: OnBadRow = "refuse",
    ) -> None:
        if cache_scans < 1:
            raise ValueError(f"cache_scans={cache_scans}: at least the scan in use is kept, so 1 or more")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.table = table
        self.preprocessing = preprocessing
        self.seed = seed
        self.cache_scans = cache_scans
        self.on_bad_row = on_bad_row
        self._scans = list(dict.fromkeys(table.scan_of(i) for i in range(len(table))))
        self._cache: OrderedDict[ScanSource, _Decoded] = OrderedDict()
        self._failed: dict[ScanSource, ScanError] = {}
        self._without_legal_place: set[ScanSource] = set()

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_failed": {}, "_without_legal_place": set()}

    def __getitem__(self, key: SampleKey | int) -> PatchPair:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"lesion {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, epoch, index])
        for lesion in self._stand_ins(index, rng):
            try:
                positive = self.positive(lesion)
            except ScanError:
                if self.on_bad_row == "refuse":
                    raise
                continue
            negative, from_other_scan = self._negative(self.table.scan_of(lesion), rng)
            return PatchPair(
                positive=positive, negative=negative, lesion=lesion, negative_from_other_scan=from_other_scan
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
        patch = crop_patch(self._decoded(scan).scan, grid, self.preprocessing.padding_hu)
        return torch.from_numpy(patch)[None]

    def legal_centers(self, scan: ScanSource) -> LegalCenters:
        """Where negatives of a scan may be centred."""
        decoded = self._decoded(scan)
        if decoded.legal is None:
            decoded.legal = self._find_legal_centers(scan, decoded.scan)
        return decoded.legal

    def _find_legal_centers(self, source: ScanSource, scan: Scan) -> LegalCenters:
        grid = coarse_grid(scan.geometry)
        coarse_hu = crop_patch(scan.thinned(grid.spacing_mm), grid, self.preprocessing.padding_hu)
        lesions = self.table.annotated_lps_mm.get(source, np.empty((0, 3)))
        patch = PatchGrid((0, 0, 0), self.preprocessing.patch_size_zyx, self.preprocessing.spacing_mm)
        return background_centers(coarse_hu, grid, lesions, patch.extent_mm_xyz)

    def _stand_ins(self, index: int, rng: np.random.Generator) -> Iterator[int]:
        """The lesion itself; then, should its scan fail, others in an order that the key alone decides."""
        yield index
        yield from (int(i) for i in rng.permutation(len(self)) if i != index)

    def _negative(self, own: ScanSource, rng: np.random.Generator) -> tuple[Int16[Tensor, "1 z y x"], bool]:
        if legal := self.legal_centers(own):
            return self.patch_at(own, legal.draw(rng)), False
        for i in rng.permutation(len(self._scans)):
            other = self._scans[i]
            if other == own or other in self._without_legal_place:
                continue
            try:
                legal = self.legal_centers(other)
            except ScanError:
                if self.on_bad_row == "refuse":
                    raise
                continue
            if legal:
                return self.patch_at(other, legal.draw(rng)), True
            self._without_legal_place.add(other)
        extent = " x ".join(f"{n * self.preprocessing.spacing_mm:g}" for n in self.preprocessing.patch_size_zyx)
        raise ValueError(
            f"{self.table.source}: no scan has room for a negative: a patch of {extent} mm (z, y, x) that is at least "
            "half body and overlaps no annotated lesion. Take a smaller patch (patch_size, spacing_mm) or add scans"
        )

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
