"""`+experiment=deeplesion_published` against the run's criterion, optimizer and settings, as Pai et al. published them.

Written anew from `experiments/pretraining/fmcib_pretrain.yaml`, `NegativeMiningInfoNCECriterion` and `LARS` of
AIM-Harvard/foundation-cancer-image-biomarker.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from naive_contrast import gradients, leaves, random_views, with_leaves
from torch import Tensor, nn
from torch.nn.functional import normalize

from fmcib_ssl.training.build import build_optimizer, build_part, learning_rate
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.settings import Settings
from fmcib_ssl.types import ViewPairs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NUM_LESIONS, NUM_DEVICES = 11467, 2  # rows of its table pretrain.csv


@pytest.fixture(scope="module")
def settings() -> Settings:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        overrides = ["+experiment=deeplesion_published", "data.annotations=my.csv", "paths.run=here"]
        return read_settings(compose("train", overrides))


def published_criterion(devices: list[ViewPairs], temperature: float) -> Tensor:
    """Mean over the devices, exponential by exponential: the buffer holds pos0, pos1, neg0, neg1 of each in turn."""
    batch = len(devices[0]["positive"][0])
    buffer = [row for out in devices for view in leaves(out) for row in normalize(view, dim=1)]
    mined = [4 * batch * d + 2 * batch + row for d in range(len(devices)) for row in range(2 * batch)]
    losses = []
    for device in range(len(devices)):
        first = 4 * batch * device
        for view in (0, 1):
            for i in range(batch):
                anchor = buffer[first + view * batch + i]
                own = (first + 2 * batch + i, first + 3 * batch + i)
                pos = torch.exp(anchor @ buffer[first + (1 - view) * batch + i] / temperature)
                neg = sum(torch.exp(anchor @ buffer[row] / temperature) for row in mined if row not in own)
                losses.append(-torch.log(pos / (pos + neg)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kernel", ["plain", "streamed"])
@pytest.mark.parametrize("num_devices", [1, NUM_DEVICES])
def test_the_loss_is_the_published_criterion(settings: Settings, kernel: str, num_devices: int) -> None:
    """Of all devices' lesions in one process; that several devices equal it is tested for every loss."""
    whole = random_views(0, 3 * num_devices, 3 * num_devices, dtype=torch.float64)
    shares = [with_leaves([x[3 * d : 3 * d + 3] for x in leaves(whole)]) for d in range(num_devices)]
    expected = published_criterion(shares, temperature=0.1)
    loss = build_part("loss", {**settings.loss, "kernel": kernel})(whole)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(loss, whole), gradients(expected, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("weight_decay", [1e-6, 0.1, 0.0])
def test_the_optimizer_is_the_published_lars(settings: Settings, weight_decay: float) -> None:
    """Every parameter is decayed and adapted; without decay its code adapts none, and a weight of 0 is not either."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(24, 5))
        nn.init.zeros_(layers[3].bias)  # type: ignore[arg-type]
        return layers.double()

    settings = settings.model_copy(update={"optimizer": {**settings.optimizer, "weight_decay": weight_decay}})
    ours, theirs = network(), network()
    optimizer = build_optimizer(settings, batch_size=32)(ours.named_parameters())
    velocity: dict[nn.Parameter, Tensor] = {}
    for step in range(5):
        views = torch.randn(4, 1, 4, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for model in (ours, theirs):
            model.zero_grad()
            model(views).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            for weight in theirs.parameters():
                change, size, slope = weight.grad, weight.norm(), weight.grad.norm()  # type: ignore[union-attr]
                if weight_decay and size and slope:
                    change = 0.001 * size / (slope + size * weight_decay + 1e-8) * (change + weight_decay * weight)
                velocity[weight] = 0.9 * velocity[weight] + change if weight in velocity else change.clone()  # type: ignore[union-attr]
                weight.sub_(0.3 * 32 * NUM_DEVICES / 256 * velocity[weight])
    for (name, weight), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_settings_are_the_published_ones(settings: Settings) -> None:
    assert settings.loss["gather_distributed"] and settings.loss["temperature"] == 0.1
    assert (settings.data.batch_size, settings.data.negatives_per_lesion, settings.world_size) == (32, 1, NUM_DEVICES)
    assert (settings.trainer.max_epochs, settings.trainer.accumulate_grad_batches) == (100, 1)
    assert settings.hardware.sync_batchnorm and settings.hardware.precision == "32-true"
    assert learning_rate(settings, 32) == pytest.approx(0.3 * (32 * 2) / 256)
    assert settings.data.patch_size == (50, 50, 50) and settings.data.spacing_mm == 1.0
    assert settings.augment["_target_"] == "fmcib_ssl.augment.PublishedViews"
    assert (settings.encoder["depth"], settings.encoder["widen_factor"], settings.encoder["conv1_t_stride"]) == (
        50,
        2,
        2,
    )
    # SimCLRProjectionHead(4096, 4096 // 2, 128, batch_norm=False), one view set after the other
    head = build_part("head", {k: v for k, v in settings.head.items() if k != "weights"}, in_dim=4096)
    widths = [(layer.in_features, layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear)]
    assert widths == [(4096, 2048), (2048, 128)] and settings.method["forwards"] == "separate"
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in head.modules())


def test_the_rate_is_the_published_one(settings: Settings) -> None:
    """A cosine over all steps, stepped once an epoch."""

    def rates(scheduler: Any) -> list[float]:
        found = []
        for _ in range(100):
            found.append(scheduler.get_last_lr()[0])
            scheduler.optimizer.step()
            scheduler.step()
        return found

    def sgd() -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.075)

    num_steps = 100 * NUM_LESIONS // 64
    published = rates(torch.optim.lr_scheduler.CosineAnnealingLR(sgd(), T_max=num_steps))
    assert all(later <= earlier for earlier, later in pairwise(published))
    assert rates(build_part("schedule", settings.schedule)(sgd(), num_steps)) == pytest.approx(published, rel=1e-4)  # type: ignore[arg-type]
