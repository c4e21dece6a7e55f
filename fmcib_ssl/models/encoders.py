"""Encoders: `(batch, 1, z, y, x)` to `(batch, features)`, randomly initialised, nothing downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import monai.networks.nets.resnet as monai_nets
import torch
from torch import Tensor, nn
from torchvision.models import video

_MONAI_DEPTHS = (10, 18, 34, 50, 101)
_VIDEO_NAMES = ("r3d_18", "mc3_18", "r2plus1d_18")


def monai_resnet(
    depth: int,
    *,
    widen_factor: float = 1.0,
    conv1_t_size: int = 7,
    conv1_t_stride: int = 1,
    no_max_pool: bool = False,
) -> nn.Module:
    """MONAI's 3D ResNet without its classifier; arguments and weight names are MONAI's.

    The trunk of the published CT foundation model is `monai_resnet(50, widen_factor=2, conv1_t_stride=2)`: 4096
    features, 184 million weights.

    Args:
        depth: 10, 18, 34, 50 or 101.
        widen_factor: multiplies the channels of every layer.
        conv1_t_size: kernel of the first convolution, voxels.
        conv1_t_stride: stride of the first convolution.
        no_max_pool: leave out the pooling after the first convolution.

    Raises:
        ValueError: another depth.
    """
    if depth not in _MONAI_DEPTHS:
        raise ValueError(f"depth={depth}: MONAI ResNets here have depth {', '.join(map(str, _MONAI_DEPTHS))}.")
    build = getattr(monai_nets, f"resnet{depth}")
    encoder: nn.Module = build(
        pretrained=False,
        n_input_channels=1,
        feed_forward=False,
        widen_factor=widen_factor,
        conv1_t_size=conv1_t_size,
        conv1_t_stride=conv1_t_stride,
        no_max_pool=no_max_pool,
    )
    return encoder


def small_resnet(
    widths: Sequence[int] = (16, 32, 64, 128),
    *,
    conv1_t_size: int = 3,
    conv1_t_stride: int = 2,
    no_max_pool: bool = False,
) -> nn.Module:
    """A narrow ResNet-10 that trains on a CPU: 0.9 million weights, 128 features.

    Args:
        widths: channels of the four stages, one residual block each.
        conv1_t_size: kernel of the first convolution, voxels.
        conv1_t_stride: stride of the first convolution.
        no_max_pool: leave out the pooling after the first convolution; finer texture, several times slower.

    Raises:
        ValueError: not four widths.
    """
    if len(widths) != 4:
        raise ValueError(f"widths={list(widths)}: the network has four stages and needs a width for each.")
    encoder: nn.Module = monai_nets.ResNet(
        "basic",
        layers=[1, 1, 1, 1],
        block_inplanes=list(widths),
        n_input_channels=1,
        conv1_t_size=conv1_t_size,
        conv1_t_stride=conv1_t_stride,
        no_max_pool=no_max_pool,
        feed_forward=False,
        bias_downsample=False,
    )
    # Weights in this layout make a CPU's convolutions choose it, and run faster.
    return encoder.to(memory_format=torch.channels_last_3d)


def video_resnet(name: str) -> nn.Module:
    """One of torchvision's video ResNets, with a stem for one channel and without its classifier: 512 features.

    Time is `z`: the stem halves `y` and `x` and keeps `z`.

    Args:
        name: `r3d_18`, `mc3_18` or `r2plus1d_18`.

    Raises:
        ValueError: another name.

    Source: Tran et al. 2018, A closer look at spatiotemporal convolutions for action recognition.
    """
    if name not in _VIDEO_NAMES:
        raise ValueError(f"name={name!r}: torchvision's video ResNets are {', '.join(_VIDEO_NAMES)}.")
    encoder: Any = getattr(video, name)(weights=None)
    rgb = encoder.stem[0]
    gray = nn.Conv3d(1, rgb.out_channels, rgb.kernel_size, stride=rgb.stride, padding=rgb.padding, bias=False)
    nn.init.kaiming_normal_(gray.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws the others
    encoder.stem[0] = gray
    encoder.fc = nn.Identity()
    return cast(nn.Module, encoder)


def feature_dim(encoder: nn.Module, patch_size_zyx: Sequence[int]) -> int:
    """Number of features an encoder gives for a patch, found by running it on two empty ones.

    Leaves weights, running statistics, modes and torch's CPU generator as they were.

    Args:
        encoder: on any device.
        patch_size_zyx: voxels along z, y, x.

    Raises:
        ValueError: the encoder fails on such a patch, or what it gives is not `(batch, features)`.
    """
    name = type(encoder).__name__
    size = tuple(patch_size_zyx)
    training = {module: module.training for module in encoder.modules()}
    first = next(encoder.parameters(), torch.empty(0))
    patches = torch.zeros((2, 1, *size), device=first.device, dtype=first.dtype)
    try:
        encoder.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            features = encoder(patches)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} fails on a patch of {size} voxels (z, y, x); is the patch too small for it, or does it take "
            f"more than one channel? It said: {error}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"{name} gives {shape} for a batch of 2; an encoder gives (batch, features): pool and flatten at its end."
        )
    return features.shape[1]
