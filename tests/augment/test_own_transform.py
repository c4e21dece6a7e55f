"""The transform that docs/augment.md shows, taken from there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from given import patches_hu
from torch import Tensor

from fmcib_ssl.augment import BatchedViews, RandomNoise, VoxelTransform
from fmcib_ssl.augment.streams import uniforms

DOCS = Path(__file__).resolve().parents[2] / "docs" / "augment.md"


def test_the_documented_transform_works_and_is_short() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 21
    names: dict[str, Any] = {
        "NamedTuple": NamedTuple, "Sequence": Sequence, "Tensor": Tensor, "VoxelTransform": VoxelTransform,
        "torch": torch, "uniforms": uniforms, "__name__": __name__,
    }  # fmt: skip
    exec(code, names)  # our own page
    saturation = names["RandomSaturation"](0.6, (100.0, 500.0))
    patches, seeds = patches_hu(40, (6, 7, 8)), torch.arange(40)
    params = saturation.draw(seeds, (6, 7, 8))
    assert 12 < params.active.sum() < 36 and 100 <= params.highest_hu.min() < params.highest_hu.max() <= 500
    for patch, view, active, highest in zip(patches.float(), saturation.apply(patches, params), *params, strict=True):
        assert torch.equal(view, patch.clamp_max(highest) if active else patch)
    every = names["RandomSaturation"](1.0, (100.0, 500.0))
    views = BatchedViews({"saturation": every, "noise": RandomNoise(0.0)})
    assert views(patches, seeds).max() <= 500
