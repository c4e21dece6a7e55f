"""Points that are no tumour: deep in the body, and away from every lesion."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from tumour_points import background


def test_points_lie_in_the_body_and_away_from_tumours(tmp_path: Path) -> None:
    """Checked by brute force on a block of soft tissue with a cavity of air, voxels of 2 x 2 x 4 mm."""
    hu = np.full((40, 80, 80), -1000, np.int16)
    hu[2:-2, 5:-5, 5:-5] = 40
    mask = np.zeros(hu.shape, np.uint8)
    mask[18:22, 30:50, 30:50] = 1
    for name, voxels in (("scan", hu), ("mask", mask)):
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((2.0, 2.0, 4.0))
        image.SetOrigin((-30.0, 10.0, 5.0))
        sitk.WriteImage(image, tmp_path / f"{name}.nii.gz")
    lesion = np.array([[50.0, 90.0, 85.0]])  # the middle of the mask
    points = background(tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz", lesion, 20)
    assert points.shape == (20, 3)
    assert np.array_equal(points, background(tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz", lesion, 20))
    assert np.linalg.norm(points - lesion, axis=1).min() >= 40
    index = np.rint((points - (-30, 10, 5)) / (2, 2, 4)).astype(int)[:, ::-1]
    for grid, distance in ((hu > -500, 15), (mask == 0, 10)):
        places = np.argwhere(~grid) * (4, 2, 2)
        nearest = np.linalg.norm(places[None] - (index * (4, 2, 2))[:, None], axis=2).min(axis=1)
        assert nearest.min() >= distance - 4  # the opening of the body takes its corners away
