"""A network, and what one step of it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from fmcib_ssl.models import small_resnet

REPO = Path(__file__).resolve().parents[2]
SPEC = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}
SIZE = (12, 12, 12)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return small_resnet(SPEC["widths"])  # type: ignore[arg-type]


def shipped(name: str) -> nn.Module:
    """Of configs/encoder."""
    torch.manual_seed(0)
    path = REPO / "configs" / "encoder" / f"{name}.yaml"
    spec = yaml.safe_load(path.read_text())
    for base in reversed(spec.pop("defaults", [])):
        spec = {**yaml.safe_load((path.parent / f"{base}.yaml").read_text()), **spec}
    network: nn.Module = instantiate(spec)
    return network


def views(num: int = 4) -> Tensor:
    return torch.randn(num, 1, *SIZE, generator=torch.Generator().manual_seed(1))


def a_step(network: nn.Module, forward: Callable[[], Tensor] | None = None) -> dict[str, Tensor]:
    """What a step leaves: the output, every gradient, every running statistic."""
    network.zero_grad()
    out = forward() if forward else network(views())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)).sum().backward()
    gradients = {f"grad of {name}": weight.grad.clone() for name, weight in network.named_parameters()}  # type: ignore[union-attr]
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    return {"out": out.detach(), **gradients, **buffers}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, f"{name} is zero: nothing was compared"
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=rtol * scale + atol, msg=lambda m, n=name: f"{n}: {m}"
        )
