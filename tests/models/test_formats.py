"""Encoders in the formats of others, each run by the others' own programs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import fmcib_ssl
from fmcib_ssl.models import (
    CenterPooledResNet,
    FormatError,
    encoders,
    export_encoder,
    write_huggingface,
    write_monai_bundle,
    write_program,
)
from fmcib_ssl.types import Preprocessing

OWN = "fmcib_ssl.models.encoders"
SPECS: dict[str, tuple[dict[str, Any], int]] = {
    "small": ({"_target_": f"{OWN}.small_resnet", "widths": [4, 4, 8, 8]}, 16),
    "radial": ({"_target_": f"{OWN}.CenterPooledResNet", "derivatives": True, "point_features": True}, 24),
    "resnet18": ({"_target_": f"{OWN}.monai_resnet", "depth": 18, "conv1_t_stride": 2}, 32),
    "resnet50_wide": ({"_target_": f"{OWN}.monai_resnet", "depth": 50, "widen_factor": 2, "conv1_t_stride": 2}, 50),
}
every_encoder = pytest.mark.parametrize(
    "name", [name if name == "small" else pytest.param(name, marks=pytest.mark.slow) for name in SPECS]
)


def exported(name: str, folder: Path) -> Path:
    """A seeded encoder with running statistics of patches, without which a deep one's features are all 0."""
    spec, side = SPECS[name]
    arguments = {key: value for key, value in spec.items() if key != "_target_"}
    torch.manual_seed(0)
    encoder: nn.Module = getattr(encoders, spec["_target_"].rpartition(".")[2])(**arguments)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0  # the statistics are those of one batch
    with torch.no_grad():
        encoder.train()(torch.rand(2, 1, side, side, side) * 0.4)
    preprocessing = Preprocessing((side,) * 3, window_hu=(-900.0, 400.0))
    export_encoder(encoder, spec, preprocessing, folder / "encoder.safetensors", extra={"run": "demo", "seed": 3})
    return folder / "encoder.safetensors"


@every_encoder
def test_programs_give_the_encoders_features_for_any_batch(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder: Any = fmcib_ssl.load_encoder(exported(name, tmp_path))
    write_program(encoder, tmp_path / "e.onnx")
    write_program(encoder, tmp_path / "e.pt2")
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "e.pt2").module()
    for batch in (1, 5):
        patches = torch.rand(batch, 1, *encoder.preprocessing.patch_size_zyx) * 0.4
        with torch.no_grad():
            expected = encoder(patches)
            assert expected.abs().max() > 0
            assert torch.allclose(program(patches), expected, atol=1e-6)
        features = session.run(None, {"patches": patches.numpy()})[0]
        # Deviations of the radial encoder are differences of large squares, which float32 rounds; in a deep network it
        # rounds as much in torch, whose own error float64 shows.
        tolerance, truth = (1e-4 if name == "radial" else 1e-5), expected
        if name == "resnet50_wide":
            with torch.no_grad():
                truth = copy.deepcopy(encoder).double()(patches.double())
        own_error = float((expected - truth).abs().max())
        largest = max(tolerance * float(expected.abs().max().clamp_min(1)), 3 * own_error)
        assert np.abs(features - truth.numpy()).max() <= largest


def test_a_network_that_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class DataDependent(CenterPooledResNet):
        def forward(self, patches: torch.Tensor, *, learned_only: bool = False) -> torch.Tensor:
            return patches.flatten(1) if float(patches.sum()) > 0 else patches.flatten(1) * 2

    encoder: Any = DataDependent(widths=[4, 8])
    encoder.preprocessing = Preprocessing((16, 16, 16))
    with pytest.raises(FormatError, match="cannot export DataDependent"):
        write_program(encoder, tmp_path / "e.pt2")


def test_monai_verifies_the_bundle_and_runs_it_on_points_in_a_scan(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    import nibabel as nib
    from monai.bundle import run, verify_metadata, verify_net_in_out

    file = exported("small", tmp_path)
    encoder: Any = fmcib_ssl.load_encoder(file)
    bundle = tmp_path / "bundle"
    write_monai_bundle(encoder, file, bundle, name="demo", licence="mit")
    meta, config = bundle / "configs" / "metadata.json", bundle / "configs" / "inference.json"
    # The keys that MONAI's published schema requires; the schema itself is not to be had offline.
    required = ["version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"]
    required += ["description", "authors", "copyright", "network_data_format"]
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": required}))
    verify_metadata(meta_file=str(meta), filepath=str(schema))
    verify_net_in_out(
        "network_def", meta_file=str(meta), config_file=str(config), bundle_root=str(bundle), device="cpu"
    )

    rng = np.random.default_rng(0)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # indices grow towards L, P, S
    nib.save(nib.Nifti1Image(rng.integers(-800, 300, (40, 40, 30)).astype(np.int16), affine), tmp_path / "ct.nii.gz")  # type: ignore[attr-defined,no-untyped-call]
    table = tmp_path / "points.csv"
    table.write_text("image_path,coordX,coordY,coordZ\nct.nii.gz,20,20,15\nct.nii.gz,10,25,12\n")
    run(
        config_file=str(config), meta_file=str(meta), bundle_root=str(bundle), annotations=str(table),
        output=str(tmp_path / "features.parquet"),
    )  # fmt: skip
    found = fmcib_ssl.embed(encoder, table, stores=tmp_path / "stores").features
    image = nib.load(tmp_path / "ct.nii.gz").get_fdata()  # type: ignore[attr-defined]
    hu = np.stack([image[x - 8 : x + 8, y - 8 : y + 8, z - 8 : z + 8].T for x, y, z in ((20, 20, 15), (10, 25, 12))])
    with torch.no_grad():
        expected = encoder(encoder.preprocessing.normalize(torch.from_numpy(hu[:, None].astype(np.int16))))
    from fmcib_ssl.evaluation import FeatureTable

    for features in (found, FeatureTable.read(tmp_path / "features.parquet").features):
        np.testing.assert_allclose(features, expected.numpy(), atol=1e-5)


def test_a_model_card_says_what_is_known(tmp_path: Path) -> None:
    file = exported("small", tmp_path)
    encoder: Any = fmcib_ssl.load_encoder(file)
    digest = "0" * 64
    run = {"finished": {"time": "2026-01-02"}, "started_from": {"encoder": {"file": "/secret/p.pt", "sha256": digest}}}
    settings = {"loss": {"_target_": "fmcib_ssl.losses.InfoNCELoss", "temperature": 0.07}, "data": {"store": "/secret"}}
    row = {
        "task": "texture",
        "features": "demo",
        "probe": "logistic",
        "metric": "AUC",
        "value": 0.8,
        "low": 0.7,
        "high": 0.9,
    }
    write_huggingface(
        encoder, file, tmp_path / "hub", name="demo", licence="mit", description="993 nodules of LIDC.",
        run=run, settings=settings, results=[row],
    )  # fmt: skip
    assert fmcib_ssl.load_encoder(tmp_path / "hub" / "encoder.safetensors").spec == encoder.spec
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert Preprocessing.from_dict(config["preprocessing"]) == encoder.preprocessing
    card = (tmp_path / "hub" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "fmcib_ssl"
    for words in (
        "| texture | demo | logistic | AUC | 0.800 (0.700 to 0.900) |", "993 nodules of LIDC.",
        "InfoNCELoss: temperature 0.07", f"p.pt (a run), SHA-256 {digest}", "HU clamped to -900 to 400",
    ):  # fmt: skip
        assert words in card
    assert "/secret" not in card
