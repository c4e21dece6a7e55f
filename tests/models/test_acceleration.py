"""The switches of `hardware` change neither values nor gradients, names nor shapes: the plain step is the oracle."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import REPO, SIZE, SPEC, a_step, assert_close, encoder, encoder_of, views
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast, Parts
from fmcib_ssl.models.acceleration import (
    compile_training,
    lay_out_channels_last,
    recompute_blocks,
    resolve_precision,
    skip_padded_kernels,
)
from fmcib_ssl.models.encoders import CenterPooledResNet
from fmcib_ssl.models.export import export_encoder, load_encoder
from fmcib_ssl.types import Preprocessing, ViewPairs

#: Residual blocks as in the papers' tables.
NUM_BLOCKS = {
    "small": 4,
    "concentric": 2,
    "resnet10": 4,
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet50_wide": 16,
    "resnet101": 33,
    "r3d_18": 8,
    "mc3_18": 8,
    "r2plus1d_18": 8,
}


# Precision


@pytest.mark.parametrize(
    ("accelerator", "gpu_has_it", "expected"),
    [
        ("cpu", None, "32-true"),
        ("cpu", True, "32-true"),  # a GPU beside it does not count
        ("gpu", True, "bf16-mixed"),
        ("gpu", False, "32-true"),  # a V100 has tensor cores, and none for bfloat16
        ("auto", True, "bf16-mixed"),
        ("auto", None, "32-true"),
        ("mps", None, "32-true"),
    ],
)
def test_auto_is_bfloat16_where_a_gpu_multiplies_it(
    accelerator: str, gpu_has_it: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_has_it is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(gpu_has_it))
    assert resolve_precision("auto", accelerator) == expected


@pytest.mark.parametrize(
    ("accelerator", "gpu", "expected"),
    [("cpu", True, "bf16-mixed"), ("auto", False, "bf16-mixed"), ("auto", True, "16-mixed"), ("gpu", True, "16-mixed")],
)
def test_a_cpu_has_no_mixed_float16(
    accelerator: str, gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would choose the same there, and say so in its own words."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    assert resolve_precision("16-mixed", accelerator) == expected
    assert resolve_precision("bf16-true", accelerator) == "bf16-true"


# Layout


def test_channels_last_reaches_the_activations_and_changes_no_value() -> None:
    plain, other = (encoder().to(memory_format=torch.contiguous_format) for _ in range(2))
    lay_out_channels_last(other)
    layouts: list[bool] = []
    layer: Any = other.layer2
    layer.register_forward_hook(
        lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last_3d))
    )
    large = torch.randn(2, 1, 40, 40, 40)  # still several cells in layer2
    found, expected = (a_step(network, lambda _, network=network: network(large)) for network in (other, plain))  # type: ignore[misc]
    assert_close(found, expected, rtol=1e-3)
    assert layouts == [True]


def test_what_is_exported_is_the_same_in_either_layout(tmp_path: Path) -> None:
    for name, memory_format in (("one", torch.contiguous_format), ("other", torch.channels_last_3d)):
        export_encoder(encoder().to(memory_format=memory_format), SPEC, Preprocessing(SIZE), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    loaded = load_encoder(tmp_path / "one").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in encoder().state_dict().items())


# Gradient checkpointing


def test_recomputed_blocks_give_the_same_bits_and_count_batch_norm_once() -> None:
    expected, network = a_step(encoder()), encoder()
    assert recompute_blocks(network) == 4
    found = a_step(network)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert int(found["bn1.num_batches_tracked"]) == int(found["layer1.0.bn1.num_batches_tracked"]) == 1
    assert network.state_dict().keys() == encoder().state_dict().keys()


def saved_bytes(network: nn.Module) -> int:
    """Of what autograd keeps for the backward, each tensor once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(views())
    out.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("build", [encoder, CenterPooledResNet])
def test_recomputed_blocks_keep_less(build: Callable[[], nn.Module]) -> None:
    network = build()
    plain = saved_bytes(network)
    recompute_blocks(network)
    assert saved_bytes(network) < 0.7 * plain


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv3d(1, 3, 3), nn.Dropout(0.5), nn.Conv3d(3, 2, 3))
        self.stage = nn.Sequential(block)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.stage(patches).flatten(1)
        return out


def test_dropout_is_drawn_once() -> None:
    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = Dropping()
        if recomputed:
            recompute_blocks(network)
        results.append(a_step(network))
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_a_copy_runs_with_weights_of_its_own() -> None:
    """As the target of BYOL and the trial of `auto_batch` are made."""
    network = encoder()
    recompute_blocks(network)
    copied = copy.deepcopy(network)
    a_step(copied)
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize("path", sorted((REPO / "configs" / "encoder").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_encoders_blocks_are_found(path: Path) -> None:
    with torch.device("meta"):
        network = encoder_of(path)
    assert recompute_blocks(network) == NUM_BLOCKS[path.stem]


def test_an_encoder_without_blocks_is_refused() -> None:
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


def made(switches: bool, **options: Any) -> MinedContrast:
    network = encoder()
    if switches:
        lay_out_channels_last(network)
        skip_padded_kernels(network)
        recompute_blocks(network)
        compile_training(network)
    torch.manual_seed(1)
    loss = NTXentNegativeMinedLoss(negatives="mined_and_lesions")
    return MinedContrast(Parts(network, torch.optim.SGD, head=nn.Linear(8, 4), loss=loss), **options)  # type: ignore[arg-type]


def loss_of(module: MinedContrast) -> Callable[[Any], Tensor]:
    sets = views(24).split(6)
    batch: ViewPairs = {"positive": (sets[0], sets[1]), "negative": (sets[2], sets[3])}
    return lambda _: module.loss(module.embed(batch))


@pytest.mark.parametrize(("forwards", "chunk_size"), [("joint", None), ("separate", 3)])
@pytest.mark.usefixtures("compiled_graphs")
def test_all_switches_together_in_a_step_with_chunks(forwards: Any, chunk_size: int | None) -> None:
    modules = [made(switches, forwards=forwards, chunk_size=chunk_size) for switches in (True, False)]
    found, expected = (a_step(module, loss_of(module)) for module in modules)
    assert_close(found, expected, rtol=2e-4)


def test_an_encoder_that_cannot_be_compiled_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    network = encoder()
    compile_training(network)
    with caplog.at_level(logging.WARNING):
        found = [a_step(network), a_step(network)]
    expected = encoder()
    assert all(torch.equal(found[0][name], value) for name, value in a_step(expected).items())
    assert all(torch.equal(found[1][name], value) for name, value in a_step(expected).items())
    assert len(caplog.records) == 1
    assert "hardware.compile" in caplog.text and "no working C++ compiler found" in caplog.text


def test_an_error_of_the_encoder_stays_its_own(compiled_graphs: CompileCounterWithBackend) -> None:
    network = encoder()
    compile_training(network)
    with pytest.raises(RuntimeError, match=r"expected input.*to have 1 channels"):
        network(torch.zeros(2, 3, *SIZE))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    network, expected = encoder(), a_step(encoder())
    recompute_blocks(network)
    compile_training(network)
    assert_close(a_step(network), expected, rtol=1e-4)
