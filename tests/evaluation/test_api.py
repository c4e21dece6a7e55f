"""What `fmcib_ssl` offers a notebook gives what the commands give; the examples of its docstrings run as they stand."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from embedded_archive import PATCH_ZYX, Archive, make_archive, make_encoder
from torch import nn

import fmcib_ssl
from fmcib_ssl import api
from fmcib_ssl.evaluation import Inference, embed_to_file
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.types import Preprocessing, UserError


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """With the names that the docstrings use, in the working directory."""
    made = make_archive(tmp_path / "ct")
    (tmp_path / "ct").rename(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    Path("lesions.csv").rename("my.csv")
    make_encoder(Path("encoder.safetensors"))
    return Archive(Path("my.csv").absolute(), Path(made.store.name).absolute())


def test_importing_the_package_imports_neither_torch_nor_pandas() -> None:
    code = "import sys, fmcib_ssl; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules); print(dir(fmcib_ssl))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in fmcib_ssl.__all__)


@pytest.mark.parametrize("name", ["prepare", "embed", "load_encoder"])
def test_examples_of_the_docstrings(name: str, archive: Archive) -> None:
    names = {"fmcib_ssl": fmcib_ssl, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(fmcib_ssl, name), name, globs=names)
    assert len(example.examples) >= 3
    assert doctest.DocTestRunner().run(example).failed == 0


def test_store_csv_and_data_frame_give_the_commands_features(archive: Archive) -> None:
    encoder = api.frozen_encoder("encoder.safetensors")
    embed_to_file(encoder, archive.store_source, "features.parquet", Inference(device="cpu"), progress=False)
    expected = FeatureTable.read("features.parquet")
    frame = pd.read_csv(archive.table)
    for lesions in (archive.store, "my.csv", frame):
        for network in (fmcib_ssl.load_encoder("encoder.safetensors"), encoder):
            table = fmcib_ssl.embed(network, lesions, inference=Inference(device="cpu"))
            np.testing.assert_array_equal(table.features, expected.features)
            assert table.lesions["PatientID"].tolist() == frame["PatientID"].tolist()
    fewer = fmcib_ssl.embed(encoder, frame.iloc[[2, 1, 0]].assign(malignant=["yes", "no", "no"]))
    np.testing.assert_array_equal(fewer.features, expected.features[[2, 1, 0]])
    assert fewer.lesions["malignant"].tolist() == ["yes", "no", "no"]
    assert len(list(Path("data/stores").glob("table-*.csv"))) == 1  # the scans are prepared once


def test_a_frame_is_prepared_as_its_file(archive: Archive) -> None:
    frame = pd.read_csv(archive.table).assign(PatientID=[f"00{n}" for n in range(7)])
    frame.loc[3, "image_path"] = "absent.nii.gz"
    summary = fmcib_ssl.prepare(frame, "frame_store", num_workers=0)
    assert summary.num_lesions == 6 and summary.rejected["image_path"].tolist() == ["absent.nii.gz"]
    patches = fmcib_ssl.LesionPatches("frame_store", PATCH_ZYX)
    assert patches.lesions["PatientID"].tolist() == ["000", "001", "002", "004", "005", "006"]
    same = fmcib_ssl.LesionPatches(archive.store, PATCH_ZYX)
    assert bool((patches[0]["positive"] == same[0]["positive"]).all())


def test_encoders_that_cannot_be_used(archive: Archive) -> None:
    plain = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten())
    with pytest.raises(UserError, match=r"set encoder\.preprocessing = fmcib_ssl\.types\.Preprocessing"):
        fmcib_ssl.embed(plain, archive.store)
    plain.preprocessing = Preprocessing(PATCH_ZYX)  # type: ignore[assignment]
    assert fmcib_ssl.embed(plain, archive.store).features.shape == (7, 8)
    with pytest.raises(UserError, match="no folder of a run with weights"):
        fmcib_ssl.embed("store", archive.store)
