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
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchvision.models import video

from fmcib_ssl.models import CenterPooledResNet, ProjectionHead, feature_dim, monai_resnet, small_resnet, video_resnet
from fmcib_ssl.models.encoders import learned_features
from fmcib_ssl.models.point_features import num_point_features, point_derivatives, point_features

RNG = np.random.default_rng(0)

ENCODERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"resnet{depth}": (partial(monai_resnet, depth), 512 if depth < 50 else 2048) for depth in (10, 18, 34, 50, 101)
    },
    "published": (partial(monai_resnet, 50, widen_factor=2, conv1_t_stride=2), 4096),
    "small": (small_resnet, 128),
    "center_pooled": (CenterPooledResNet, (16 + 32 + 64) * 4),
    "radial": (partial(CenterPooledResNet, derivatives=True, point_features=True), (16 + 32 + 64) * 4 + 248),
    **{name: (partial(video_resnet, name), 512) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
}
VIDEO = pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_dim_is_found_without_running_anything_for_real(name: str) -> None:
    build, features = ENCODERS[name]
    with torch.device("meta"):  # shapes only
        encoder = build()
    assert feature_dim(encoder, (50, 50, 50)) == feature_dim(encoder, (24, 32, 40)) == features


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "small", "center_pooled", "radial", "mc3_18", "r2plus1d_18"])
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


def test_point_features_are_what_numpy_and_scipy_compute() -> None:
    """On a patch of unequal edges: derivatives, means and deviations in a shell, shares under a Gaussian."""
    hu = RNG.normal(-300, 400, (2, 1, 8, 13, 12)).astype(np.float32)
    derivatives = point_derivatives(torch.from_numpy(hu))
    found = point_features(torch.from_numpy(hu), derivatives).numpy()
    assert found.shape == (2, num_point_features())

    clamped = hu[:, 0].clip(-1000, 300)
    offsets = np.stack(np.meshgrid(*(np.arange(n) - n // 2 for n in (8, 13, 12)), indexing="ij")).astype(float)
    radius = np.sqrt((offsets**2).sum(0))
    for row, patch in enumerate(clamped):
        smooth = gaussian_filter(patch.astype(float), 1.0, mode="nearest", truncate=3.0)
        slopes = np.stack(np.gradient(smooth))
        radial = (slopes * offsets / np.maximum(radius, 0.5)).sum(0)
        magnitude = np.sqrt((slopes**2).sum(0))
        expected = {
            "magnitude": magnitude,
            "radial": radial,
            "tangential": np.sqrt(np.maximum(magnitude**2 - radial**2, 0)),
            "laplacian": sum(np.gradient(slope, axis=axis) for axis, slope in enumerate(slopes)),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(derivatives[name][row, 0].numpy(), values, rtol=2e-2, atol=0.5, err_msg=name)

        shell, images = (radius >= 3.5) & (radius < 5), [patch, *(derivatives[n][row, 0].numpy() for n in derivatives)]
        moments = found[row, :60].reshape(2, 5, 6)  # means and deviations, images, shells
        np.testing.assert_allclose(
            moments[0, :, 2], [image[shell].mean() / 100 for image in images], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            moments[1, :, 2], [image[shell].std() / 100 for image in images], rtol=1e-3, atol=1e-3
        )
        gaussian = np.exp(-(radius**2) / (2 * 3.0**2))
        at_minus_200 = np.interp(patch, [-300, -200, -100], [0, 1, 0])
        share = found[row, 60 + 8 * 4 + 1]  # bins of intensity, in each the four Gaussians
        assert share == pytest.approx(np.average(at_minus_200, weights=gaussian), abs=1e-5)
        np.testing.assert_allclose(found[row, 60:].reshape(-1, 4)[:16].sum(0), 1, rtol=1e-4)


def test_an_edge_round_the_point_is_radial_and_one_beside_it_is_not() -> None:
    grid = torch.stack(torch.meshgrid(*(torch.arange(17.0) - 8,) * 3, indexing="ij"))
    ball = torch.where(grid.square().sum(0).sqrt() < 5, 0.0, -800.0)[None, None]
    plane = torch.where(grid[0] < 0, 0.0, -800.0)[None, None].roll(4, dims=3)
    on_ball, on_plane = point_derivatives(ball), point_derivatives(plane)
    on_edge = ((grid.square().sum(0).sqrt() - 5).abs() < 1)[None, None]
    assert (on_ball["radial"][on_edge] < -50).all()
    assert on_ball["tangential"][on_edge].mean() < 0.2 * on_ball["magnitude"][on_edge].mean()
    across = on_plane["tangential"][..., 8, :, 8].mean()  # where the plane meets the point
    assert across > on_plane["radial"][..., 8, :, 8].abs().mean()


@pytest.mark.parametrize("derivatives", [False, True])
def test_fixed_features_come_last_and_training_is_not_shown_them(derivatives: bool) -> None:
    learned = CenterPooledResNet((4, 8), derivatives=derivatives).eval()
    both = CenterPooledResNet((4, 8), derivatives=derivatives, point_features=True).eval()
    both.load_state_dict(learned.state_dict())  # they have no weights
    patches = torch.rand(3, 1, 8, 24, 24)
    with torch.no_grad():
        short, long = learned(patches), both(patches)
        assert long.shape[1] == short.shape[1] + both.num_fixed_features == short.shape[1] + num_point_features()
        torch.testing.assert_close(long[:, : short.shape[1]], short)
        torch.testing.assert_close(learned_features(both, patches), short)
        torch.testing.assert_close(learned_features(learned, patches), short)


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
