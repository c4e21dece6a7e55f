"""Work that `hardware.skip_padded_kernels` leaves out changes no value and no gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_step import REPO, a_step, encoder, encoder_of
from torch import Tensor, nn

from fmcib_ssl.models.acceleration import met_part, skip_padded_kernels
from fmcib_ssl.training.throughput import flops_of_lesion


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_what_is_left_of_a_kernel_gives_the_same(kernel_size: int, stride: int, dilation: int) -> None:
    """With numbers whose sums are exact, so that equal is equal to the bit; padding is from none to too much."""
    rng, num_trimmed = torch.Generator().manual_seed(0), 0
    for size in range(1, 9):
        for padding in range(dilation * (kernel_size - 1) + 2):
            if size + 2 * padding < dilation * (kernel_size - 1) + 1:
                continue
            values = torch.randint(-8, 9, (2, 1, size), generator=rng).float()
            weight = torch.randint(-8, 9, (1, 1, kernel_size), generator=rng).float()
            first, count, less = met_part(size, kernel_size, padding, stride, dilation)
            whole = F.conv1d(values, weight, stride=stride, padding=padding, dilation=dilation)
            part = F.conv1d(values, weight.narrow(2, first, count), stride=stride, padding=less, dilation=dilation)
            assert torch.equal(part, whole), (size, padding)
            num_trimmed += count < kernel_size
            if first or first + count < kernel_size:  # what was left out met nothing
                outside = torch.ones(kernel_size, dtype=torch.bool)
                outside[first : first + count] = False
                weight.requires_grad_()
                F.conv1d(values, weight, stride=stride, padding=padding, dilation=dilation).sum().backward()
                assert not weight.grad[0, 0, outside].any()  # type: ignore[index]
    assert (num_trimmed > 0) == (kernel_size > 1)


@pytest.mark.parametrize("name", ["small", "concentric", "resnet18", "resnet50", "r2plus1d_18"])
@pytest.mark.parametrize("size", [(16, 16, 16), (8, 24, 20)])
def test_a_trimmed_encoder_gives_the_same(name: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    # In double precision, in which what ought to be zero is nearly so.
    network = encoder_of(REPO / "configs" / "encoder" / f"{name}.yaml").double()
    trimmed = copy.deepcopy(network)
    skip_padded_kernels(trimmed)
    patches = torch.randn(4, 1, *size, dtype=torch.float64)
    found, expected = (a_step(net, lambda _, net=net: net(patches)) for net in (trimmed, network))  # type: ignore[misc]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        atol = 1e-7 + 1e-8 * float(value.abs().max())
        torch.testing.assert_close(found[key], value, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def test_a_trimmed_network_computes_less() -> None:
    """The last stage of `small` has one voxel left of 16: a 27th of two convolutions remains, an eighth of another."""
    network = encoder()
    before = flops_of_lesion(network, (16, 16, 16), num_views=0, num_watched=1)
    skip_padded_kernels(network)
    less = before - flops_of_lesion(network, (16, 16, 16), num_views=0, num_watched=1)
    assert less >= 2 * 8 * 8 * ((27 - 8) + (27 - 1))  # multiply and add, 8 channels to 8


@pytest.mark.parametrize("name", ["small", "resnet10"])
def test_a_relu_after_the_pooling_gives_the_same_bits(name: str) -> None:
    """Of 40 voxels every stage has so many left that no kernel is cut."""
    torch.manual_seed(0)
    network = encoder_of(REPO / "configs" / "encoder" / f"{name}.yaml")
    trimmed = copy.deepcopy(network)
    skip_padded_kernels(trimmed)
    sizes: list[int] = []
    relu: Any = trimmed.maxpool[1]  # type: ignore[index]
    relu.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[2]))
    patches = torch.randn(4, 1, 40, 40, 40)
    found, expected = (a_step(net, lambda _, net=net: net(patches)) for net in (trimmed, network))  # type: ignore[misc]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert trimmed.state_dict().keys() == network.state_dict().keys()
    assert sizes == [10]  # 40 voxels, halved by the first convolution and by the pooling


class Standardized(nn.Conv3d):
    """Weight standardization: a layer with a `forward` of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.conv3d(inputs, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


def test_layers_with_a_way_of_their_own_keep_it() -> None:
    layer, patches = Standardized(1, 2, 3, padding=1), torch.randn(1, 1, 1, 1, 1)
    expected = layer(patches)
    skip_padded_kernels(layer)
    assert torch.equal(layer(patches), expected)


def test_a_patch_without_a_batch() -> None:
    layer = nn.Conv3d(1, 2, 3, padding=1)
    skip_padded_kernels(layer)
    patches = torch.randn(1, 1, 2, 3)
    torch.testing.assert_close(layer(patches), layer(patches[None])[0])


def test_what_pads_otherwise_is_left_whole() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate"), nn.Conv3d(2, 2, 3, padding="same"))
    patches = torch.randn(1, 1, 1, 1, 1)
    expected = network(patches)
    skip_padded_kernels(network)
    assert torch.equal(network(patches), expected)
