"""Encoders of published weights that are not among `encoders`: a network, and the mean of its last feature map.

Names of weights are those of the published files, so that these load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import monai.networks.nets.resnet as monai_nets
import torch
import torch.nn.functional as F
from jaxtyping import Float
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

#: Axis of our patches `(z, y, x)`, whose indices grow towards S, P and L, that a direction lies on.
_AXIS_OF = {"S": 0, "I": 0, "P": 1, "A": 1, "L": 2, "R": 2}
#: "A": shortcuts that change size are subsampled and padded with zeros; "B": they are convolutions.
_MEDICALNET_SHORTCUTS = {10: "B", 18: "A", 34: "A", 50: "B", 101: "B"}
_SWIN_SIZES = (12, 24, 36, 48, 96, 192)


class PooledNetwork(nn.Module):
    """A network of feature maps as an encoder: the mean of the last map over the patch.

    Args:
        network: `(batch, 1, *patch)` to a map `(batch, features, ...)`, to a list of maps of which the last is taken,
            or to `(batch, features)`, which stays as it is.
        axes: directions in which the indices of the patches grow that the network was trained on, as of MONAI's
            `Orientation`. "SPL" is what encoders are given here; "RAS" turns and flips it.

    Raises:
        ValueError: `axes` does not name each axis once.
    """

    def __init__(self, network: nn.Module, *, axes: str = "SPL") -> None:
        super().__init__()
        if sorted(_AXIS_OF.get(axis, 3) for axis in axes) != [0, 1, 2]:
            raise ValueError(f"axes={axes!r}: three letters, one each of S or I, P or A, L or R, such as RAS")
        self.network = network
        self.axes = axes

    def forward(self, patches: Float[Tensor, "batch 1 z y x"]) -> Float[Tensor, "batch features"]:
        """Features of preprocessed patches."""
        order = [2 + _AXIS_OF[axis] for axis in self.axes]
        flipped = [number for number, axis in enumerate(self.axes, start=2) if axis in "IAR"]
        maps = self.network(patches.permute(0, 1, *order).flip(flipped) if self.axes != "SPL" else patches)
        last = maps[-1] if isinstance(maps, list | tuple) else maps
        return cast(Tensor, last.flatten(2).mean(2) if last.ndim > 2 else last)


def genesis_unet() -> PooledNetwork:
    """The contracting path of the 3D U-Net of Models Genesis and of SuPreM's U-Net: 512 features, 7.0 million weights.

    Source: Zhou et al. 2021, Models Genesis. Its batch norm always takes the statistics of the batch; here they are of
    each patch, as in a batch of one, so that a lesion's features do not depend on the lesions beside it. The published
    feature extractor flattens overlapping means of the last map; this one is the mean over the patch.
    """
    return PooledNetwork(_GenesisUNet(), axes="LPS")


def medicalnet_resnet(depth: int) -> nn.Module:
    """MONAI's 3D ResNet as it takes MedicalNet's weights: 512 features, 2048 from depth 50 on.

    Args:
        depth: 10, 18, 34, 50 or 101.

    Raises:
        ValueError: another depth.

    Source: Chen et al. 2019, Med3D. As MONAI does, it leaves out the dilation that MedicalNet has in its last stages.
    """
    if depth not in _MEDICALNET_SHORTCUTS:
        raise ValueError(f"depth={depth}: must be one of {', '.join(map(str, _MEDICALNET_SHORTCUTS))}")
    network: nn.Module = getattr(monai_nets, f"resnet{depth}")(
        n_input_channels=1,
        conv1_t_stride=2,
        feed_forward=False,
        bias_downsample=False,
        shortcut_type=_MEDICALNET_SHORTCUTS[depth],
    )
    return network


def segresnet(init_filters: int = 32, blocks_down: Sequence[int] = (1, 2, 2, 4, 4)) -> PooledNetwork:
    """MONAI's SegResNet encoder; with the defaults that of CT-FM: 512 features, 77.8 million weights.

    Args:
        init_filters: channels of the first convolution; each level doubles them.
        blocks_down: residual blocks of each level.

    Source: Pai et al. 2025, Vision foundation models for computed tomography.
    """
    return PooledNetwork(SegResEncoder(init_filters=init_filters, blocks_down=tuple(blocks_down)))


def swin_transformer(feature_size: int = 48, *, use_v2: bool = False) -> PooledNetwork:
    """MONAI's `SwinUNETR.swinViT`: `16 * feature_size` features.

    Args:
        feature_size: 48 in SuPreM and in VoCo's base network, 96 in its large and 192 in its huge one; 12 to 36 too.
        use_v2: a convolution before each stage, as in VoCo.

    Raises:
        ValueError: another size.

    Source: Hatamizadeh et al. 2022, Swin UNETR.
    """
    if feature_size not in _SWIN_SIZES:
        raise ValueError(f"feature_size={feature_size}: must be one of {', '.join(map(str, _SWIN_SIZES))}")
    with torch.device("cpu"):  # MONAI reads values of a tensor as it builds, which the meta device has not
        network = SwinTransformer(1, feature_size, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), use_v2=use_v2)
    return PooledNetwork(network, axes="RAS")


class _GenesisUNet(nn.Module):
    """The four levels on the way down; `ops.0` and `ops.1` are a convolution, a norm and ReLU each."""

    def __init__(self) -> None:
        super().__init__()
        for level, before in enumerate((1, 64, 128, 256)):
            width = 32 * 2**level
            ops = nn.ModuleDict({"ops": nn.Sequential(_ConvNorm(before, width), _ConvNorm(width, 2 * width))})
            self.add_module(f"down_tr{2 * width}", ops)

    def forward(self, patches: Tensor) -> Tensor:
        """The last level's map, an eighth of the patch along each axis."""
        grid = patches
        for number, level in enumerate(cast("list[nn.ModuleDict]", list(self.children()))):
            grid = level["ops"](F.max_pool3d(grid, 2) if number else grid)
        return grid


class _ConvNorm(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, padding=1)
        self.bn1 = _NormOfPatch(after)

    def forward(self, grid: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(grid)))


class _NormOfPatch(nn.BatchNorm3d):
    """Batch norm over each patch alone; the file's running statistics are kept, and not used."""

    def forward(self, grid: Tensor) -> Tensor:
        return F.instance_norm(grid, weight=self.weight, bias=self.bias, eps=self.eps)
