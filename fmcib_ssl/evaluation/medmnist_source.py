"""MedMNIST 3D as a source of patches: three data sets of CT, with their official splits and labels.

A source is `{"kind": "medmnist", "dataset": "nodulemnist3d", "size": 28, "root": DIR, "window_hu": [-1024, 400],
"fit": "resize"}`; the last three may be left out. The volumes are 8-bit grey values, so HU come back only as far as the
window of the data set is known; `DATASETS` says which is taken, docs/medmnist.md why.

Source: Yang et al., MedMNIST v2, Scientific Data 10, 41, 2023, doi:10.1038/s41597-022-01721-8.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Int16, UInt8
from monai.transforms import Resize, ResizeWithPadOrCrop
from torch import Tensor

from fmcib_ssl.data.tables import REJECTED_COLUMNS
from fmcib_ssl.evaluation.embedding_sources import SCAN_COLUMN, SourcePatches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTableError
from fmcib_ssl.types import Preprocessing

logger = logging.getLogger(__name__)

Fit = Literal["resize", "pad"]
SPLITS = ("train", "val", "test")
SIZES = (28, 64)
#: Where the `medmnist` package puts what it downloads.
DEFAULT_ROOT = Path("~/.medmnist")


@dataclass(frozen=True)
class MedMNIST3D:
    """What is known of a data set.

    Attributes:
        python_class: its name in the `medmnist` package.
        task: kind of label, as scripts/evaluate.py calls it.
        window_hu: HU that the grey values 0 and 255 are taken for.
        classes: what a class number means.
        num_volumes: of the official training, validation and test split.
    """

    python_class: str
    task: Literal["binary", "multiclass"]
    window_hu: tuple[float, float]
    classes: tuple[str, ...]
    num_volumes: tuple[int, int, int]


DATASETS = {
    # No window is published; this one the first author took for lung nodules, at 1 mm and 8 bits too (DenseSharp).
    "nodulemnist3d": MedMNIST3D("NoduleMNIST3D", "binary", (-1024, 400), ("benign", "malignant"), (1158, 165, 310)),
    # "An abdominal window", without its bounds; these are customary ones, level 40 and width 400.
    "organmnist3d": MedMNIST3D(
        "OrganMNIST3D",
        "multiclass",
        (-160, 240),
        ("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart", "lung-right",
         "lung-left", "spleen", "pancreas"),
        (971, 161, 610),
    ),
    # A mask of the gland, no CT: shown as soft tissue in the fat that lies round it.
    "adrenalmnist3d": MedMNIST3D("AdrenalMNIST3D", "binary", (-100, 40), ("normal", "hyperplasia"), (1188, 98, 298)),
}  # fmt: skip


def medmnist_source(
    dataset: str,
    size: int,
    root: Path | str | None = None,
    *,
    window_hu: tuple[float, float] | None = None,
    fit: Fit = "resize",
) -> dict[str, Any]:
    """A source for `open_patches`, with every choice written out.

    Args:
        dataset: a key of `DATASETS`.
        size: voxels along an edge, 28 or 64.
        root: folder of the `.npz`; None is the one of the `medmnist` package.
        window_hu: HU of the grey values 0 and 255, if not those of `DATASETS`.
        fit: "resize" stretches the volume to the encoder's patch; "pad" keeps the voxels, cuts the middle out of it
            and repeats the edge where it is too small.

    Raises:
        FeatureTableError: no such data set or size, or a value that cannot be.
    """
    if dataset not in DATASETS:
        raise FeatureTableError(f"dataset={dataset} is not one of {', '.join(DATASETS)}")
    if size not in SIZES:
        raise FeatureTableError(f"size={size} is not one of {', '.join(map(str, SIZES))}")
    if fit not in get_args(Fit):
        raise FeatureTableError(f"fit={fit} is not one of {', '.join(get_args(Fit))}")
    low, high = map(float, window_hu or DATASETS[dataset].window_hu)
    if not -1024 <= low < high <= 32767:
        raise FeatureTableError(f"window_hu={low:g},{high:g}: give the HU of 0 and of 255, from -1024 upwards")
    folder = Path(root or DEFAULT_ROOT).expanduser().absolute()
    return {
        "kind": "medmnist", "dataset": dataset, "size": size, "root": str(folder), "window_hu": [low, high], "fit": fit,
    }  # fmt: skip


def medmnist_file(source: Mapping[str, Any]) -> Path:
    """The file of a source; the package leaves the size out of the name of the smallest."""
    suffix = "" if source["size"] == SIZES[0] else f"_{source['size']}"
    return Path(source["root"]) / f"{source['dataset']}{suffix}.npz"


def download_medmnist(source: Mapping[str, Any]) -> Path:
    """Fetch the file of a source with the `medmnist` package, which checks its MD5; one that is there is kept.

    Raises:
        FeatureTableError: the package is missing, or the download failed.
    """
    file = medmnist_file(source)
    try:
        module = importlib.import_module("medmnist.dataset")
    except ImportError as error:
        raise FeatureTableError(
            f"download=true needs the medmnist package: pip install 'fmcib_ssl[medmnist]'; or put {file.name} from "
            f"https://doi.org/10.5281/zenodo.10519652 into {file.parent} ({error})"
        ) from error
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        build = getattr(module, DATASETS[source["dataset"]].python_class)
        build(split="test", root=str(file.parent), size=source["size"], download=True)
    except (RuntimeError, OSError) as error:
        raise FeatureTableError(f"{file} could not be downloaded: {inspect.cleandoc(str(error))}") from error
    return file


def open_medmnist(source: Mapping[str, Any], preprocessing: Preprocessing | None = None) -> SourcePatches:
    """Open a data set; `embedding_sources.open_patches` calls it.

    The table has `lesion_id` (dataset, size, split, number), `split`, `label` and `label_name`. MedMNIST does not say
    which volumes are of one patient.

    Args:
        source: see the module.
        preprocessing: of the encoder; by default patches as large as the volumes.

    Raises:
        FeatureTableError: a file that is not there or not MedMNIST's, or a source that cannot be.
    """
    given = {key: source[key] for key in ("root", "window_hu", "fit") if source.get(key) is not None}
    source = {**source, **medmnist_source(str(source.get("dataset")), int(source.get("size") or SIZES[0]), **given)}
    name, size = source["dataset"], source["size"]
    file = medmnist_file(source)
    images, labels, splits = _read(file, name, size)
    numbers = np.concatenate([np.arange(splits.count(split)) for split in SPLITS])
    ids = [f"{name}_{size}/{split}/{number:04d}" for split, number in zip(splits, numbers, strict=True)]
    lesions = pd.DataFrame({ID_COLUMN: ids, SCAN_COLUMN: ids, "split": splits, "label": labels})
    lesions["label_name"] = [DATASETS[name].classes[label] for label in labels]
    if source.get("select"):
        raise FeatureTableError("select= is not for MedMNIST: evaluate with split=split, or choose rows of the table")
    wanted = preprocessing or Preprocessing((size, size, size))
    read = _Patches(images, tuple(source["window_hu"]), source["fit"], wanted.patch_size_zyx)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    digest.update(json.dumps([name, size, source["window_hu"], source["fit"]]).encode())
    none = pd.DataFrame(columns=[*REJECTED_COLUMNS])
    return SourcePatches(lesions, read, none, digest.hexdigest(), wanted)


def to_hu(grey: UInt8[Tensor, "*shape"], window_hu: tuple[float, float]) -> Tensor:
    """Grey values to HU, float32: `low + grey / 255 * (high - low)`.

    Args:
        grey: 0 to 255.
        window_hu: HU of 0 and of 255. What lay outside was cut off and does not come back.
    """
    low, high = window_hu
    return low + grey.float() * ((high - low) / 255)


@dataclass(frozen=True)
class _Patches:
    images: npt.NDArray[np.uint8]  # (n, size, size, size)
    window_hu: tuple[float, float]
    fit: Fit
    patch_size_zyx: tuple[int, int, int]

    def __call__(self, index: int) -> Int16[Tensor, "1 z y x"]:
        volume = to_hu(torch.from_numpy(self.images[index].copy()), self.window_hu)[None]
        if self.fit == "pad":
            fitted = ResizeWithPadOrCrop(self.patch_size_zyx, mode="edge")(volume)
        else:
            fitted = Resize(self.patch_size_zyx, mode="trilinear", anti_aliasing=True)(volume)
        return torch.as_tensor(np.asarray(fitted)).round().to(torch.int16)


def _read(file: Path, name: str, size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str]]:
    """Volumes, labels and splits, training first."""
    if not file.is_file():
        raise FeatureTableError(
            f"{file}: there is no such file; download=true fetches it with the medmnist package, or put it there from "
            "https://doi.org/10.5281/zenodo.10519652, or name its folder with root=DIR"
        )
    images, labels = [], []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for split in SPLITS:
                images.append(arrays[f"{split}_images"])
                labels.append(arrays[f"{split}_labels"])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise FeatureTableError(f"{file} is damaged, or not one of MedMNIST's: {error}; download it again") from error
    known = DATASETS[name]
    for split, volumes, classes, official in zip(SPLITS, images, labels, known.num_volumes, strict=True):
        if volumes.dtype != np.uint8 or volumes.shape[1:] != (size, size, size):
            raise FeatureTableError(
                f"{file}: {split}_images is {volumes.dtype} {volumes.shape}; {known.python_class} of size={size} is "
                f"uint8 (n, {size}, {size}, {size})"
            )
        if classes.shape != (len(volumes), 1) or not np.isin(classes, np.arange(len(known.classes))).all():
            raise FeatureTableError(
                f"{file}: {split}_labels, {classes.shape}, should be ({len(volumes)}, 1) of 0 to "
                f"{len(known.classes) - 1}: is it of another data set?"
            )
        if len(volumes) != official:
            logger.warning("%s: %d volumes in %s, the official split has %d", file, len(volumes), split, official)
    splits = [split for split, volumes in zip(SPLITS, images, strict=True) for _ in volumes]
    return np.concatenate(images), np.concatenate(labels)[:, 0].astype(np.int64), splits
