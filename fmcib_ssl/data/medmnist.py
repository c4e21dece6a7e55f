"""MedMNIST 3D as scans and a table: data sets of CT crops with official splits and labels, for the usual way.

The volumes are 8-bit grey values, so HU come back only as far as the window of the data set is known; `DATASETS` says
which is taken, docs/medmnist.md why.

Source: Yang et al., MedMNIST v2, Scientific Data 10, 41, 2023, doi:10.1038/s41597-022-01721-8.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
from tqdm import tqdm

from fmcib_ssl.data.tables import AnnotationsError
from fmcib_ssl.io import write_atomically

SPLITS = ("train", "val", "test")
#: Patient coordinates along an edge of the volume, mm: what a patch of 50 voxels of 1 mm shows.
EDGE_MM = 50.0


class MedMNIST3D(NamedTuple):
    """What is known of a data set: kind of label, HU that the grey values 0 and 255 are taken for, names of classes."""

    task: Literal["binary", "multiclass"]
    window_hu: tuple[float, float]
    classes: tuple[str, ...]


DATASETS = {
    # No window is published; this one the first author took for lung nodules, at 1 mm and 8 bits too (DenseSharp).
    "nodulemnist3d": MedMNIST3D("binary", (-1024, 400), ("benign", "malignant")),
    # "An abdominal window", without its bounds; these are customary ones, level 40 and width 400.
    "organmnist3d": MedMNIST3D(
        "multiclass",
        (-160, 240),
        ("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart", "lung-right",
         "lung-left", "spleen", "pancreas"),
    ),
    # A mask of the gland, no CT: shown as soft tissue in the fat that lies round it.
    "adrenalmnist3d": MedMNIST3D("binary", (-100, 40), ("normal", "hyperplasia")),
}  # fmt: skip


def import_medmnist(
    file: Path, output: Path, *, window_hu: tuple[float, float] | None = None, edge_mm: float = EDGE_MM
) -> pd.DataFrame:
    """Write the volumes of a MedMNIST file as NIfTI below `output`, and `lesions.csv`; what is there is kept.

    The table has `image_path`, `cropped` (true: the middle of a volume is its lesion), `split`, `label`, `label_name`
    and `volume` (data set, size, split and row of the file). No patient is named by MedMNIST.

    Args:
        file: `nodulemnist3d.npz` (28 voxels an edge), `nodulemnist3d_64.npz` and so on, as the package names them.
        output: folder; made if there is none.
        window_hu: HU of the grey values 0 and 255, if not those of `DATASETS`.
        edge_mm: of the cube that a volume is taken for; with the edge of an encoder's patch in mm the volume fills it.

    Raises:
        AnnotationsError: no such file, or not one of these data sets.
    """
    dataset = file.stem.partition("_")[0]
    if dataset not in DATASETS:
        raise AnnotationsError(f"{file}: is none of {', '.join(f'{name}.npz' for name in DATASETS)}")
    low, high = window_hu or DATASETS[dataset].window_hu
    if not -1024 <= low < high <= 32767 or edge_mm <= 0:
        raise AnnotationsError(
            f"window_hu={low:g},{high:g} edge_mm={edge_mm:g}: give the HU of 0 and of 255, from -1024"
        )
    rows = []
    for split, images, labels in _read(file, dataset):
        for number in tqdm(range(len(images)), split, unit="volume", disable=None):
            path = Path("scans") / f"{split}_{number:04d}.nii.gz"
            if not (output / path).is_file():
                hu = np.rint(low + images[number].astype(np.float32) * ((high - low) / 255)).astype(np.int16)
                _write_scan(output / path, hu, edge_mm / len(hu))
            rows.append({
                "image_path": path.as_posix(),
                "cropped": True,
                "split": split,
                "label": int(labels[number]),
                "label_name": DATASETS[dataset].classes[labels[number]],
                "volume": f"{dataset}_{images.shape[1]}/{split}/{number:04d}",
            })  # fmt: skip
    table = pd.DataFrame(rows)
    write_atomically(output / "lesions.csv", table.to_csv(index=False))
    return table


def _write_scan(path: Path, hu_zyx: npt.NDArray[np.int16], spacing_mm: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(hu_zyx)
    image.SetSpacing([spacing_mm] * 3)
    partial = path.with_name(f".{path.name}")
    sitk.WriteImage(image, str(partial))
    partial.replace(path)


def _read(file: Path, dataset: str) -> list[tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Splits with their volumes and labels."""
    if not file.is_file():
        raise AnnotationsError(f"{file}: there is no such file; get it from https://doi.org/10.5281/zenodo.10519652")
    num_classes, parts = len(DATASETS[dataset].classes), []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for split in SPLITS:
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
                if images.dtype != np.uint8 or images.ndim != 4 or len(set(images.shape[1:])) != 1:
                    raise ValueError(f"{split}_images is {images.dtype} {images.shape}, no 8-bit cubes")
                if labels.shape != (len(images), 1) or not np.isin(labels, np.arange(num_classes)).all():
                    raise ValueError(f"{split}_labels should be ({len(images)}, 1) of 0 to {num_classes - 1}")
                parts.append((split, images, labels[:, 0].astype(np.int64)))
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise AnnotationsError(f"{file} is damaged, or not one of MedMNIST's: {error}; download it again") from error
    return parts
