"""What benchmarks/sarcoma.py is measured on: places in 51 sarcomas and round them, and nodules, by way of one store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
import torch
from lidc_data import PREPROCESSING, nodule_crops, prepared_store
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from fmcib_ssl.data import STRATEGIES, LesionPatches, Store
from fmcib_ssl.evaluation import Readers, read_ratings
from fmcib_ssl.io import atomic_write

Array = npt.NDArray[Any]

SIZE_ZYX = np.array(PREPROCESSING.patch_size_zyx)
NUM_FOLDS = 3
#: Distance of the points that annotate a tumour, mm along z, y, x: patches of neighbours overlap, so that negatives
#: that avoid the patches of all annotated points avoid the tumour.
LATTICE_MM = (8.0, 16.0, 16.0)
#: Places of each kind in a scan that are trained and tested on.
NUM_PLACES = 16
#: Negatives in the pool of each place.
NUM_NEGATIVES = 8
#: Draws of a negative before a place is given up.
MAX_DRAWS = 500
#: Negatives of each scan that are drawn as if only the tumour's centroid were annotated.
NUM_CENTROID_DRAWS = 50
#: Least distance of a place outside from the tumour.
MARGIN_MM = 10.0
#: `inside` the tumour; `outside` it, anywhere in the body; `similar`: outside, with tissue like that of a place inside.
KINDS = ("inside", "outside", "similar")


@dataclass(frozen=True)
class Mask:
    """A tumour on the grid of its CT.

    Attributes:
        inside: `(z, y, x)`.
        distance_mm: from the centre of each voxel to that of the nearest voxel of the tumour.
        image: geometry.
    """

    inside: Array
    distance_mm: Array
    image: sitk.Image

    @classmethod
    def read(cls, path: Path) -> Mask:
        """From a file."""
        image = sitk.ReadImage(str(path))
        inside = sitk.GetArrayFromImage(image) > 0
        return cls(inside, ndimage.distance_transform_edt(~inside, sampling=image.GetSpacing()[::-1]), image)

    def lattice_lps_mm(self) -> Array:
        """Points of the tumour, every few voxels along each axis, `(n, 3)`."""
        steps = [max(1, round(mm / edge)) for mm, edge in zip(LATTICE_MM, self.image.GetSpacing()[::-1], strict=True)]
        index = np.argwhere(self.inside)
        first = np.array([step // 2 for step in steps])
        chosen = index[((index - index.min(0) - first) % steps == 0).all(1)]
        return np.array([self.image.TransformIndexToPhysicalPoint(row[::-1].tolist()) for row in chosen])

    def distances_at(self, points_lps_mm: Array) -> Array:
        """Distance from the tumour of the voxels that hold points, mm, `(n,)`; 0 inside it."""
        axes = np.reshape(self.image.GetDirection(), (3, 3))
        index_xyz = (points_lps_mm - np.array(self.image.GetOrigin())) @ axes / np.array(self.image.GetSpacing())
        last = np.array(self.inside.shape) - 1
        index = np.clip(np.rint(index_xyz[:, ::-1]).astype(int), 0, last)
        return np.asarray(self.distance_mm[tuple(index.T)])


@dataclass(frozen=True)
class Sarcomas:
    """Places in the scans and what is learned and tested there.

    Attributes:
        places: one row a place: `PatientID`, `kind`, `z`, `y`, `x` (voxels of 1 mm), and of those inside `row`, their
            row in the store.
        patches: int16 HU `(places, 1, 8, 24, 24)`.
        pools: patches beside each place inside, int16 `(inside, NUM_NEGATIVES, 1, 8, 24, 24)`: negatives by strategy.
        nodules: of LIDC-IDRI, one row each.
        nodule_patches: int16 HU `(nodules, 1, 8, 24, 24)`.
        mining: what each strategy draws, for the results.
    """

    places: pd.DataFrame
    patches: Tensor
    pools: dict[str, Tensor]
    nodules: pd.DataFrame
    nodule_patches: Tensor
    mining: list[dict[str, Any]]

    @property
    def patients(self) -> Array:
        """Of every place."""
        return self.places["PatientID"].to_numpy(dtype=str)

    def rows_of(self, *kinds: str) -> Array:
        """Rows of the places of some kinds."""
        return np.flatnonzero(self.places["kind"].isin(kinds))

    def ratings(self, name: str) -> Readers:
        """What the readers say of the nodules."""
        return Readers(name, read_ratings(self.nodules, name))


def load(data: Path, workspace: Path) -> Sarcomas:
    """Prepare the store if need be, and cut everything that is trained and tested on; pools are kept.

    Args:
        data: the folder with `ct/sarcoma/` and `lidc_crops/`.
        workspace: where store and pools are kept.
    """
    table = pd.read_csv(data / "ct" / "sarcoma" / "annotations.csv")
    masks = {
        row["PatientID"]: Mask.read(data / "ct" / "sarcoma" / row["mask_path"]) for row in table.to_dict("records")
    }
    store = prepared_store([*_tumour_points(table, masks), nodule_crops(data)], data, workspace)
    is_nodule = store.lesions["image_path"].str.startswith("lidc_crops/").to_numpy()
    cropped = LesionPatches(
        store, PREPROCESSING.patch_size_zyx, negatives_per_lesion=0, select=is_nodule, padding="edge"
    )
    ratings = pd.read_csv(data / "lidc_crops" / "readers.csv").set_index("file")
    names = [Path(path).name for path in cropped.lesions["image_path"]]
    rated = np.flatnonzero(np.isin(names, ratings.index))
    places = place_table(store, masks)
    inside = places[places["kind"] == "inside"]
    annotated = LesionPatches(
        store, PREPROCESSING.patch_size_zyx, select=inside["row"].to_numpy(int), padding=PREPROCESSING.padding
    )
    scans = _scan_numbers(annotated)
    patches = [annotated.patch_at(scans[p.PatientID], np.array([p.z, p.y, p.x])) for p in places.itertuples()]
    pools, mining = {}, []
    for strategy in STRATEGIES:
        pools[strategy], row = _pool(annotated, strategy, masks, workspace / f"pool-{strategy}.npz")
        mining += [row, centroid_row(annotated, strategy, masks)]
    return Sarcomas(
        places,
        torch.stack(patches),
        pools,
        ratings.loc[[names[i] for i in rated]].assign(PatientID=cropped.lesions["PatientID"].to_numpy()[rated]),
        torch.stack([cropped.positive(int(i)) for i in rated]),
        mining,
    )


def _tumour_points(table: pd.DataFrame, masks: dict[str, Mask]) -> list[pd.DataFrame]:
    """A row for every point of a lattice in each tumour; paths start at the folder of the data."""
    tumours = []
    for row in table.to_dict("records"):
        points = pd.DataFrame(masks[row["PatientID"]].lattice_lps_mm(), columns=["coordX", "coordY", "coordZ"])
        tumours.append(points.assign(image_path=f"ct/sarcoma/{row['image_path']}", PatientID=row["PatientID"]))
    return tumours


def place_table(store: Store, masks: dict[str, Mask]) -> pd.DataFrame:
    """`NUM_PLACES` places of each kind in every scan, a function of the scans; whole patches lie in the scan.

    Args:
        store: with the tumours' points as lesions.
        masks: by patient.
    """
    tables = []
    for number, (patient, mask) in enumerate(masks.items()):
        rng = np.random.default_rng(number)
        lesions = store.lesions[store.lesions["PatientID"] == patient]
        scan_id = str(lesions["scan_id"].iloc[0])
        grid, coarse = store.grid(scan_id), store.coarse_map(scan_id)
        points = np.floor(lesions[["center_z", "center_y", "center_x"]].to_numpy(float) + 0.5).astype(int)
        fitting = np.flatnonzero(fits_in(points, grid.shape_zyx))
        chosen = rng.choice(fitting, min(NUM_PLACES, len(fitting)), replace=False)
        inside = points[chosen]

        lowest = SIZE_ZYX // 2
        candidates = rng.integers(lowest, np.array(grid.shape_zyx) - SIZE_ZYX + lowest + 1, size=(20_000, 3))
        cells = candidates // coarse.voxels_per_cell
        far = mask.distances_at(grid.to_lps_mm(candidates.astype(float))) >= MARGIN_MM
        candidates = candidates[far & coarse.body[tuple(cells.T)]]
        tissue = _tissue(coarse, candidates)
        similar: list[int] = []
        for own in _tissue(coarse, inside):
            order = np.argsort(np.hypot(*(tissue - own).T), kind="stable")
            similar.append(next(int(i) for i in order if i not in similar))
        kinds = (inside, candidates[: len(inside)], candidates[similar])
        for kind, zyx in zip(KINDS, kinds, strict=True):
            of_kind = pd.DataFrame(zyx, columns=["z", "y", "x"]).assign(PatientID=patient, kind=kind, row=-1)
            tables.append(of_kind.assign(row=lesions.index[chosen]) if kind == "inside" else of_kind)
    return pd.concat(tables, ignore_index=True)


def fits_in(centers_zyx: Array, shape_zyx: Sequence[int]) -> Array:
    """Which patches lie in a scan as a whole, `(n,)`."""
    starts = centers_zyx - SIZE_ZYX // 2
    return np.asarray(((starts >= 0) & (starts + SIZE_ZYX <= np.array(shape_zyx))).all(1))


def _tissue(coarse: Any, centers_zyx: Array) -> Array:
    """Mean and standard deviation of HU over 12 mm, `(n, 2)`, as `mining=hard` compares them."""
    return np.array([coarse.tissue_at(center) for center in centers_zyx])


def _scan_numbers(annotated: LesionPatches) -> dict[str, int]:
    """The number that `LesionPatches` gives the scan of each patient."""
    numbers = {scan_id: number for number, scan_id in enumerate(sorted(set(annotated.store.lesions["scan_id"])))}
    return {str(row.PatientID): numbers[row.scan_id] for row in annotated.lesions.itertuples()}


def _pool(annotated: LesionPatches, strategy: str, masks: dict[str, Mask], file: Path) -> tuple[Tensor, dict[str, Any]]:
    """Negatives of each place inside, mined in its own scan, and how many of them have their centre in the tumour.

    Only patches that lie in the scan as a whole are kept: these scans are cropped round the tumour, and a patch with a
    repeated edge would be known for a negative by that.
    """
    if not file.is_file():
        centers, scans = [], _scan_numbers(annotated)
        for index, lesion in enumerate(tqdm(annotated.lesions.itertuples(), f"mining, {strategy}", len(annotated))):
            query = annotated.negative_query(scans[str(lesion.PatientID)], index)
            rng, fitting = np.random.default_rng([index, 1]), []
            for _ in range(MAX_DRAWS):  # one by one, as an epoch after the other draws them
                drawn = STRATEGIES[strategy]().draw(query, 1, rng)
                if drawn is not None and fits_in(drawn, query.coarse.shape_zyx)[0]:
                    fitting.append(drawn[0])
                if len(fitting) == NUM_NEGATIVES:
                    break
            else:
                raise SystemExit(f"{lesion.scan_id}: mining={strategy} has no place for {NUM_NEGATIVES} negatives")
            centers.append(np.array(fitting))
        patches = np.stack([
            np.stack([annotated.patch_at(scans[str(lesion.PatientID)], center).numpy() for center in of_lesion])
            for lesion, of_lesion in zip(annotated.lesions.itertuples(), centers, strict=True)
        ])  # fmt: skip
        with atomic_write(file) as unfinished:
            np.savez(unfinished, patches=patches, centers=np.stack(centers))
    kept = np.load(file)
    distances = [
        masks[str(lesion.PatientID)].distances_at(annotated.store.grid(str(lesion.scan_id)).to_lps_mm(c.astype(float)))
        for lesion, c in zip(annotated.lesions.itertuples(), kept["centers"], strict=True)
    ]
    in_tumour = np.array(distances) == 0
    row = {
        "mining": strategy,
        "annotated": "lattice",
        "negatives": in_tumour.size,
        "in_tumour": round(float(in_tumour.mean()), 4),
    }
    return torch.from_numpy(kept["patches"]), row


def centroid_row(annotated: LesionPatches, strategy: str, masks: dict[str, Mask]) -> dict[str, Any]:
    """How many negatives have their centre in the tumour if a table names one point of it, as most tables do.

    The point is the one of the lattice that is nearest to their mean.
    """
    in_tumour, scans = [], _scan_numbers(annotated)
    for patient, mask in masks.items():
        index = int(np.flatnonzero(annotated.lesions["PatientID"] == patient)[0])
        query = annotated.negative_query(scans[patient], index)
        points = query.lesions_zyx
        centroid = points[np.argmin(np.linalg.norm(points - points.mean(0), axis=1))]
        query = replace(
            query, lesions_zyx=centroid[None], lesion_zyx=centroid, tissue_hu=query.coarse.tissue_at(centroid)
        )
        drawn = [
            STRATEGIES[strategy]().draw(query, 1, np.random.default_rng([index, k])) for k in range(NUM_CENTROID_DRAWS)
        ]
        grid = annotated.store.grid(str(annotated.lesions["scan_id"].iloc[index]))
        in_tumour.append(
            mask.distances_at(grid.to_lps_mm(np.concatenate([d for d in drawn if d is not None]).astype(float))) == 0
        )
    shares = [float(of_scan.mean()) for of_scan in in_tumour]
    return {
        "mining": strategy, "annotated": "centroid", "negatives": sum(map(len, in_tumour)),
        "in_tumour": round(float(np.mean(shares)), 4), "scans_over_10_percent": int(np.sum(np.array(shares) > 0.1)),
    }  # fmt: skip
