"""Encoders there and back again, and files that are not what they claim."""

from __future__ import annotations

import json
import pickle
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fmcib_ssl.models import EncoderFileError, encoder_metadata, encoders, export_encoder, load_encoder
from fmcib_ssl.types import Preprocessing

OWN = "fmcib_ssl.models.encoders"
SPECS: list[dict[str, Any]] = [
    *({"_target_": f"{OWN}.monai_resnet", "depth": depth, "widen_factor": 0.25} for depth in (10, 18, 34, 50, 101)),
    {"_target_": f"{OWN}.monai_resnet", "depth": 50, "widen_factor": 0.5, "conv1_t_stride": 2, "no_max_pool": True},
    {"_target_": f"{OWN}.small_resnet"},
    {"_target_": f"{OWN}.small_resnet", "widths": [4, 8, 8, 16], "conv1_t_size": 5},
    *({"_target_": f"{OWN}.video_resnet", "name": name} for name in ("r3d_18", "mc3_18", "r2plus1d_18")),
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


def test_padding_travels_with_the_weights_and_files_without_it_are_as_before(tmp_path: Path) -> None:
    for pre in (LUNG, replace(LUNG, padding="edge")):
        export_encoder(build(SMALL), SMALL, pre, tmp_path / "e.safetensors")
        assert load_encoder(tmp_path / "e.safetensors").preprocessing == pre
    assert "padding" not in LUNG.to_dict() and Preprocessing.from_dict(LUNG.to_dict()).padding == "constant"


def test_half_precision_is_exported_in_single(tmp_path: Path) -> None:
    encoder = build(SMALL).to(torch.bfloat16)
    export_encoder(encoder, SMALL, LUNG, tmp_path / "e.safetensors")
    loaded = load_encoder(tmp_path / "e.safetensors")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in encoder.float().state_dict().items())


def test_file_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    export_encoder(build(SMALL), SMALL, LUNG, path, extra={"run": "phantom", "step": 12})
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["fmcib_ssl"])
    assert metadata["encoder"] == SMALL
    assert metadata["extra"] == {"run": "phantom", "step": 12}
    assert metadata["feature_dim"] == 8
    assert metadata["preprocessing"]["patch_size_zyx"] == [16, 18, 20]
    assert metadata["versions"]["torch"] == torch.__version__


def test_file_is_as_readable_as_any_other(exported: Path) -> None:
    other = exported.with_name("other")
    other.touch()
    assert stat.S_IMODE(exported.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_failed_export_leaves_the_old_file_and_nothing_else(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = exported.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        export_encoder(build(SMALL), SMALL, LUNG, exported)
    assert exported.read_bytes() == before
    assert list(exported.parent.iterdir()) == [exported]


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


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the description in an exported file, which has no digest then, as those of earlier versions."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["fmcib_ssl"])
    metadata.pop("digest", None)
    change(metadata)
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, metadata={"fmcib_ssl": json.dumps(metadata)})


@pytest.mark.parametrize(
    "target", ["os.system", "torch.hub.load", f"{OWN}.feature_dim", f"{OWN}.nn.Linear", "small_resnet", "", None, ["a"]]
)
def test_foreign_targets_are_refused(exported: Path, target: object) -> None:
    rewrite(exported, lambda metadata: metadata["encoder"].update(_target_=target))
    with pytest.raises(EncoderFileError, match=r"not one of fmcib_ssl's.*trusted_targets"):
        load_encoder(exported)


def test_trusted_targets_are_built(tmp_path: Path) -> None:
    spec = {
        "_target_": "monai.networks.nets.DenseNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 5,
        "init_features": 4,
        "growth_rate": 2,
        "block_config": [1, 1],
    }
    load = lambda: load_encoder(tmp_path / "e.safetensors", trusted_targets=[str(spec["_target_"])])  # noqa: E731
    from monai.networks.nets import DenseNet

    encoder = DenseNet(**{key: value for key, value in spec.items() if key != "_target_"})
    export_encoder(encoder, spec, Preprocessing((32, 32, 32)), tmp_path / "e.safetensors")
    with pytest.raises(EncoderFileError, match=r"trusted_targets=\['monai\.networks\.nets\.DenseNet'\]"):
        load_encoder(tmp_path / "e.safetensors")
    patches = torch.rand(2, 1, 32, 32, 32)
    assert torch.equal(load()(patches), encoder.eval()(patches))
    for gone in ("monai.networks.nets.NoSuchNet", "no_such_package.Net", "Net"):
        rewrite(tmp_path / "e.safetensors", lambda metadata, gone=gone: metadata["encoder"].update(_target_=gone))
        with pytest.raises(EncoderFileError, match="cannot be imported"):
            load_encoder(tmp_path / "e.safetensors", trusted_targets=[gone])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["encoder"].update(widths=[4, 4, 8, 16]), "does not fit the weights.*layer4"),
        (lambda m: m["encoder"].update(depth=3), "does not fit.*depth"),
        (lambda m: m.update(format_version=2), "format version 2.*newer"),
        (lambda m: m.pop("encoder"), "damaged.*encoder"),
        (lambda m: m.pop("preprocessing"), "damaged.*preprocessing"),
        (lambda m: m["preprocessing"].update(colour="red"), "damaged.*colour"),
        (lambda m: m["preprocessing"].update(padding="mirror"), "damaged.*mirror.*constant, edge"),
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


def test_missing_weight_is_an_error(exported: Path) -> None:
    rewrite(exported, lambda metadata: None)
    with safetensors.safe_open(exported, framework="pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(exported)
    del weights["conv1.weight"]
    safetensors.torch.save_file(weights, exported, metadata=metadata)
    with pytest.raises(EncoderFileError, match=r"conv1\.weight"):
        load_encoder(exported)


def test_files_that_are_something_else_are_named(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_encoder(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_encoder(tmp_path)
    path = tmp_path / "thing"
    whole = exported.read_bytes()
    for content in (b"", b"P", b"hello, world", whole[:4], whole[:100], whole[:-10], whole[5:]):
        path.write_bytes(content)
        with pytest.raises(EncoderFileError, match="neither a whole safetensors file"):
            load_encoder(path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(EncoderFileError, match="fmcib_ssl did not write it"):
        load_encoder(path)
    for description in ("{", "[]", "3"):
        safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata={"fmcib_ssl": description})
        with pytest.raises(EncoderFileError, match=r"damaged|format version"):
            load_encoder(path)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_checkpoints_that_are_something_else_are_named(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.ckpt", tmp_path / "trace"
    good = checkpoint_of(build(SMALL), SMALL)

    torch.save({**good, "callbacks": Payload(trace)}, path)
    with pytest.raises(EncoderFileError, match="nothing but weights and plain values"):
        load_encoder(path)
    path.write_bytes(b"PK" + pickle.dumps(Payload(trace)))
    with pytest.raises(EncoderFileError, match="not a checkpoint"):
        load_encoder(path)
    assert not trace.exists()

    torch.save(good, path)
    whole = path.read_bytes()
    for length in (2, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(EncoderFileError, match="not a whole one"):
            load_encoder(path)

    for other in ({"state_dict": {}}, {"fmcib_ssl": good["fmcib_ssl"]}, torch.ones(2), [1]):
        torch.save(other, path)
        with pytest.raises(EncoderFileError, match="not a checkpoint of fmcib_ssl"):
            load_encoder(path)
    torch.save({**good, "fmcib_ssl": {}}, path)
    with pytest.raises(EncoderFileError, match="format version None"):
        load_encoder(path)
    torch.save({**good, "state_dict": {}}, path)
    with pytest.raises(EncoderFileError, match="does not fit the weights"):
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
