"""Radiomics of lesions with masks, computed by MIRP: the rival where somebody has drawn every lesion.

MIRP follows the Image Biomarker Standardisation Initiative (IBSI); `pip install "fmcib_ssl[radiomics]"` brings it.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float, Int16
from scipy import ndimage
from torch import Tensor, nn

from fmcib_ssl.data import MASK_COLUMN, PATH_COLUMN, LesionPatches, ScanSource, StoreError, patch_start, read_regions
from fmcib_ssl.types import Preprocessing, ScanError

_read_regions = lru_cache(1)(read_regions)  # lesions are read scan by scan


def radiomics(
    hu: Float[np.ndarray, "z y x"], mask_zyx: Bool[np.ndarray, "z y x"], spacing_mm: float = 1.0
) -> pd.Series[float]:
    """All of MIRP's features of one lesion, 3D, without filters, in bins of 25 HU from -1000, by MIRP's names.

    Args:
        hu: the patch; its voxels are cubes and not resampled.
        mask_zyx: the lesion.
        spacing_mm: edge of a voxel.

    Raises:
        ImportError: MIRP is not installed.
    """
    try:
        from mirp import extract_features  # noqa: PLC0415  # an optional library
    except ImportError as error:
        raise ImportError('radiomics need MIRP: pip install "fmcib_ssl[radiomics]"') from error
    with TemporaryDirectory() as folder, ExitStack() as quiet:
        files = {name: f"{folder}/{name}.nii" for name in ("image", "mask")}
        for file, voxels in zip(files.values(), (hu.astype(np.float32), mask_zyx.astype(np.uint8)), strict=True):
            image = sitk.GetImageFromArray(voxels)
            image.SetSpacing((spacing_mm,) * 3)  # of arrays MIRP takes it to be 1 mm
            sitk.WriteImage(image, file)
        logging.disable(logging.INFO)  # two lines a lesion, by the root logger
        quiet.callback(logging.disable, logging.NOTSET)
        (table,) = extract_features(
            **files, image_modality="ct", resegmentation_intensity_range=[-1000.0, 3000.0],
            base_discretisation_method="fixed_bin_size", base_discretisation_bin_width=25.0,
        )  # fmt: skip
    features: pd.Series[float] = table.iloc[0, table.columns.get_loc("morph_volume") :].astype(np.float64)
    return features


def masked_patch(patches: LesionPatches, index: int) -> Int16[Tensor, "2 z y x"]:
    """A lesion's patch, and 1 in the piece of its mask that is nearest to its point.

    The mask is resampled to the patch linearly, and a voxel counts that lies in it by half.

    Args:
        patches: of lesions with a `mask_path` that starts where their `image_path` does, and a `region` of the mask if
            not all of it is meant, as `fmcib-ssl import-annotations source=masks` writes them.
        index: of the lesion.

    Raises:
        StoreError: no mask, one that cannot be read, or one without a voxel in the patch.
    """
    store, lesion, patch = patches.store, patches.lesions.iloc[index], patches.positive(index)
    scan, region, title = store.scans.loc[lesion["scan_id"]], lesion.get("region"), patches.title(index)
    name = region if region is None or isinstance(region, str) else f"{region:g}"  # a label read as a number
    if not isinstance(mask := lesion.get(MASK_COLUMN), str):
        raise StoreError(f"{title}: no {MASK_COLUMN}, which radiomics need; fill it in")
    file = Path(scan["source"].removesuffix(lesion[PATH_COLUMN])) / mask
    try:
        regions = _read_regions(file, ScanSource(Path(scan["source"]), scan["series_uid"]))
    except ScanError as error:
        raise StoreError(str(error)) from error
    size = patch.shape[1:]
    voxels_zyx = np.moveaxis(np.indices(size), 0, -1)
    start = patch_start(lesion[["center_z", "center_y", "center_x"]].tolist(), size)
    points = store.grid(lesion["scan_id"]).to_lps_mm(voxels_zyx + start)
    inside = np.zeros(size, dtype=bool)
    for one in regions:
        if name in (None, one.name):
            at_zyx = np.moveaxis(one.geometry.to_index_xyz(points)[..., ::-1], -1, 0)
            inside |= ndimage.map_coordinates(one.mask_zyx.astype(np.uint8), at_zyx, np.float32, order=1) >= 0.5
    if not inside.any():
        raise StoreError(f"{file}: no voxel of region {name or 'any'} in the patch of {title}: take a larger patch")
    pieces, _ = ndimage.label(inside, np.ones((3, 3, 3)))
    distance = np.square(voxels_zyx - np.array(size) // 2).sum(-1)
    nearest = pieces.flat[np.where(inside, distance, np.inf).argmin()]
    return torch.cat([patch, torch.from_numpy(pieces == nearest)[None].to(patch.dtype)])


class Radiomics(nn.Module):
    """`radiomics` of normalised patches with masks, `(batch, 2, z, y, x)` to `(batch, features)`.

    Attributes:
        names: of the features.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        at_zyx = np.indices((5, 5, 5))
        ball = np.square(at_zyx - 2).sum(0) < 4
        self.names: list[str] = radiomics(100.0 * at_zyx.sum(0), ball).index.tolist()

    def forward(self, views: Tensor) -> Tensor:
        """One lesion after the other: seconds each."""
        cut = self.preprocessing
        hu = (views.float() * cut.hu_scale - cut.hu_offset).round().cpu().numpy()
        rows = [radiomics(image, mask > 0, cut.spacing_mm) for image, mask in hu]
        return torch.from_numpy(np.array(rows, dtype=np.float32)).to(views.device)
