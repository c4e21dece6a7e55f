"""Encoders there and back again, and files that are not what they claim."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from monai.networks.nets import DenseNet
from torch import nn

from fmcib_ssl.models import EncoderFileError, encoder_metadata, encoders, export_encoder, load_encoder
from fmcib_ssl.types import Preprocessing

OWN = "fmcib_ssl.models.encoders"
SPECS: list[dict[str, Any]] = [
    *({"_target_": f"{OWN}.monai_resnet", "depth": depth, "widen_factor": 0.25} for depth in (10, 34)),
    {"_target_": f"{OWN}.monai_resnet", "depth": 50, "widen_factor": 0.5, "conv1_t_stride": 2, "no_max_pool": True},
    {"_target_": f"{OWN}.small_resnet"},
    {"_target_": f"{OWN}.small_resnet", "widths": [4, 8, 8, 16], "conv1_t_size": 5},
    {"_target_": f"{OWN}.video_resnet", "name": "mc3_18"},
    {"_target_": f"{OWN}.CenterPooledResNet", "widths": [4, 8]},
]
SMALL: dict[str, Any] = {"_target_": f"{OWN}.small_resnet", "widths": [4, 4, 8, 8]}
LUNG = Preprocessing(patch_size_zyx=(16, 18, 20), spacing_mm=0.8, hu_scale=2000.0)


def build(spec: dict[str, Any]) -> nn.Module:
    """The encoder of a spec, as if trained: no weight and no statistic at its start."""
    arguments = dict(spec)
    encoder: nn.Module = getattr(encoders, arguments.pop("_target_").rpartition(".")[2])(**arguments)
    for name, value in encoder.state_dict().items():
        if not value.is_floating_point():
            value.add_(3)
        else:
            value.mul_(1 + 0.1 * torch.rand_like(value)).add_(0.1 if name.endswith("running_mean") else 0)
    return encoder


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.safetensors"
    export_encoder(build(SMALL), SMALL, LUNG, path)
    return path


def checkpoint_of(encoder: nn.Module, spec: dict[str, Any]) -> dict[str, Any]:
    """What the training module leaves in a Lightning checkpoint, as far as it matters here."""
    module = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})
    metadata = {**encoder_metadata(encoder, spec, LUNG), "step": 5}
    return {"state_dict": module.state_dict(), "fmcib_ssl": metadata, "epoch": 3, "optimizer_states": [{"state": {}}]}


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: "-".join(str(value) for value in spec.values()).removeprefix(OWN)
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_there_and_back_again(spec: dict[str, Any], kind: str, tmp_path: Path) -> None:
    encoder, path = build(spec).train(), tmp_path / "sub" / f"encoder.{kind}"
    if kind == "ckpt":
        path.parent.mkdir()
        torch.save(checkpoint_of(encoder, spec), path)
    else:
        export_encoder(encoder, spec, LUNG, path)
    assert encoder.training
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loaded = load_encoder(path)
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.preprocessing == LUNG
    assert not any(module.training for module in loaded.modules())
    expected_state, found_state = encoder.state_dict(), loaded.state_dict()
    assert expected_state.keys() == found_state.keys()
    assert all(torch.equal(found_state[name], value) for name, value in expected_state.items())
    patches = torch.rand(2, 1, 16, 18, 20)
    with torch.no_grad():
        features = loaded(patches)
        assert torch.equal(features, encoder.eval()(patches))
    assert features.shape == (2, loaded.feature_dim)
    assert features.isfinite().all()


def test_patches_of_another_size_are_refused_unless_they_are_meant(exported: Path) -> None:
    encoder = load_encoder(exported)
    size = encoder.preprocessing.patch_size_zyx
    for shape in ((2, 1, *size[:2], size[2] + 4), (1, *size), (2, 2, *size)):
        with pytest.raises(ValueError, match=re.escape(f"(batch, {', '.join(map(str, (1, *size)))})")) as refused:
            encoder(torch.zeros(shape))
        assert str(shape) in str(refused.value)
    larger = (size[0], size[1], size[2] + 4)
    encoder.preprocessing = replace(encoder.preprocessing, patch_size_zyx=larger)
    assert encoder(torch.zeros(2, 1, *larger)).shape == (2, encoder.feature_dim)


def test_a_file_says_what_it_holds_and_anybody_may_read_it(tmp_path: Path) -> None:
    path, encoder = tmp_path / "e.safetensors", build(SMALL).to(torch.bfloat16)
    preprocessing = replace(LUNG, padding="edge")
    export_encoder(encoder, SMALL, preprocessing, path, extra={"run": "phantom", "step": 12})
    metadata = description(path)
    assert metadata["encoder"] == SMALL and metadata["extra"] == {"run": "phantom", "step": 12}
    assert (metadata["feature_dim"], metadata["versions"]["torch"]) == (8, torch.__version__)
    loaded = load_encoder(path)
    assert loaded.preprocessing == preprocessing
    # Half precision is exported in single.
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in encoder.float().state_dict().items())
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    ("spec", "extra", "message"),
    [
        ({"depth": 10}, {}, "no _target_"),
        (SMALL, {"when": object()}, "plain|only numbers"),
        (SMALL, {"x": float("nan")}, "only"),
    ],
)
def test_what_cannot_be_described_is_not_exported(
    spec: dict[str, Any], extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_encoder(build(SMALL), spec, LUNG, tmp_path / "e.safetensors", extra=extra)
    assert not list(tmp_path.iterdir())


def description(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = json.loads(file.metadata()["fmcib_ssl"])
    return metadata


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], without: str = "") -> None:
    """Change the description in an exported file, which has no digest then, as those of earlier versions."""
    metadata, weights = description(path), safetensors.torch.load_file(path)
    metadata.pop("digest", None)
    change(metadata)
    weights.pop(without, None)
    safetensors.torch.save_file(weights, path, metadata={"fmcib_ssl": json.dumps(metadata)})


@pytest.mark.parametrize(
    "target", ["os.system", "torch.hub.load", f"{OWN}.feature_dim", f"{OWN}.nn.Linear", "small_resnet", None, ["a"]]
)
def test_foreign_targets_are_refused(exported: Path, target: object) -> None:
    rewrite(exported, lambda metadata: metadata["encoder"].update(_target_=target))
    with pytest.raises(EncoderFileError, match=r"not one of fmcib_ssl's.*trusted_targets"):
        load_encoder(exported)


def test_trusted_targets_are_built(tmp_path: Path) -> None:
    path, name = tmp_path / "e.safetensors", "monai.networks.nets.DenseNet"
    options = {"spatial_dims": 3, "in_channels": 1, "out_channels": 5, "init_features": 4, "growth_rate": 2}
    encoder = DenseNet(**options, block_config=[1, 1])
    spec = {"_target_": name, **options, "block_config": [1, 1]}
    export_encoder(encoder, spec, Preprocessing((32, 32, 32)), path)
    with pytest.raises(EncoderFileError, match=r"trusted_targets=\['monai\.networks\.nets\.DenseNet'\]"):
        load_encoder(path)
    patches = torch.rand(2, 1, 32, 32, 32)
    assert torch.equal(load_encoder(path, trusted_targets=[name])(patches), encoder.eval()(patches))
    for absent in ("monai.networks.nets.NoSuchNet", "no_such_package.Net", "Net"):
        rewrite(path, lambda metadata, absent=absent: metadata["encoder"].update(_target_=absent))
        with pytest.raises(EncoderFileError, match="cannot be imported"):
            load_encoder(path, trusted_targets=[absent])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["encoder"].update(widths=[4, 4, 8, 16]), "does not fit the weights.*layer4"),
        (lambda m: m["encoder"].update(depth=3), "does not fit.*depth"),
        (lambda m: m.update(format_version=2), "format version 2.*newer"),
        (lambda m: m.pop("encoder"), "damaged.*encoder"),
        (lambda m: m["preprocessing"].update(colour="red"), "damaged.*colour"),
        (lambda m: m["preprocessing"].update(padding="mirror"), "damaged.*mirror.*constant or edge"),
        (lambda m: m.update(feature_dim="many"), "damaged.*many"),
    ],
)
def test_descriptions_that_do_not_fit_are_named(
    exported: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(exported, change)
    with pytest.raises(EncoderFileError, match="(?s)" + message) as caught:
        load_encoder(exported)
    assert str(exported) in str(caught.value)


def test_files_of_earlier_versions_are_read(exported: Path) -> None:
    weights = load_encoder(exported).state_dict()
    rewrite(exported, lambda metadata: None)
    assert all(torch.equal(value, weights[name]) for name, value in load_encoder(exported).state_dict().items())
    rewrite(exported, lambda metadata: None, without="conv1.weight")
    with pytest.raises(EncoderFileError, match=r"conv1\.weight"):
        load_encoder(exported)


def test_files_that_are_something_else_are_named(tmp_path: Path, exported: Path) -> None:
    for absent in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_encoder(absent)
    path, whole = tmp_path / "thing", exported.read_bytes()
    for content in (b"", b"P", b"hello, world", whole[:100], whole[:-10], whole[5:]):
        path.write_bytes(content)
        with pytest.raises(EncoderFileError, match="damaged, or not an encoder"):
            load_encoder(path)
    for metadata in (None, {"fmcib_ssl": "{"}, {"fmcib_ssl": "[]"}):
        safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(EncoderFileError, match=r"damaged, or not an encoder|format version"):
            load_encoder(path)


def test_checkpoints_that_are_something_else_are_named(tmp_path: Path) -> None:
    path, good = tmp_path / "a.ckpt", checkpoint_of(build(SMALL), SMALL)
    for other, message in (
        ({"state_dict": {}}, "KeyError.*fmcib_ssl"),
        ({"fmcib_ssl": good["fmcib_ssl"]}, "KeyError.*state_dict"),
        ([1], "damaged, or not an encoder"),
        ({**good, "fmcib_ssl": {}}, "format version None"),
        ({**good, "state_dict": {}}, "does not fit the weights"),
    ):
        torch.save(other, path)
        with pytest.raises(EncoderFileError, match=message):
            load_encoder(path)


def test_monai_alone_reads_it_as_the_docs_say(tmp_path: Path) -> None:
    spec = {"_target_": f"{OWN}.monai_resnet", "depth": 10, "widen_factor": 0.25, "conv1_t_stride": 2}
    path = tmp_path / "encoder.safetensors"
    export_encoder(build(spec), spec, LUNG, path)
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = docs.partition("### With MONAI alone\n")[2].partition("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if not line or line[:4] == "    ")
    names: dict[str, Any] = {}
    exec(code.replace("runs/.../encoder.safetensors", str(path)), names)
    patch = torch.randn(1, 1, *LUNG.patch_size_zyx, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(names["network"](patch), load_encoder(path)(patch))
