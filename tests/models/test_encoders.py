"""Every encoder of the family and the head, against the libraries they come from and a naive loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from lightly.models.modules.heads import SimCLRProjectionHead
from monai.networks import nets
from torch import Tensor, nn
from torchvision.models import video

from fmcib_ssl.models import CenterPooledResNet, ProjectionHead, feature_dim, monai_resnet, small_resnet, video_resnet

ENCODERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"resnet{depth}": (partial(monai_resnet, depth), 512 if depth < 50 else 2048) for depth in (10, 18, 34, 50, 101)
    },
    "published": (partial(monai_resnet, 50, widen_factor=2, conv1_t_stride=2), 4096),
    "small": (small_resnet, 128),
    "center_pooled": (CenterPooledResNet, (16 + 32 + 64) * 4),
    **{name: (partial(video_resnet, name), 512) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
}
VIDEO = pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_dim_is_found_without_running_anything_for_real(name: str) -> None:
    build, features = ENCODERS[name]
    with torch.device("meta"):  # shapes only
        encoder = build()
    assert feature_dim(encoder, (50, 50, 50)) == feature_dim(encoder, (24, 32, 40)) == features


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "small", "center_pooled", "mc3_18", "r2plus1d_18"])
def test_one_channel_in_features_out_and_every_weight_learns(name: str) -> None:
    build, features = ENCODERS[name]
    encoder = build()
    out = encoder(torch.randn(2, 1, 16, 16, 16))
    assert out.shape == (2, features)
    out.square().mean().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("depth", [10, 18, 34, 50, 101])
def test_weights_are_named_and_shaped_as_monais(depth: int) -> None:
    options = {"widen_factor": 2, "conv1_t_stride": 2}
    with torch.device("meta"):
        ours = monai_resnet(depth, **options)  # type: ignore[arg-type]
        build = getattr(nets, f"resnet{depth}")
        theirs = build(pretrained=False, n_input_channels=1, feed_forward=False, **options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.conv1.stride == theirs.conv1.stride == (2, 2, 2)


def test_monai_options_reach_monai() -> None:
    theirs = nets.resnet18(pretrained=False, n_input_channels=1, feed_forward=False, conv1_t_size=3, no_max_pool=True)
    ours = monai_resnet(18, conv1_t_size=3, no_max_pool=True)
    ours.load_state_dict(theirs.state_dict())
    patches = torch.randn(2, 1, 16, 16, 16)
    torch.testing.assert_close(ours.eval()(patches), theirs.eval()(patches))


@VIDEO
def test_video_network_of_gray_is_torchvisions_of_equal_channels(name: str) -> None:
    theirs = getattr(video, name)(weights=None).eval()
    theirs.fc = nn.Identity()
    ours = video_resnet(name).eval()
    stem, drawn = (network.stem[0].weight.std().item() for network in (theirs, ours))  # type: ignore[union-attr, index]
    assert drawn == pytest.approx(stem, rel=0.1)
    state = theirs.state_dict()
    state["stem.0.weight"] = state["stem.0.weight"].sum(1, keepdim=True)
    ours.load_state_dict(state, strict=True)
    patches = torch.randn(2, 1, 12, 20, 20)
    torch.testing.assert_close(ours(patches), theirs(patches.expand(-1, 3, -1, -1, -1)), rtol=1e-4, atol=1e-4)


def test_center_pooled_features_are_maxima_and_gaussian_means_round_the_point() -> None:
    encoder = CenterPooledResNet((4, 8), sigmas=(2.0, 6.0)).eval()
    patches, grids = torch.rand(2, 1, 8, 10, 12), []
    for stage in (encoder.stem, *encoder.blocks):
        stage.register_forward_hook(lambda _module, _inputs, grid: grids.append(grid))
    with torch.no_grad():
        features = encoder(patches)
    expected: list[list[float]] = [[], []]
    for number, grid in enumerate(grids, start=1):
        cells = list(itertools.product(*map(range, grid.shape[2:])))
        # The centre of a cell in voxels, from the strides; the point is in voxel size // 2.
        distance = [math.dist([i * 2**number for i in cell], (8 // 2, 10 // 2, 12 // 2)) for cell in cells]
        for row, channels in enumerate(grid.double().numpy()):
            expected[row] += [channel.max() for channel in channels]
            for channel in channels:
                for sigma in (2.0, 6.0, math.inf):
                    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in distance]
                    expected[row].append(np.average([channel[cell] for cell in cells], weights=weights))
    np.testing.assert_allclose(features.numpy(), np.array(expected), rtol=1e-3, atol=1e-5)


def test_intensities_outside_every_window_are_clamped() -> None:
    hu = torch.tensor([-3000.0, -1000.0, 1500.0, 3000.0]).view(4, 1, 1, 1, 1).expand(4, 1, 8, 24, 24)
    with torch.no_grad():
        features = CenterPooledResNet((4,)).eval()((hu + 1024) / 3072)
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[2], features[3])
    assert not torch.allclose(features[1], features[2])


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_head_is_simclrs(num_layers: int, batch_norm: bool) -> None:
    hidden = 24 if num_layers == 1 else 12  # lightly's always has a hidden layer
    theirs = SimCLRProjectionHead(24, hidden, 8, num_layers=num_layers, batch_norm=batch_norm)
    ours = ProjectionHead(24, hidden, 8, num_layers=num_layers, batch_norm=batch_norm)
    if num_layers > 1:
        ours.load_state_dict(theirs.state_dict(), strict=True)
        features = torch.randn(16, 24)
        torch.testing.assert_close(ours(features), theirs(features))
        torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))
    linear = [layer for layer in ProjectionHead(24, num_layers=num_layers).layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(24, 24)] * (num_layers - 1) + [(24, 128)]


class Stochastic(nn.Module):
    """Draws in eval mode too, and counts batches in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm3d(1).eval()
        self.norm = nn.BatchNorm3d(1)

    def forward(self, patches: Tensor) -> Tensor:
        return (self.norm(self.frozen(patches)) + torch.randn(1)).flatten(2).mean(2).expand(-1, 3)


def test_feature_dim_leaves_no_trace() -> None:
    encoder = Stochastic()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert feature_dim(encoder, (4, 4, 4)) == 3
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert (encoder.training, encoder.norm.training, encoder.frozen.training) == (True, True, False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: feature_dim(nn.Conv3d(1, 2, 3), (6, 6, 6)), r"Conv3d gives \(2, 2, 4, 4, 4\) .*pool and flatten"),
        (lambda: feature_dim(nn.Conv3d(1, 2, 3), (2, 6, 6)), r"Conv3d fails on a patch of \(2, 6, 6\) .*too small"),
        (lambda: monai_resnet(12), r"depth=12: .*10, 18, 34, 50, 101"),
        (lambda: video_resnet("r4d"), r"r4d.*r3d_18, mc3_18, r2plus1d_18"),
        (lambda: small_resnet((8, 16, 32)), "four stages"),
        (lambda: CenterPooledResNet(()), "at least one stage"),
        (lambda: CenterPooledResNet(sigmas=(0.0,)), "sigmas"),
        (lambda: CenterPooledResNet(windows_hu=((400, -1000),)), "lowest, highest"),
        (lambda: ProjectionHead(6, num_layers=0), "num_layers is 0"),
    ],
)
def test_what_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
