"""Patches from a store: a lesion and the negatives mined for it, in about a millisecond; or from tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Int, Int16
from torch import Tensor
from torch.utils.data import Dataset

from fmcib_ssl.data.mining import STRATEGIES, MiningStrategy, NegativeQuery
from fmcib_ssl.data.store import DamagedStoreError, Store, StoreError
from fmcib_ssl.data.tables import OnBadRow
from fmcib_ssl.types import Padding, PatchPair, Preprocessing, SampleKey


class LesionPatches(Dataset[PatchPair]):
    """A lesion's patch and negatives for it, int16 HU, canonical LPS, read from a store.

    `dataset[SampleKey(epoch, index)]` is a function of `(seed, epoch, index)` and of the store, of nothing else: not of
    the worker, nor of what was asked before. `dataset[index]` is epoch 0. `positive` is `(1, z, y, x)`, with the voxel
    that holds the lesion's point at `size // 2` of each axis; the point is at most half a voxel from that voxel's
    centre. `negative` has the same shape; with `negatives_per_lesion=K`, K other than 1, it is `(K, 1, z, y, x)`.

    Where a lesion's scan has no place for negatives, another scan gives them, and `negative_from_other_scan` says so.

    Holds arrays of the lesions' places and nothing that it reads; safe to fork and to spawn.

    Args:
        store: a finished store or its folder.
        patch_size: voxels along z, y, x.
        seed: not negative.
        mining: `"background"`, `"near"`, `"hard"` or `"uniform"`, or a strategy of `fmcib_ssl.data.mining`.
        negatives_per_lesion: negatives of each lesion. 0 for none: `negative` is then `(0, 1, z, y, x)`.
        select: positions in, or a Boolean mask over, `store.lesions`: the lesions to serve, in that order. What is
            annotated in their scans stays forbidden to negatives all the same.
        padding: "edge": outside a scan stands the nearest voxel of its grid, not `store.settings.padding_hu`.
        on_bad_row: when a scan turns out to be damaged: "refuse" raises; "skip" warns once for each damage and lets
            another lesion stand in, which the sample's `lesion` names.

    Attributes:
        lesions: the rows of `store.lesions` that are served; `lesion` of a sample is the position in it.

    Raises:
        StoreError: no finished store, or no lesion selected.
        ValueError: a number that makes no sense, or a strategy that does not exist.
    """

    def __init__(
        self,
        store: Store | Path | str,
        patch_size: Sequence[int] = (50, 50, 50),
        *,
        seed: int = 0,
        mining: str | MiningStrategy = "background",
        negatives_per_lesion: int = 1,
        select: npt.ArrayLike | None = None,
        padding: Padding = "constant",
        on_bad_row: OnBadRow = "refuse",
    ) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        if len(patch_size) != 3 or min(patch_size) < 1:
            raise ValueError(f"patch_size={tuple(patch_size)}: need three positive numbers, z, y, x")
        if negatives_per_lesion < 0 or seed < 0:
            raise ValueError(f"negatives_per_lesion={negatives_per_lesion}, seed={seed}: must not be negative")
        if isinstance(mining, str) and mining not in STRATEGIES:
            raise ValueError(f"mining={mining!r} is not one of {', '.join(map(repr, STRATEGIES))}")
        self.patch_size = np.array(patch_size, dtype=np.int64)
        self.padding: Padding = padding
        self.on_bad_row = on_bad_row
        self.seed = seed
        self.mining: MiningStrategy = STRATEGIES[mining]() if isinstance(mining, str) else mining
        self.negatives_per_lesion = negatives_per_lesion
        self._warned: set[str] = set()
        lesions = self.store.lesions
        chosen = np.arange(len(lesions)) if select is None else np.arange(len(lesions))[np.asarray(select)]
        if len(chosen) == 0:
            raise StoreError(f"{self.store.path}: no lesion is selected of the {len(lesions)} it has")
        self.lesions = lesions.iloc[chosen].reset_index(drop=True)

        # Arrays, not lists of objects: reading them touches no reference count, so forked workers share the pages.
        self._scan_ids, scans = np.unique(lesions["scan_id"].to_numpy(dtype=str), return_inverse=True)
        centers = np.floor(lesions[["center_z", "center_y", "center_x"]].to_numpy(dtype=np.float64) + 0.5)
        by_scan = np.argsort(scans, kind="stable")
        self._annotated_zyx = centers[by_scan].astype(np.int64)
        self._first_of_scan = np.searchsorted(scans[by_scan], np.arange(len(self._scan_ids) + 1))
        self._scans, self._centers_zyx = scans[chosen], centers[chosen].astype(np.int64)
        self._patients = _patients(lesions)[chosen]
        self._without_room = np.zeros(len(self._scan_ids), dtype=bool)  # that is known of, for any lesion's negative

    @property
    def preprocessing(self) -> Preprocessing:
        """How the patches are cut, for the encoder that is trained on them."""
        (z, y, x), grid = self.patch_size.tolist(), self.store.settings
        return Preprocessing((z, y, x), grid.spacing_mm, grid.padding_hu, padding=self.padding)

    def __len__(self) -> int:
        return len(self._scans)

    def __getitem__(self, key: SampleKey | int) -> PatchPair:
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        for lesion in self._lesions_to_try(key):
            try:
                return self._pair(key, lesion)
            except DamagedStoreError as error:
                if self.on_bad_row == "refuse":
                    raise DamagedStoreError(f"{error}; lesion {self.title(lesion)}") from error
                if str(error) not in self._warned:
                    self._warned.add(str(error))
                    warnings.warn(f"Skipping lesions of a damaged scan: {error}", stacklevel=2)
        raise StoreError(f"{self.store.path}: every one of its scans is damaged; run fmcib-ssl prepare again")

    def _lesions_to_try(self, key: SampleKey) -> Iterator[int]:
        """The lesion itself; then, should its scan fail, others in an order that the seed and the key alone decide."""
        self._scan_of(key.index)  # refuses a number that is none
        yield key.index
        order = np.random.default_rng([self.seed, *key]).permutation(len(self))
        yield from (int(i) for i in order if i != key.index)

    def _pair(self, key: SampleKey, lesion: int) -> PatchPair:
        scan, centers = self._mine(key, lesion)
        negatives = [self.patch_at(scan, center) for center in centers]
        if self.negatives_per_lesion == 0:
            negative = torch.empty((0, 1, *self.patch_size.tolist()), dtype=torch.int16)
        else:
            negative = negatives[0] if len(negatives) == 1 else torch.stack(negatives)
        return PatchPair(
            positive=self.positive(lesion),
            negative=negative,
            lesion=lesion,
            negative_from_other_scan=scan != self._scan_of(lesion),
            patient=int(self._patients[lesion]),
        )

    def _mine(self, key: SampleKey, lesion: int) -> tuple[int, Int[np.ndarray, "negatives 3"]]:
        """The scan to cut negatives from, the lesion's own unless that has no legal place, and their centres in it.

        Raises:
            StoreError: no scan has a legal place.
        """
        own = self._scan_of(lesion)
        if self.negatives_per_lesion == 0:
            return own, np.empty((0, 3), dtype=np.int64)
        for scan in self._scans_to_try(key, own):
            # Begun anew for each scan, so that it does not matter which ones were left out because they are known.
            stream = np.random.default_rng([self.seed, *key, 1])
            centers = self.mining.draw(self.negative_query(scan, lesion), self.negatives_per_lesion, stream)
            if centers is not None:
                return scan, centers
            # Of the lesion's own scan it may be true for this lesion only.
            self._without_room[scan] |= scan != own
        extent = " x ".join(f"{edge:g}" for edge in self.patch_size * self.store.settings.spacing_mm)
        raise StoreError(
            f"{self.store.path}: no scan has room for a negative: a patch of {extent} mm (z, y, x) that is at "
            "least half body and overlaps no annotated lesion. Take a smaller patch (patch_size, spacing_mm), add "
            "scans, or mine none (negatives_per_lesion=0) and contrast lesions with each other "
            "(loss.negatives=lesions)"
        )

    def _scans_to_try(self, key: SampleKey, own: int) -> Iterator[int]:
        yield own
        order = np.random.default_rng([self.seed, *key, 2]).permutation(len(self._scan_ids))
        yield from (scan for scan in order.tolist() if scan != own and not self._without_room[scan])

    def positive(self, index: int, offset_mm_zyx: Sequence[float] = (0.0, 0.0, 0.0)) -> Int16[Tensor, "1 z y x"]:
        """The patch round a lesion, or round the point of its scan that is nearest to an offset from it.

        Args:
            index: of the lesion, in `lesions`.
            offset_mm_zyx: from the lesion's point, along z, y, x.
        """
        scan, center = self._scan_of(index), self._centers_zyx[index]
        if any(offset_mm_zyx):
            point = self.lesions.loc[index, ["center_z", "center_y", "center_x"]].to_numpy(dtype=np.float64)
            moved = point + np.asarray(offset_mm_zyx) / self.store.settings.spacing_mm
            last = np.array(self.store.shapes[str(self._scan_ids[scan])]) - 1
            center = np.clip(np.floor(moved + 0.5), 0, last).astype(np.int64)
        return self.patch_at(scan, center)

    def patch_at(self, scan: int, center_zyx: npt.NDArray[np.int64]) -> Int16[Tensor, "1 z y x"]:
        """The patch whose voxel `size // 2` is a given voxel of a scan.

        Args:
            scan: number of the scan, in the sorted order of the scan ids that lesions have.
            center_zyx: the voxel.
        """
        start, scan_id = center_zyx - self.patch_size // 2, str(self._scan_ids[scan])
        if self.padding == "constant":
            hu = self.store.read_patch(scan_id, start.tolist(), self.patch_size.tolist())
            return torch.from_numpy(hu)[None]
        axes = zip(start.tolist(), self.patch_size.tolist(), self.store.shapes[scan_id], strict=True)
        nearest = [np.clip(np.arange(first, first + size), 0, length - 1) for first, size, length in axes]
        inside = self.store.read_patch(
            scan_id, [int(rows[0]) for rows in nearest], [int(np.ptp(rows)) + 1 for rows in nearest]
        )
        return torch.from_numpy(inside[np.ix_(*(rows - rows[0] for rows in nearest))])[None]

    def negative_query(self, scan: int, index: int) -> NegativeQuery:
        """What the mining strategy is asked for a lesion, in its own scan or another."""
        own = self._scan_of(index)
        center = self._centers_zyx[index]
        coarse = self.store.coarse_map(str(self._scan_ids[scan]))
        own_coarse = coarse if scan == own else self.store.coarse_map(str(self._scan_ids[own]))
        annotated = self._annotated_zyx[self._first_of_scan[scan] : self._first_of_scan[scan + 1]]
        return NegativeQuery(
            coarse, self.patch_size, annotated, center if scan == own else None, own_coarse.tissue_at(center)
        )

    def title(self, index: int) -> str:
        """A lesion's name for people: its scan, and its row in the table."""
        row = self.lesions.iloc[index]
        return f"{row['scan_id']}, row {row['row']}" if "row" in row else str(row["scan_id"])

    def _scan_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"lesion {index} of {len(self)}")
        return int(self._scans[index])


def _patients(lesions: pd.DataFrame) -> npt.NDArray[np.int64]:
    """A number for the patient of each lesion: of its `PatientID`; where there is none, of its scan."""
    names = "scan " + lesions["scan_id"].astype(str)
    if "PatientID" in lesions:
        patients = lesions["PatientID"]
        names = ("patient " + patients.astype(str)).where(patients.notna(), names)
    return np.unique(names.to_numpy(dtype=str), return_inverse=True)[1].astype(np.int64)


class TensorPatches:
    """Pairs of patches that lie in memory: item `SampleKey(epoch, i)` is patch `i` and negatives out of a pool.

    Args:
        patches: one for each lesion, HU, int16 `(n, 1, z, y, x)`.
        pool: patches without a lesion, `(m, 1, z, y, x)`; None for a loss that contrasts lesions only.
        seed: with epoch and index it decides which negatives are drawn.
        negatives_per_lesion: drawn out of the pool for each lesion, anew in each epoch.

    Raises:
        ValueError: the shapes are others, or the pool's patches are of another size.
    """

    def __init__(
        self, patches: Tensor, pool: Tensor | None = None, seed: int = 0, negatives_per_lesion: int = 1
    ) -> None:
        self.patches, self.pool, self.seed = patches, patches[:0] if pool is None else pool, seed
        self.negatives_per_lesion = 0 if pool is None else negatives_per_lesion
        if patches.ndim != 5 or patches.shape[1] != 1 or self.pool.shape[1:] != patches.shape[1:]:
            raise ValueError(
                "patches must be (lesions, 1, z, y, x), those of the pool of the same size, got "
                f"{tuple(patches.shape)} and {tuple(self.pool.shape)}: patches[:, None] adds the channel"
            )

    def __len__(self) -> int:
        """Number of lesions."""
        return len(self.patches)

    def __getitem__(self, key: SampleKey, /) -> PatchPair:
        """The pair that `key` names."""
        drawn = np.random.default_rng([self.seed, *key]).integers(len(self.pool) or 1, size=self.negatives_per_lesion)
        negative = self.pool[drawn[0]] if self.negatives_per_lesion == 1 else self.pool[torch.from_numpy(drawn)]
        return PatchPair(
            positive=self.patches[key.index], negative=negative, lesion=key.index, negative_from_other_scan=True
        )

    def title(self, lesion: int, /) -> str:
        """What names a lesion in a picture."""
        return f"lesion {lesion}"
