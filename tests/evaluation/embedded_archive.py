"""Three small scans of noise with lesions, as files and as a store, and an encoder for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.evaluation.embedding_sources import FrozenEncoder, trained_encoder
from fmcib_ssl.models import export_encoder, small_resnet
from fmcib_ssl.types import Preprocessing

PATCH_ZYX = (10, 12, 14)
SHAPE_ZYX = (24, 30, 32)
#: Scan, and the point's voxel z, y, x; not in the order of the scans, and some near a border.
LESIONS = [
    (1, (12, 15, 16)),
    (0, (10, 14, 20)),
    (2, (2, 3, 4)),
    (1, (8, 20, 9)),
    (0, (22, 28, 30)),
    (2, (12, 12, 12)),
    (1, (15, 9, 21)),
]


class Archive(NamedTuple):
    table: Path
    store: Path

    @property
    def store_source(self) -> dict[str, Any]:
        return {"kind": "store", "path": str(self.store)}

    @property
    def scans_source(self) -> dict[str, Any]:
        return {"kind": "scans", "annotations": str(self.table), "stores": str(self.table.parent / "stores")}


def make_archive(folder: Path) -> Archive:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for scan in range(3):
        image = sitk.GetImageFromArray(rng.integers(-900, 300, SHAPE_ZYX).astype(np.int16))
        image.SetOrigin((-10.0, 5.0, 100.0 * scan))
        sitk.WriteImage(image, str(folder / f"scan{scan}.nii.gz"))
    rows = [
        {
            "image_path": f"scan{scan}.nii.gz",
            "coordX": x - 10.0,
            "coordY": y + 5.0,
            "coordZ": z + 100.0 * scan,
            "PatientID": f"patient {scan}",
            "label": number % 2,
            "diameter_mm": np.nan if number == 3 else 4.5 + number,
            "suspect": number > 4,
            "features": "a name that is ours",
        }
        for number, (scan, (z, y, x)) in enumerate(LESIONS)
    ]
    table = folder / "lesions.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    prepare_store(read_annotations(table), folder / "store", num_workers=0)
    return Archive(table, folder / "store")


def make_encoder(path: Path) -> FrozenEncoder:
    spec = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder = small_resnet([4, 4, 8, 8])
    export_encoder(encoder, spec, Preprocessing(PATCH_ZYX), path)
    return trained_encoder(path)
