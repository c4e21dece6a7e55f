"""Floating-point operations of a network, counted without computing anything; and what a card could do at most.

A multiplication and an addition are two. Counted is what a step is for: forward and back of every view, not what a
chunk's second forward or gradient checkpointing repeats; of the layers only convolutions and products of matrices,
which are all but a few per cent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

#: Dense peaks in TFLOP/s by how the numbers are held: no sparsity, and sums kept in float32. The first pattern that
#: `torch.cuda.get_device_name` matches counts. Lightning's own table has sparse peaks for some cards and dense ones
#: for others (its issue 21677).
#: Source: NVIDIA's data sheets and architecture white papers of these cards; where they give peaks with sparsity, half.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    r"H200 NVL|H100 NVL": {"bf16": 835.5, "16": 835.5, "tf32": 417.5, "32": 60.0},
    r"H200|GH200|H100.*HBM3": {"bf16": 989.5, "16": 989.5, "tf32": 494.5, "32": 67.0},
    r"H100 PCIe|H100.*HBM2e": {"bf16": 756.0, "16": 756.0, "tf32": 378.0, "32": 51.0},
    r"A100": {"bf16": 312.0, "16": 312.0, "tf32": 156.0, "32": 19.5},
    r"A40\b": {"bf16": 149.7, "16": 149.7, "tf32": 74.8, "32": 37.4},
    r"RTX A6000": {"bf16": 154.8, "16": 154.8, "tf32": 77.4, "32": 38.7},
    r"L40S": {"bf16": 362.0, "16": 362.0, "tf32": 183.0, "32": 91.6},
    r"RTX 4090\b(?! Laptop)": {"bf16": 165.2, "16": 165.2, "tf32": 82.6, "32": 82.6},
    r"RTX 3090\b(?! Ti)": {"bf16": 71.0, "16": 71.0, "tf32": 35.6, "32": 35.6},
    r"V100.*SXM": {"16": 125.0, "32": 15.7},
    r"V100-PCIE": {"16": 112.0, "32": 14.0},
    r"Tesla T4": {"16": 65.0, "32": 8.1},
}


def forward_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Operations of `module(x)` for an `x` of this shape."""
    return _count(module, input_shape)[0]


def training_flops(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Operations of `module(x)` and of its gradients in all weights that are trained, for an `x` of this shape."""
    return _count(module, input_shape)[1]


def flops_of_lesion(network: nn.Module, patch_size_zyx: Sequence[int], *, num_views: int, num_watched: int = 0) -> int:
    """Operations that a step takes for each lesion.

    Args:
        network: what a view goes through, `(batch, 1, z, y, x)` in.
        patch_size_zyx: voxels of a view along z, y, x.
        num_views: of a lesion and its negatives that go through it, forward and back.
        num_watched: that go through a copy of it whose weights another way follow: forward only.
    """
    forward, training = _count(network, (2, 1, *patch_size_zyx))  # two: batch norm wants more than one
    return (num_views * training + num_watched * forward) // 2


def peak_flops(device_name: str, precision: str, *, tf32: bool) -> float | None:
    """Dense peak of a card, operations a second; None if it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: Lightning's, such as `bf16-mixed`.
        tf32: whether float32 is multiplied as TF32 where a card can.
    """
    held = precision.partition("-")[0]
    if " MIG " in device_name:  # a part of a card
        return None
    for pattern, peaks in PEAK_TFLOPS.items():
        if re.search(pattern, device_name):
            peak = peaks.get("tf32", peaks["32"]) if held == "32" and tf32 else peaks.get(held)
            return None if peak is None else peak * 1e12
    return None


def _count(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """Forward alone, and forward with backward; on tensors that have shapes and no numbers."""
    state = {
        name: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    back = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=back) as counter:
        out = functional_call(module, state, (torch.empty(tuple(input_shape), device="meta"),))
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops()


def _convolution_backward_flops(
    gradient: list[int], inputs: list[int], weight: list[int], *rest: Any, out_shape: object, **_: Any
) -> int:
    """As many as forward for each of the gradients of input and weight; torch forgets groups in the second."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest
    return int(conv_flop_count(inputs, weight, gradient, transposed=transposed) * sum(wanted[:2]))
