"""The concentric encoder: its pooling against a naive loop, its symmetry, its windows, and its way through a file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from fmcib_ssl.models import CenterPooledResNet, export_encoder, feature_dim, load_encoder
from fmcib_ssl.types import Preprocessing

SIZE = (8, 24, 24)


def stages(encoder: CenterPooledResNet, patches: torch.Tensor) -> list[torch.Tensor]:
    """What each stage gives, caught on its way."""
    caught: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, grid: caught.append(grid))
        for module in (encoder.stem, *encoder.blocks)
    ]
    encoder(patches)
    for hook in hooks:
        hook.remove()
    return caught


def test_features_are_maxima_and_gaussian_means_round_the_point() -> None:
    encoder = CenterPooledResNet((4, 8), sigmas=(2.0, 6.0)).eval()
    patches = torch.rand(2, 1, 8, 10, 12)
    with torch.no_grad():
        features = encoder(patches)
        grids = stages(encoder, patches)
    expected: list[list[float]] = [[], []]
    for number, grid in enumerate(grids, start=1):
        places = list(itertools.product(*map(range, grid.shape[2:])))
        # The centre of a cell in voxels, from the strides; the point is in voxel size // 2.
        distance = [math.dist([i * 2**number for i in place], (8 // 2, 10 // 2, 12 // 2)) for place in places]
        for row, channels in enumerate(grid.double().numpy()):
            expected[row] += [channel.max() for channel in channels]
            for channel in channels:
                for sigma in (2.0, 6.0, math.inf):
                    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in distance]
                    expected[row].append(np.average([channel[place] for place in places], weights=weights))
    np.testing.assert_allclose(features.numpy(), np.array(expected), rtol=1e-3, atol=1e-5)


def test_intensities_outside_every_window_are_clamped() -> None:
    encoder = CenterPooledResNet((4,)).eval()
    hu = torch.tensor([-3000.0, -1000.0, 1500.0, 3000.0]).view(4, 1, 1, 1, 1).expand(4, 1, *SIZE)
    normalized = (hu + 1024) / 3072
    with torch.no_grad():
        features = encoder(normalized)
    torch.testing.assert_close(features[0], features[1])
    torch.testing.assert_close(features[2], features[3])
    assert not torch.allclose(features[1], features[2])


@pytest.mark.parametrize("size", [SIZE, (50, 50, 50), (7, 9, 11)])
def test_any_patch_size_gives_features_and_every_weight_learns(size: tuple[int, int, int]) -> None:
    encoder = CenterPooledResNet()
    assert feature_dim(encoder, size) == (16 + 32 + 64) * 4
    encoder(torch.rand(4, 1, *size)).square().mean().backward()
    assert not [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_config_and_export_give_the_same_encoder_again(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "configs" / "encoder" / "concentric.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    encoder: nn.Module = instantiate(config, _convert_="object").eval()
    assert isinstance(encoder, CenterPooledResNet)
    export_encoder(encoder, config, Preprocessing(patch_size_zyx=SIZE), tmp_path / "encoder.safetensors")
    again = load_encoder(tmp_path / "encoder.safetensors")
    patches = torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(patches), encoder(patches))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"widths": ()}, "at least one stage"),
        ({"widths": (8, 0)}, "positive"),
        ({"sigmas": (0.0,)}, "sigmas"),
        ({"windows_hu": ((400, -1000),)}, "lowest, highest"),
        ({"windows_hu": ()}, "lowest, highest"),
    ],
)
def test_senseless_arguments_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CenterPooledResNet(**wrong)  # type: ignore[arg-type]
