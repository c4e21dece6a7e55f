"""Nodules that come as a file each, into a store: every file accounted for, every point in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fmcib_ssl.data import importers
from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.data.store import Store

COORDINATES = ["coordX", "coordY", "coordZ"]


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 25])
@pytest.mark.parametrize("located", ["point", "no point"])
def test_crops_become_a_store(real_data: Path, tmp_path: Path, located: str, every: int) -> None:
    root = real_data / "lidc_crops"
    rows = importers.lidc_crops(root / "voi_index.csv").iloc[::every]
    rows = rows if located == "point" else rows.drop(columns=COORDINATES)
    rows.to_csv(tmp_path / "lesions.csv", index=False)
    prepare_store(read_annotations(tmp_path / "lesions.csv", root), tmp_path / "store", image_root=root, num_workers=0)
    store = Store(tmp_path / "store")
    assert len(store.lesions) == len(store.scans) == len(rows) == -(-994 // every)
    assert sorted(store.lesions["image_path"]) == sorted(rows["image_path"])
    assert store.lesions["suspect"].sum() == rows["suspect"].sum()
    for lesion in store.lesions.to_dict("records"):
        image = sitk.ReadImage(str(root / lesion["image_path"]))
        if located == "point":
            point = [lesion[column] for column in COORDINATES]
        else:
            point = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
        center = np.array([lesion[f"center_{axis}"] for axis in "zyx"])
        grid = store.grid(lesion["scan_id"])
        np.testing.assert_allclose(grid.to_lps_mm(center), point, atol=1e-3)
        voxel = np.rint(center).astype(int)
        x, y, z = grid.to_lps_mm(voxel).tolist()
        expected = sitk.Cast(image, sitk.sitkFloat32).EvaluateAtPhysicalPoint((x, y, z), sitk.sitkLinear)
        assert store.read_patch(lesion["scan_id"], voxel, (1, 1, 1)).item() == pytest.approx(
            max(expected, -1024), abs=2
        )
