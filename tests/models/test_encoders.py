"""Every encoder of the family, against the libraries they come from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn
from torchvision.models import video

from fmcib_ssl.models import feature_dim, monai_resnet, small_resnet, video_resnet

ENCODERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f"resnet{depth}": (partial(monai_resnet, depth), 512 if depth < 50 else 2048) for depth in (10, 18, 34, 50, 101)
    },
    "published": (partial(monai_resnet, 50, widen_factor=2, conv1_t_stride=2), 4096),
    "small": (small_resnet, 128),
    **{name: (partial(video_resnet, name), 512) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_feature_dim_is_found_without_running_anything_for_real(name: str) -> None:
    build, features = ENCODERS[name]
    with torch.device("meta"):  # shapes only
        encoder = build()
    assert feature_dim(encoder, (50, 50, 50)) == features
    assert feature_dim(encoder, (24, 32, 40)) == features


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "small", "mc3_18", "r2plus1d_18"])
def test_one_channel_in_features_out_and_every_weight_learns(name: str) -> None:
    build, features = ENCODERS[name]
    encoder = build()
    out = encoder(torch.randn(2, 1, 16, 16, 16))
    assert out.shape == (2, features)
    out.square().mean().backward()
    silent = [
        n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert not silent


@pytest.mark.parametrize("depth", [10, 18, 34, 50, 101])
def test_weights_are_named_and_shaped_as_monais(depth: int) -> None:
    with torch.device("meta"):
        ours = monai_resnet(depth, widen_factor=2, conv1_t_stride=2)
        theirs = getattr(nets, f"resnet{depth}")(
            pretrained=False, n_input_channels=1, widen_factor=2, conv1_t_stride=2, feed_forward=False
        )
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.conv1.stride == theirs.conv1.stride == (2, 2, 2)


def test_monai_options_reach_monai() -> None:
    theirs = nets.resnet18(pretrained=False, n_input_channels=1, feed_forward=False, conv1_t_size=3, no_max_pool=True)
    ours = monai_resnet(18, conv1_t_size=3, no_max_pool=True)
    ours.load_state_dict(theirs.state_dict())
    patches = torch.randn(2, 1, 16, 16, 16)
    torch.testing.assert_close(ours.eval()(patches), theirs.eval()(patches))


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_video_network_of_gray_is_torchvisions_of_equal_channels(name: str) -> None:
    theirs = getattr(video, name)(weights=None).eval()
    theirs.fc = nn.Identity()
    ours = video_resnet(name).eval()
    state = theirs.state_dict()
    state["stem.0.weight"] = state["stem.0.weight"].sum(1, keepdim=True)
    ours.load_state_dict(state, strict=True)
    patches = torch.randn(2, 1, 12, 20, 20)
    torch.testing.assert_close(ours(patches), theirs(patches.expand(-1, 3, -1, -1, -1)), rtol=1e-4, atol=1e-4)


def test_stem_of_gray_is_drawn_like_torchvisions() -> None:
    torch.manual_seed(0)
    stem, reference = video_resnet("r3d_18").stem[0].weight, video.r3d_18(weights=None).stem[0].weight  # type: ignore[index, union-attr]
    assert stem.std().item() == pytest.approx(reference.std().item(), rel=0.03)


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


class Unpooled(nn.Conv3d):
    """Gives a map, not features."""

    def __init__(self) -> None:
        super().__init__(1, 2, kernel_size=3)


def test_feature_dim_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"Unpooled gives \(2, 2, 4, 4, 4\) .*pool and flatten"):
        feature_dim(Unpooled(), (6, 6, 6))
    with pytest.raises(ValueError, match=r"Unpooled fails on a patch of \(2, 6, 6\) voxels .*too small"):
        feature_dim(Unpooled(), (2, 6, 6))
    encoder = Unpooled()
    with pytest.raises(ValueError, match="fails"):
        feature_dim(encoder, (2, 6, 6))
    assert encoder.training


def test_unknown_members_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"depth=12: .*10, 18, 34, 50, 101"):
        monai_resnet(12)
    with pytest.raises(ValueError, match=r"r4d.*r3d_18, mc3_18, r2plus1d_18"):
        video_resnet("r4d")
    with pytest.raises(ValueError, match="four stages"):
        small_resnet((8, 16, 32))
