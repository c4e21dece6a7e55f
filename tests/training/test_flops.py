"""Operations against hand formulas, and what a card could do against its units and its clock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning.fabric.utilities.throughput import _CUDA_FLOPS
from torch import Tensor, nn

from fmcib_ssl.models.encoders import monai_resnet
from fmcib_ssl.training.flops import flops_of_lesion, forward_flops, peak_flops, training_flops

ENCODERS = Path(__file__).resolve().parents[2] / "configs" / "encoder"


def operations(layer: nn.Module, out: Tensor) -> int:
    """Two for each weight that each output is a sum over."""
    if isinstance(layer, nn.Conv3d):
        return 2 * out.numel() * prod(layer.kernel_size) * (layer.in_channels // layer.groups)
    return 2 * out.numel() * layer.in_features if isinstance(layer, nn.Linear) else 0


def operations_of_layers(network: nn.Module, views: Tensor) -> dict[str, int]:
    """Run it, and look at what comes out of each of its layers."""
    found: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, _inputs: object, out: Tensor) -> None:
            found[name] = operations(layer, out)

        return note

    network = copy.deepcopy(network).eval()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv3d | nn.Linear):
            layer.register_forward_hook(hook(name))
    with torch.no_grad():
        network(views)
    return found


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1, "bias": False}, {"groups": 2}, {"dilation": 2}])
def test_a_convolution(options: dict[str, int]) -> None:
    convolution = nn.Conv3d(4, 6, (3, 3, 2), **options)  # type: ignore[arg-type]
    views = torch.zeros(2, 4, 9, 10, 11)
    expected = operations(convolution, convolution(views))
    assert forward_flops(convolution, views.shape) == expected
    assert training_flops(convolution, views.shape) == 2 * expected  # the input wants no gradient


def test_back_goes_through_what_is_trained_only() -> None:
    first, second, last = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 8, 3), nn.Linear(8, 5)
    network = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool3d(1), nn.Flatten(), last)
    a, b, c = operations_of_layers(network, torch.zeros(1, 1, 8, 8, 8)).values()
    # Each layer once forward, once for its weights, once for its input if something before it is trained.
    assert training_flops(network, (1, 1, 8, 8, 8)) == 2 * a + 3 * b + 3 * c
    first.requires_grad_(False)
    assert training_flops(network, (1, 1, 8, 8, 8)) == a + 2 * b + 3 * c
    network.requires_grad_(False)
    assert training_flops(network, (1, 1, 8, 8, 8)) == a + b + c


@pytest.mark.parametrize("name", sorted({path.stem for path in ENCODERS.glob("*.yaml")} - {"resnet50_wide"}))
def test_every_encoder_as_its_layers_say(name: str) -> None:
    config = yaml.safe_load((ENCODERS / f"{name}.yaml").read_text())
    if config.get("depth", 0) > 18:  # the same layers, in a size that a test has time for
        config["widen_factor"] = 0.25
    encoder = instantiate(config)
    views = torch.zeros(2, 1, 16, 16, 16)
    layers = sum(operations_of_layers(encoder, views).values())
    pools_by_products = name == "concentric"
    assert layers and forward_flops(encoder, views.shape) == pytest.approx(layers, rel=0.01 * pools_by_products)


def test_the_published_trunk_takes_what_was_published() -> None:
    with torch.device("meta"):
        trunk = monai_resnet(50, widen_factor=2, conv1_t_stride=2)
    assert forward_flops(trunk, (1, 1, 50, 50, 50)) / 1e9 == pytest.approx(25.7, abs=0.05)


def test_counting_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 2))
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    training_flops(network, (2, 1, 6, 6, 6))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and network.training
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in network.parameters())


def test_of_a_lesion() -> None:
    # Four views forward and back, two more forward: 4 * 2 + 2 forwards of a single convolution.
    convolution = nn.Conv3d(1, 4, 3)
    one = operations(convolution, torch.zeros(1, 4, 6, 6, 6))
    assert flops_of_lesion(convolution, (8, 8, 8), num_views=4, num_watched=2) == 10 * one


#: Name as CUDA gives it, precision, TF32: multiprocessors, operations of one in a clock, GHz. From the white papers.
CARDS = [
    ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 132, 4096, 1.83),
    ("NVIDIA H100 80GB HBM3", "16-true", False, 132, 4096, 1.83),
    ("NVIDIA H100 80GB HBM3", "32-true", True, 132, 2048, 1.83),
    ("NVIDIA H100 80GB HBM3", "32-true", False, 132, 256, 1.98),
    ("NVIDIA H200", "bf16-mixed", False, 132, 4096, 1.83),
    ("NVIDIA H100 PCIe", "bf16-mixed", False, 114, 4096, 1.62),
    ("NVIDIA A100-SXM4-80GB", "bf16-mixed", False, 108, 2048, 1.41),
    ("NVIDIA A100-PCIE-40GB", "32-true", True, 108, 1024, 1.41),
    ("NVIDIA A100-PCIE-40GB", "32-true", False, 108, 128, 1.41),
    ("NVIDIA A40", "bf16-mixed", False, 84, 1024, 1.74),
    ("NVIDIA RTX A6000", "bf16-mixed", False, 84, 1024, 1.80),
    ("NVIDIA L40S", "bf16-mixed", False, 142, 1024, 2.52),
    ("NVIDIA GeForce RTX 4090", "bf16-mixed", False, 128, 512, 2.52),
    ("NVIDIA GeForce RTX 3090", "16-mixed", False, 82, 512, 1.695),
    ("Tesla V100-SXM2-32GB", "16-mixed", False, 80, 1024, 1.53),
    ("Tesla V100-SXM2-32GB", "32-true", True, 80, 128, 1.53),  # it has no TF32
    ("Tesla V100-PCIE-16GB", "16-mixed", False, 80, 1024, 1.37),
    ("Tesla T4", "16-mixed", False, 40, 1024, 1.59),
]


@pytest.mark.parametrize(("card", "precision", "tf32", "units", "per_clock", "ghz"), CARDS)
def test_peaks_are_units_times_clock(
    card: str, precision: str, tf32: bool, units: int, per_clock: int, ghz: float
) -> None:
    assert peak_flops(card, precision, tf32=tf32) == pytest.approx(units * per_clock * ghz * 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("card", "lightnings"),
    [("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA H100 PCIe", "h100 pcie"), ("NVIDIA H100 80GB HBM3", "h100 sxm")],
)
def test_peaks_are_lightnings_where_those_are_dense(card: str, lightnings: str) -> None:
    theirs = _CUDA_FLOPS[lightnings]
    assert peak_flops(card, "bf16-mixed", tf32=True) == pytest.approx(theirs[torch.bfloat16], rel=0.002)
    assert peak_flops(card, "32-true", tf32=True) == pytest.approx(theirs["tfloat32"], rel=0.002)
    assert peak_flops(card, "32-true", tf32=False) == pytest.approx(theirs[torch.float32], rel=0.01)


@pytest.mark.parametrize(
    ("card", "precision"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed"),  # a slice of it
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16-mixed"),
        ("NVIDIA A400", "bf16-mixed"),
        ("Tesla V100-SXM2-32GB", "bf16-mixed"),
        ("NVIDIA H200", "transformer-engine"),
        ("AMD Instinct MI300X", "bf16-mixed"),
    ],
)
def test_of_what_is_not_known_nothing_is_said(card: str, precision: str) -> None:
    assert peak_flops(card, precision, tf32=True) is None
