"""Images and parameters that tests of batched transforms share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fmcib_ssl.augment import Params

Size = tuple[int, int, int]


def patches_hu(num: int, size: Size, seed: int = 0) -> Tensor:
    """int16 HU with structure at all scales, some of it below the range that the encoder sees."""
    noise = np.random.default_rng(seed).normal(0, 400, size=(num, 1, *size))
    coarse = np.random.default_rng(seed + 1).normal(-300, 500, size=(num, 1, *(-(-n // 5) for n in size)))
    for axis, n in enumerate(size, start=2):
        coarse = coarse.repeat(5, axis).take(range(n), axis)
    return torch.from_numpy((coarse + noise).clip(-3024, 3071).astype(np.int16))


def plain(image: object) -> Tensor:
    return torch.as_tensor(image).as_subclass(Tensor)


def row(params: Params, number: int, times: int = 1) -> Params:
    """Of one view, once or several times."""
    return {name: values[[number] * times] for name, values in params.items()}


def box(params: Params, number: int) -> list[slice]:
    """Of a view's crop, along z, y, x."""
    ends = zip(params["box_start"][number].tolist(), params["box_size"][number].tolist(), strict=True)
    return [slice(start, start + length) for start, length in ends]
