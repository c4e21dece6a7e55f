"""Radiomics of a table of masks against MIRP, called on the scan and the mask of one lesion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.masks import lesions_from_masks
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.evaluation.embedding import embed_source
from fmcib_ssl.evaluation.embedding_sources import radiomics_encoder
from fmcib_ssl.types import Preprocessing

#: Label, centre z, y, x and radius: label 1 has two pieces, label 2 is beside the first of them.
BALLS = [(1, (12, 12, 12), 3.2), (1, (24, 32, 30), 2.3), (2, (12, 12, 19), 2.8)]


def test_lesions_of_masks_have_the_features_that_mirp_gives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirp = pytest.importorskip("mirp")
    at, labels = np.indices((34, 42, 40)), np.zeros((34, 42, 40), np.uint8)
    is_ball = [np.square(at - np.reshape(c, (3, 1, 1, 1))).sum(0) < radius**2 for _, c, radius in BALLS]
    hu = np.random.default_rng(0).normal(-700, 30, labels.shape)
    for (label, _, radius), ball in zip(BALLS, is_ball, strict=True):
        labels[ball] = label
        hu += 250 * radius * ball
    hu = hu.round()
    for name, values in (("scan", hu.astype(np.int16)), ("mask", labels)):
        sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / f"{name}.nii.gz"))
    pd.DataFrame({"image_path": ["scan.nii.gz"], "mask_path": ["mask.nii.gz"]}).to_csv(tmp_path / "masks.csv")
    lesions = lesions_from_masks(tmp_path / "masks.csv")
    pd.concat([lesions, lesions[:1].assign(mask_path=np.nan, coordX=5.0)]).to_csv(tmp_path / "lesions.csv", index=False)
    prepare_store(read_annotations(tmp_path / "lesions.csv"), tmp_path / "store", num_workers=0)

    encoder = radiomics_encoder(Preprocessing((24, 24, 24)))
    table = embed_source(encoder, {"kind": "store", "path": str(tmp_path / "store")})

    assert "no mask_path" in caplog.text
    assert len(table) == len(BALLS)
    for (label, center, _), ball in zip(BALLS, is_ball, strict=True):
        (expected,) = mirp.extract_features(
            image=hu.astype(np.float32), mask=ball.astype(np.uint8), image_modality="ct",
            base_discretisation_method="fixed_bin_size", base_discretisation_bin_width=25.0,
            resegmentation_intensity_range=[-1000.0, 3000.0],
        )  # fmt: skip
        row = np.square(table.lesions[["coordZ", "coordY", "coordX"]] - center).sum(axis=1).argmin()
        assert float(table.lesions["region"].iloc[row]) == label
        oracle = expected[table.provenance["feature_names"]].iloc[0].to_numpy(np.float64)
        assert len(oracle) > 150
        np.testing.assert_allclose(table.features[row], oracle, rtol=1e-3, atol=1e-4)
