"""A task of the suite from whole CTs: is a point in a tumour, or elsewhere in the same body?

    python benchmarks/tumour_points.py data=../shared/data output=points
    fmcib-ssl suite tasks=points/tumour_or_not.yaml tables=../shared/data models=... output=suite

Lesions are those of the scans in `ct/chest_abdomen`, `ct/lung_tumours` and `ct/sarcoma`. For each two points are
drawn, a function of the scan: 15 mm deep in the body, 40 mm from every lesion's point, 10 mm from the tumour's mask.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
import yaml
from scipy import ndimage

from fmcib_ssl.io import Command, parse_command, write_atomically

POINT = ["coordX", "coordY", "coordZ"]
#: Tables below `ct/`, and the folder that their paths start from.
TABLES = {
    "chest_abdomen/annotations.csv": "chest_abdomen",
    "annotations.csv": "..",
    "sarcoma/annotations.csv": "sarcoma",
}
NUM_BACKGROUND = 2
DEPTH_MM, FROM_POINT_MM, FROM_MASK_MM = 15.0, 40.0, 10.0
BODY_HU = -500.0


class Points(Command):
    """Where the data are, and where table and task go."""

    data: Path
    output: Path


def background(
    scan: Path, mask: Path | None, lesions_lps_mm: npt.NDArray[np.float64], num: int
) -> npt.NDArray[np.float64]:
    """Points elsewhere in the body, `(num, 3)`, LPS mm."""
    image = sitk.ReadImage(str(scan))
    spacing_zyx = image.GetSpacing()[::-1]
    body = ndimage.binary_opening(sitk.GetArrayFromImage(image) > BODY_HU, iterations=2)
    parts, _ = ndimage.label(body)
    body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    body = np.stack([ndimage.binary_fill_holes(part) for part in body])
    allowed = ndimage.distance_transform_edt(body, sampling=spacing_zyx) >= DEPTH_MM
    if mask is not None:
        outside = sitk.GetArrayFromImage(sitk.ReadImage(str(mask))) == 0
        allowed &= ndimage.distance_transform_edt(outside, sampling=spacing_zyx) >= FROM_MASK_MM
    rng = np.random.default_rng(0)
    voxels = rng.permutation(np.argwhere(allowed))[:2000, ::-1]
    points = np.array([image.TransformIndexToPhysicalPoint(voxel.tolist()) for voxel in voxels])
    apart = np.linalg.norm(points[:, None] - lesions_lps_mm[None], axis=2).min(axis=1)
    return points[apart >= FROM_POINT_MM][:num]


def table_of(data: Path) -> pd.DataFrame:
    """A row a point: `image_path` below `ct`, `PatientID`, the point, and `tumour`, 1 or 0."""
    tables = []
    for name, folder in TABLES.items():
        lesions = pd.read_csv(data / "ct" / name)
        for path, rows in lesions.groupby("image_path", sort=True):
            scan = (data / "ct" / folder / path).resolve()
            masks = [data / "ct" / folder / mask for mask in rows["mask_path"].dropna()]
            points = rows[POINT].to_numpy(float)
            elsewhere = background(scan, masks[0] if masks else None, points, NUM_BACKGROUND * len(points))
            both = pd.DataFrame(np.concatenate([points, elsewhere]).round(3), columns=POINT)
            about = {
                "image_path": scan.relative_to((data / "ct").resolve()).as_posix(),
                "PatientID": rows["PatientID"].iloc[0],
                "tumour": [1] * len(points) + [0] * len(elsewhere),
            }
            tables.append(both.assign(**about))
    return pd.concat(tables, ignore_index=True)


def main(arguments: list[str]) -> None:
    """Write `points.csv` and `tumour_or_not.yaml`."""
    command = parse_command(Points, arguments)
    points = table_of(command.data)
    file = command.output.absolute() / "points.csv"
    write_atomically(file, points.to_csv(index=False))
    task = {
        "title": "Whole CTs, tumour or elsewhere in the body",
        "kind": "binary",
        "label": "tumour",
        "tables": {"all": str(file)},
        "images": "ct",
        "size": [],
        "note": "Points elsewhere are drawn at random in the same scan. What is no tumour has no size.",
    }
    write_atomically(command.output / "tumour_or_not.yaml", yaml.safe_dump(task, sort_keys=False))
    tumours = int(points["tumour"].sum())
    print(
        f"{file}: {tumours} tumours, {len(points) - tumours} points elsewhere, {points['image_path'].nunique()} scans"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
