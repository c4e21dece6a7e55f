"""Published weights: files of the published layouts, with the published networks as oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from monai.networks.nets import DenseNet, SegResNetDS, SwinUNETR, resnet10, resnet18, resnet34, resnet50
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.transforms import NormalizeIntensity, Orientation, ScaleIntensityRange
from torch import Tensor, nn
from torchvision.models import video

import fmcib_ssl
from fmcib_ssl.models import EncoderFileError, PooledNetwork, import_encoder
from fmcib_ssl.models.importing import SOURCES
from fmcib_ssl.types import Preprocessing

WINDOW = {"hu_window": (-1000.0, 400.0), "patch_size_zyx": (16, 16, 16)}


def with_statistics(network: Any) -> Any:
    """Seeded weights as if trained: no running statistic at its start."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.add_(torch.rand(value.shape, generator=generator))
    return network.eval()


def prefixed(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in network.state_dict().items()}


def hu_patches(*size: int) -> Tensor:
    noise = np.random.default_rng(0).normal(-200, 500, (2, 1, *size)).clip(-1024, 3000)
    return torch.from_numpy(noise.round().astype(np.int16))


def features_of(output: Path, hu: Tensor) -> Tensor:
    encoder = fmcib_ssl.load_encoder(output)
    with torch.no_grad():
        features: Tensor = encoder(encoder.preprocessing.normalize(hu))
    return features


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["trunk", "lighter-trunk", "lighter-backbone"])
def test_the_published_cancer_model(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = {"pretrained": False, "n_input_channels": 1, "widen_factor": 2, "conv1_t_stride": 2}
    trunk = with_statistics(resnet50(**published, feed_forward=False, bias_downsample=True))
    assert len(trunk.state_dict()) == 322
    if layout == "trunk":
        checkpoint = {"trunk_state_dict": trunk.state_dict()}
    else:
        module = layout.partition("-")[2]
        heads = {"model.heads.0.0.weight": torch.zeros(2, 4096), "criterion.temperature": torch.ones(())}
        checkpoint = {"state_dict": {**prefixed(trunk, f"model.{module}."), **heads}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "model_weights.torch")
    result = import_encoder(tmp_path / "model_weights.torch", tmp_path / "out.safetensors", "fmcib")
    assert (result.num_keys, result.feature_dim) == (322, 4096)
    hu = hu_patches(50, 50, 50)
    with torch.no_grad():
        expected = trunk(NormalizeIntensity(subtrahend=-1024, divisor=3072)(hu.float()))
    assert torch.equal(features_of(tmp_path / "out.safetensors", hu), expected)


def genesis_layers(decoder: bool) -> nn.Module:
    """The published U-Net's layers under their names, put together by hand; always norms over the batch."""

    def two(first: int, between: int, last: int) -> nn.Module:
        ops = nn.Sequential(*(nn.Module() for _ in range(2)))
        for module, (before, after) in zip(ops, ((first, between), (between, last)), strict=True):
            module.conv1, module.bn1 = nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after)
        level = nn.Module()
        level.ops = ops
        return level

    net = nn.Module()
    for name, *channels in (("64", 1, 32, 64), ("128", 64, 64, 128), ("256", 128, 128, 256), ("512", 256, 256, 512)):
        net.add_module(f"down_tr{name}", two(*channels))
    if decoder:
        net.up_tr64, net.out_tr = two(192, 64, 64), nn.Conv3d(64, 1, 1)
    return net


def genesis_features(net: Any, patch: Tensor) -> Tensor:
    grid = patch
    for number, name in enumerate(("64", "128", "256", "512")):
        grid = nn.functional.max_pool3d(grid, 2) if number else grid
        for layer in getattr(net, f"down_tr{name}").ops:
            norm = layer.bn1
            grid = nn.functional.batch_norm(layer.conv1(grid), None, None, norm.weight, norm.bias, training=True)
            grid = nn.functional.relu(grid)
    return grid.mean((2, 3, 4))


@pytest.mark.parametrize(("source", "container"), [("genesis", "state_dict"), ("suprem_unet", "net")])
def test_u_nets_of_models_genesis_and_suprem(source: str, container: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = with_statistics(genesis_layers(decoder=True))
    prefix = "module." if source == "genesis" else "module.backbone."
    weights = {**prefixed(net, prefix), "organ_embedding": torch.zeros(3)}
    torch.save({container: weights, "epoch": 620}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    output = tmp_path / "out.safetensors"
    result = import_encoder(tmp_path / "w.pt", output, source, patch_size_zyx=(16, 16, 16))
    assert (result.prefix, result.feature_dim, result.num_keys) == (prefix, 512, 56)
    assert {key.removeprefix(prefix).split(".")[0] for key in result.left_out} >= {"up_tr64", "out_tr"}
    hu = hu_patches(16, 16, 16)
    low, high = (-1000, 1000) if source == "genesis" else (-175, 250)
    scaled = ScaleIntensityRange(low, high, 0, 1, clip=True)(hu.float())
    with torch.no_grad():  # x, y, z towards L, P, S: our z, y, x the other way round; one patch at a time
        alone = [genesis_features(net, patch[None].permute(0, 1, 4, 3, 2)) for patch in scaled]
    assert torch.allclose(features_of(output, hu), torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [pytest.param("encoder", marks=pytest.mark.slow), "segresnet"])
def test_ct_fm(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    levels = (1, 2, 2, 4, 4)
    whole = SegResEncoder(blocks_down=levels) if layout == "encoder" else SegResNetDS(blocks_down=levels)
    encoder = with_statistics(whole) if layout == "encoder" else with_statistics(whole).encoder
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "model.safetensors")
    output = tmp_path / "out.safetensors"
    import_encoder(tmp_path / "model.safetensors", output, "ct_fm", patch_size_zyx=(16, 16, 16))
    hu = hu_patches(16, 16, 16)
    with torch.no_grad():
        maps = encoder(ScaleIntensityRange(-1024, 2048, 0, 1, clip=True)(hu.float()))
        expected = nn.functional.adaptive_avg_pool3d(maps[-1], 1).flatten(1)
    assert torch.allclose(features_of(output, hu), expected, atol=1e-6)


@pytest.mark.parametrize("source", ["suprem_swin", "voco_b"])
def test_swin_transformers_of_suprem_and_voco(source: str, tmp_path: Path) -> None:
    pytest.importorskip("einops", reason="MONAI's SwinTransformer needs it")
    torch.manual_seed(0)
    network: Any = SwinUNETR(1, 2, feature_size=48, use_v2=source == "voco_b").eval()
    weights = prefixed(network, "module.backbone.") if source == "suprem_swin" else network.state_dict()
    torch.save({"net": weights} if source == "suprem_swin" else weights, tmp_path / "w.pth")
    output = tmp_path / "out.safetensors"
    result = import_encoder(tmp_path / "w.pth", output, source, patch_size_zyx=(32, 32, 32))
    assert result.feature_dim == 768 and result.prefix.endswith("swinViT.")
    hu = hu_patches(32, 32, 32)
    # Ours are towards S, P, L; theirs towards R, A, S, by MONAI itself.
    ras = torch.stack([Orientation("RAS", labels=None)(_with_affine(patch)) for patch in hu])
    with torch.no_grad():
        expected = network.swinViT(ScaleIntensityRange(-175, 250, 0, 1, clip=True)(ras.float()))[-1].mean((2, 3, 4))
    assert torch.allclose(features_of(output, hu), expected, atol=1e-5)


def _with_affine(patch: Tensor) -> Any:
    from monai.data import MetaTensor

    axes = torch.tensor([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]])  # columns: z, y, x indices in RAS millimetres
    affine = torch.eye(4)
    affine[:3, :3] = axes
    return MetaTensor(patch, affine=affine)


@pytest.mark.parametrize(
    ("depth", "build"),
    [
        (10, resnet10), (18, resnet18),
        pytest.param(34, resnet34, marks=pytest.mark.slow), pytest.param(50, resnet50, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_medicalnet(depth: int, build: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shortcut = {"shortcut_type": "A" if depth in (18, 34) else "B", "bias_downsample": False}
    network = with_statistics(build(n_input_channels=1, conv1_t_stride=2, feed_forward=False, **shortcut))
    decoder = {"module.conv_seg.0.weight": torch.zeros(3)}
    torch.save({"state_dict": {**prefixed(network, "module."), **decoder}}, tmp_path / "w.pth")
    output = tmp_path / "out.safetensors"
    import_encoder(tmp_path / "w.pth", output, f"medicalnet_resnet{depth}", **WINDOW)
    hu = hu_patches(16, 16, 16)
    with torch.no_grad():
        expected = network(ScaleIntensityRange(-1000, 400, 0, 1, clip=True)(hu.float()))
    assert torch.allclose(features_of(output, hu), expected, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["r3d_18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mc3_18", "r2plus1d_18"))]
)
def test_video_weights_see_gray_in_all_three_channels(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = with_statistics(getattr(video, name)(weights=None))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    output = tmp_path / "out.safetensors"
    result = import_encoder(tmp_path / "w.pth", output, f"torchvision_{name}", **WINDOW)
    assert result.left_out == ["fc.weight", "fc.bias"]
    hu = hu_patches(16, 16, 16)
    network.fc = nn.Identity()
    scaled = (ScaleIntensityRange(-1000, 400, 0, 1, clip=True)(hu.float()) - 0.4011) / 0.2222
    with torch.no_grad():
        expected = network(scaled.expand(-1, 3, -1, -1, -1))
    assert torch.allclose(features_of(output, hu), expected, rtol=1e-4, atol=1e-5)


def test_any_network_of_monai_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 6, "block_config": [1, 1]}
    network = with_statistics(DenseNet(**arguments))
    torch.save(network.state_dict(), tmp_path / "w.pt")
    target, output = "monai.networks.nets.DenseNet", tmp_path / "out.safetensors"
    import_encoder(tmp_path / "w.pt", output, "monai", encoder={"_target_": target, **arguments}, **WINDOW)
    with pytest.raises(EncoderFileError, match="trusted_targets"):
        fmcib_ssl.load_encoder(output)
    encoder = fmcib_ssl.load_encoder(output, trusted_targets=[target])
    patches = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(patches), network(patches))


SMALL = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}


def small_weights() -> dict[str, Tensor]:
    return dict(fmcib_ssl.models.small_resnet([4, 4, 8, 8]).state_dict())


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    weights = small_weights()
    gone = weights.pop("layer1.0.conv1.weight")
    weights |= {"layer9.weight": gone, "bn1.weight": torch.zeros(5)}
    torch.save({"state_dict": {f"model.trunk.{key}": value for key, value in weights.items()}}, tmp_path / "w.pt")
    with pytest.raises(EncoderFileError) as refused:
        import_encoder(tmp_path / "w.pt", tmp_path / "out.safetensors", "lighter", encoder=SMALL, **WINDOW)
    for words in ("missing (1): layer1.0.conv1.weight", "unexpected (1): layer9.weight", "bn1.weight (5,), not (4,)"):
        assert words in str(refused.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: {**weights, "bn1.weight": torch.full((4,), torch.nan)}, "bn1.weight holds NaN"),
        (
            lambda weights: {f"{who}.{key}": v for key, v in weights.items() for who in ("student", "teacher")},
            "prefix=",
        ),
        (lambda weights: {"epoch": 3}, "it has epoch"),
        (lambda weights: {"state_dict": weights, "args": Preprocessing()}, "torch.save"),
    ],
    ids=["nan", "two-networks", "no-weights", "pickled-objects"],
)
def test_files_that_are_refused(change: Callable[[dict[str, Tensor]], Any], words: str, tmp_path: Path) -> None:
    torch.save(change(small_weights()), tmp_path / "w.pt")
    with pytest.raises(EncoderFileError, match=words):
        import_encoder(tmp_path / "w.pt", tmp_path / "out.safetensors", "state_dict", encoder=SMALL, **WINDOW)


def test_what_the_user_has_to_say(tmp_path: Path) -> None:
    torch.save(small_weights(), tmp_path / "w.pt")
    for source, options, words in (
        ("fmcip", {}, "must be one of fmcib"),
        ("lighter", WINDOW, "encoder="),
        ("state_dict", {"encoder": SMALL}, "hu_window"),
        ("state_dict", {"encoder": SMALL, **WINDOW, "hu_window": (400.0, -1000.0)}, "lowest HU comes first"),
    ):
        with pytest.raises(ValueError, match=words):
            import_encoder(tmp_path / "w.pt", tmp_path / "out.safetensors", source, **options)


def test_every_source_builds_and_says_where_its_weights_came_from() -> None:
    for name, source in SOURCES.items():
        if source.encoder is not None:
            assert source.citation, name
            target, arguments = source.encoder["_target_"], {k: v for k, v in source.encoder.items() if k != "_target_"}
            with torch.device("meta"):
                assert isinstance(getattr(fmcib_ssl.models, target.rpartition(".")[2])(**arguments), nn.Module)


def test_axes_name_each_direction_once() -> None:
    with pytest.raises(ValueError, match="RAS"):
        PooledNetwork(nn.Identity(), axes="RLS")
