"""An encoder for thick slices: it halves the patch in the plane twice before it mixes slices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def anisotropic_net(widths: Sequence[int] = (16, 32, 64, 128)) -> nn.Module:
    """Patches `(batch, 1, z, y, x)` to features `(batch, widths[-1])`."""
    layers: list[nn.Module] = []
    for number, (before, width) in enumerate(pairwise([1, *widths])):
        depth = 1 if number < 2 else 3
        convolution = nn.Conv3d(
            before, width, (depth, 3, 3), stride=(min(depth, 2), 2, 2), padding=(depth // 2, 1, 1), bias=False
        )
        layers += [convolution, nn.BatchNorm3d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())
