"""What benchmarks/lidc.py is measured on: nodule crops of LIDC-IDRI and two full chest CTs, by way of one store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from fmcib_ssl.data import LesionPatches, Store, lidc_crops, prepare_store, read_annotations
from fmcib_ssl.types import Preprocessing, SampleKey

Array = npt.NDArray[Any]

PREPROCESSING = Preprocessing(patch_size_zyx=(8, 24, 24), padding="edge")
NUM_FOLDS = 5
#: Negatives in the pool; they are drawn from it in every epoch anew.
POOL_SIZE = 4000


@dataclass(frozen=True)
class Nodules:
    """The nodules of the benchmark, in the order of the store's index.

    Attributes:
        lesions: one row a nodule: `diameter_mm`; the mode of each rating, such as `texture`, and all, such as
            `texture_1` to `texture_4`, empty where a nodule has fewer readers or no sure match.
        patches: int16 HU `(n, 1, 8, 24, 24)`, 1 mm, edge padded.
        patients: `(n,)`.
        fold: 0 to 4, by patient.
        pool: int16 HU `(m, 1, 8, 24, 24)`, mined in the chest CTs.
        published: the published malignancy split: `train`, `val`, `test`, or empty, `(n,)`.
        published_malignancy: its labels.
    """

    lesions: pd.DataFrame
    patches: Tensor
    patients: Array
    fold: Array
    pool: Tensor
    published: Array
    published_malignancy: Array


def load(data: Path, workspace: Path) -> Nodules:
    """Prepare the store if need be, and cut everything that is trained and tested on.

    Args:
        data: the folder with `lidc_crops/` and `ct/`.
        workspace: where the store is kept.
    """
    chests = pd.read_csv(data / "ct" / "annotations.csv").drop(columns="mask_path")  # its paths start at `data`
    store = prepared_store([nodule_crops(data), chests], data, workspace)
    is_nodule = store.lesions["image_path"].str.startswith("lidc_crops/").to_numpy()
    lesions = store.lesions[is_nodule].reset_index(drop=True)
    size = PREPROCESSING.patch_size_zyx
    # Crops are as large as their nodules, so that padding with a constant would tell how large a nodule is.
    cropped = LesionPatches(store, size, negatives_per_lesion=0, select=is_nodule, padding=PREPROCESSING.padding)
    patches = torch.stack([cropped.positive(i) for i in range(len(cropped))])

    in_chests = LesionPatches(store, size, mining="background", negatives_per_lesion=8, select=~is_nodule)
    keys = [SampleKey(k // len(in_chests), k % len(in_chests)) for k in range(POOL_SIZE // 8)]
    pool = torch.cat([in_chests[key]["negative"] for key in keys])

    files = [Path(image).name for image in lesions["image_path"]]
    readers = pd.read_csv(data / "lidc_crops" / "readers.csv", index_col="file").filter(regex=r"_\d$")
    lesions = lesions.join(readers.reindex(files).reset_index(drop=True))
    published = pd.read_csv(data / "lidc_crops" / "fmcib_task2_voi_map.csv").drop_duplicates("f").set_index("f")
    published = published.reindex(files)
    side, malignancy = published["split"].fillna("").to_numpy(str), published["malignancy"].fillna(0).to_numpy(np.int64)
    patients = lesions["PatientID"].to_numpy(dtype=str)
    return Nodules(lesions, patches, patients, folds_of(patients), pool, side, malignancy)


def folds_of(patients: Array, num_folds: int = NUM_FOLDS, seed: int = 0) -> Array:
    """The fold of every row: patients in a random order, dealt out in turn."""
    names = np.unique(patients)
    dealt = np.empty(len(names), dtype=np.int64)
    dealt[np.random.default_rng(seed).permutation(len(names))] = np.arange(len(names))
    # names[permutation[k]] is the k-th in the order
    return (dealt % num_folds)[np.searchsorted(names, patients)]


def nodule_crops(data: Path) -> pd.DataFrame:
    """A row for every crop but the suspect one; paths start at `data`."""
    crops = lidc_crops(data / "lidc_crops" / "voi_index.csv")
    crops = crops[~crops["suspect"]].drop(columns="mask_path")
    return crops.assign(image_path="lidc_crops/" + crops["image_path"])


def prepared_store(tables: Sequence[pd.DataFrame], data: Path, workspace: Path) -> Store:
    """A store of the lesions of tables, whose paths start at `data`; made once."""
    workspace.mkdir(parents=True, exist_ok=True)
    csv = workspace / "lesions.csv"
    pd.concat(tables, ignore_index=True).to_csv(csv, index=False)
    table = read_annotations(csv, image_root=data)
    prepare_store(table, workspace / "store", image_root=data, num_workers=0, on_bad_row="refuse")
    return Store(workspace / "store")
