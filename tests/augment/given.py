"""Images and parameters that tests of batched transforms share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fmcib_ssl.augment.geometry import GeometryParams


def patches_hu(num: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """int16 HU with structure at all scales, some of it below the range that the encoder sees."""
    noise = np.random.default_rng(seed).normal(0, 400, size=(num, 1, *size))
    coarse = np.random.default_rng(seed + 1).normal(-300, 500, size=(num, 1, *(-(-n // 5) for n in size)))
    for axis, n in enumerate(size, start=2):
        coarse = coarse.repeat(5, axis).take(range(n), axis)
    return torch.from_numpy((coarse + noise).clip(-3024, 3071).astype(np.int16))


def geometry(size: tuple[int, int, int], num: int = 1, **changed: Tensor) -> GeometryParams:
    """Parameters that change nothing but what is given, for patches of one size."""
    identity = GeometryParams(
        active=torch.ones(num, dtype=torch.bool),
        axes=torch.arange(3).repeat(num, 1),
        flip=torch.zeros(num, 3, dtype=torch.bool),
        box_start=torch.zeros(num, 3, dtype=torch.int64),
        box_size=torch.tensor(size).repeat(num, 1),
        zoom=torch.ones(num, 3),
        angle=torch.zeros(num, 3),
        elastic=torch.zeros(num, 3, 6, 6, 6),
        warped=torch.zeros(num, dtype=torch.bool),
    )
    return identity._replace(**changed)
