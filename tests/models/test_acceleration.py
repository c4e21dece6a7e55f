"""The switches of `hardware` change neither values nor gradients, names nor shapes: the plain step is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_step import REPO, SIZE, SPEC, a_step, assert_close, encoder, shipped, views
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.models import CenterPooledResNet, MinedContrast, Parts, export_encoder
from fmcib_ssl.models.acceleration import (
    _met_part,
    compile_training,
    lay_out_channels_last,
    recompute_blocks,
    resolve_precision,
    skip_padded_kernels,
)
from fmcib_ssl.training.throughput import flops_of_lesion
from fmcib_ssl.types import Preprocessing, ViewPairs

#: Residual blocks as in the papers' tables.
NUM_BLOCKS = {
    "small": 4, "concentric": 2, "radial": 2, "resnet10": 4, "resnet18": 8, "resnet34": 16, "resnet50": 16,
    "resnet50_wide": 16, "resnet101": 33, "r3d_18": 8, "mc3_18": 8, "r2plus1d_18": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "accelerator", "gpu", "expected"),
    [
        ("auto", "cpu", "with bfloat16", "32-true"),  # a GPU beside it does not count
        ("auto", "gpu", "with bfloat16", "bf16-mixed"),
        ("auto", "gpu", "old", "32-true"),  # a V100 has tensor cores, and none for bfloat16
        ("auto", "auto", "with bfloat16", "bf16-mixed"),
        ("auto", "auto", None, "32-true"),
        ("auto", "mps", None, "32-true"),
        ("16-mixed", "cpu", "old", "bf16-mixed"),  # Lightning would choose the same, and say so in its own words
        ("16-mixed", "auto", None, "bf16-mixed"),
        ("16-mixed", "auto", "old", "16-mixed"),
        ("16-mixed", "gpu", "old", "16-mixed"),
        ("bf16-true", "cpu", None, "bf16-true"),
    ],
)
def test_precision(
    precision: str, accelerator: str, gpu: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu == "with bfloat16")
    assert resolve_precision(precision, accelerator) == expected


def test_channels_last_reaches_the_activations_and_changes_no_value(tmp_path: Path) -> None:
    plain, other = (encoder().to(memory_format=torch.contiguous_format) for _ in range(2))
    lay_out_channels_last(other)
    for network, file in ((plain, "plain"), (other, "other")):
        export_encoder(network, SPEC, Preprocessing(SIZE), tmp_path / file)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "other").read_bytes()
    layouts: list[bool] = []
    layer: Any = other.layer2
    layer.register_forward_hook(
        lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last_3d))
    )
    large = torch.randn(2, 1, 40, 40, 40)  # still several cells in layer2
    assert_close(a_step(other, lambda: other(large)), a_step(plain, lambda: plain(large)), rtol=1e-3)
    assert layouts == [True]


# Kernels that meet padding


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_part_of_a_kernel_that_meets_voxels_gives_the_same(kernel_size: int, stride: int, dilation: int) -> None:
    """With numbers whose sums are exact, so that equal is equal to the bit; padding is from none to too much."""
    rng, num_cut = torch.Generator().manual_seed(0), 0
    for size in range(1, 9):
        for padding in range(dilation * (kernel_size - 1) + 2):
            if size + 2 * padding < dilation * (kernel_size - 1) + 1:
                continue
            values = torch.randint(-8, 9, (2, 1, size), generator=rng).float()
            weight = torch.randint(-8, 9, (1, 1, kernel_size), generator=rng).float()
            first, count, less = _met_part(size, kernel_size, padding, stride, dilation)
            whole = F.conv1d(values, weight, stride=stride, padding=padding, dilation=dilation)
            part = F.conv1d(values, weight.narrow(2, first, count), stride=stride, padding=less, dilation=dilation)
            assert torch.equal(part, whole), (size, padding)
            num_cut += count < kernel_size
    assert (num_cut > 0) == (kernel_size > 1)


@pytest.mark.parametrize("name", [
    "small", "concentric", "radial", "resnet18",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "r2plus1d_18")),
])  # fmt: skip
@pytest.mark.parametrize("size", [(16, 16, 16), (8, 24, 20)])
def test_an_encoder_with_cut_kernels_gives_the_same(name: str, size: tuple[int, int, int]) -> None:
    network = shipped(name).double()  # in which what ought to be zero is nearly so
    cut = copy.deepcopy(network)
    skip_padded_kernels(cut)
    patches = torch.randn(4, 1, *size, dtype=torch.float64)
    result, expected = (a_step(net, lambda net=net: net(patches)) for net in (cut, network))  # type: ignore[misc]
    assert_close(result, expected, rtol=1e-8, atol=1e-7)


def test_a_network_with_cut_kernels_computes_less() -> None:
    """The last stage of `small` has one voxel left of 16: a 27th of two convolutions remains, an eighth of another."""
    network = encoder()
    before = flops_of_lesion(network, (16, 16, 16), num_views=0, num_watched=1)
    skip_padded_kernels(network)
    less = before - flops_of_lesion(network, (16, 16, 16), num_views=0, num_watched=1)
    assert less >= 2 * 8 * 8 * ((27 - 8) + (27 - 1))  # multiply and add, 8 channels to 8


def test_a_relu_after_the_pooling_gives_the_same_bits() -> None:
    """Of 40 voxels every stage has so many left that no kernel is cut."""
    network = shipped("small")
    other = copy.deepcopy(network)
    skip_padded_kernels(other)
    sizes: list[int] = []
    relu: Any = other.maxpool[1]  # type: ignore[index]
    relu.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[2]))
    patches = torch.randn(4, 1, 40, 40, 40)
    result, expected = (a_step(net, lambda net=net: net(patches)) for net in (other, network))  # type: ignore[misc]
    assert all(torch.equal(result[key], value) for key, value in expected.items())
    assert other.state_dict().keys() == network.state_dict().keys()
    assert sizes == [10]  # 40 voxels, halved by the first convolution and by the pooling


class Standardized(nn.Conv3d):
    """Weight standardization: a layer with a `forward` of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.conv3d(inputs, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


def test_layers_with_a_way_of_their_own_keep_it() -> None:
    network = nn.Sequential(
        Standardized(1, 2, 3, padding=1),
        nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(2, 2, 3, padding="same"),
    )
    patches = torch.randn(1, 1, 1, 1, 1)
    expected = network(patches)
    skip_padded_kernels(network)
    assert torch.equal(network(patches), expected)
    torch.testing.assert_close(network(patches[0]), expected[0])  # a patch without a batch


# Gradient checkpointing


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv3d(1, 3, 3), nn.Dropout(0.5), nn.Conv3d(3, 2, 3))
        self.stage = nn.Sequential(block)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.stage(patches).flatten(1)
        return out


@pytest.mark.parametrize(("build", "num_blocks"), [(encoder, 4), (Dropping, 1)])
def test_recomputed_blocks_give_the_same_bits(build: Callable[[], nn.Module], num_blocks: int) -> None:
    """Batch norm counts once, dropout is drawn once, and a copy has weights of its own."""
    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = build()
        if recomputed:
            assert recompute_blocks(network) == num_blocks
            copied = copy.deepcopy(network)  # as the target of BYOL is made
        torch.manual_seed(3)
        results.append(a_step(network))
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())
    assert network.state_dict().keys() == build().state_dict().keys()
    network.zero_grad()
    a_step(copied)
    assert all(weight.grad is None for weight in network.parameters())


def saved_bytes(network: nn.Module) -> int:
    """Of what autograd keeps for the backward, each tensor once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(views())
    out.sum().backward()
    return sum(storages.values())


@pytest.mark.parametrize("build", [encoder, CenterPooledResNet])
def test_recomputed_blocks_keep_less(build: Callable[[], nn.Module]) -> None:
    network = build()
    plain = saved_bytes(network)
    recompute_blocks(network)
    assert saved_bytes(network) < 0.7 * plain


def test_every_encoders_blocks_are_found() -> None:
    assert NUM_BLOCKS.keys() == {path.stem for path in (REPO / "configs" / "encoder").glob("*.yaml")}
    with torch.device("meta"):
        assert {name: recompute_blocks(shipped(name)) for name in NUM_BLOCKS} == NUM_BLOCKS
    with pytest.raises(ValueError, match=r"Flatten has no blocks.*hardware\.gradient_checkpointing=false"):
        recompute_blocks(nn.Flatten())


# Compilation: what is compiled when, by a backend that writes no C++


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.slow
def test_only_training_passes_are_compiled_once_for_each_shape(compiled_graphs: CompileCounterWithBackend) -> None:
    network, expected = encoder(), a_step(encoder())
    skip_padded_kernels(network)
    compile_training(network)
    assert network.state_dict().keys() == encoder().state_dict().keys()
    assert_close(a_step(network), expected, rtol=1e-5)
    assert compiled_graphs.frame_count == 1  # one graph: nothing of it runs uncompiled
    a_step(network)
    network.eval()
    network(views(3))
    network.train()
    with torch.no_grad():
        network(views(3))
    assert compiled_graphs.frame_count == 1
    network(views(3))
    assert compiled_graphs.frame_count == 2


@pytest.mark.parametrize(
    ("forwards", "chunk_size"), [pytest.param("joint", None, marks=pytest.mark.slow), ("separate", 3)]
)
@pytest.mark.usefixtures("compiled_graphs")
def test_all_switches_together_in_a_step_with_chunks(forwards: Any, chunk_size: int | None) -> None:
    sets = views(24).split(6)
    batch: ViewPairs = {"positive": (sets[0], sets[1]), "negative": (sets[2], sets[3])}
    results = []
    for switches in (True, False):
        network = encoder()
        if switches:
            for switch in (lay_out_channels_last, skip_padded_kernels, recompute_blocks, compile_training):
                switch(network)
        torch.manual_seed(1)
        loss = NTXentNegativeMinedLoss(negatives="mined_and_lesions")
        parts = Parts(network, torch.optim.SGD, head=nn.Linear(8, 4), loss=loss)  # type: ignore[arg-type]
        module = MinedContrast(parts, forwards=forwards, chunk_size=chunk_size)
        results.append(a_step(module, lambda module=module: module.loss(module.embed(batch))))  # type: ignore[misc]
    assert_close(results[0], results[1], rtol=2e-4)
