"""What makes a step faster or smaller and leaves what it learns as it was: the switches of `configs/hardware/`.

They change networks in place, but not the names and shapes of weights, so that a checkpoint fits a run with other
switches. What each is worth: docs/step.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


def resolve_precision(precision: str, accelerator: str) -> str:
    """What a precision is on this machine: `auto` is chosen, and `16-mixed` is `bf16-mixed` where torch lacks it.

    Args:
        precision: Lightning's, or `"auto"`: mixed with bfloat16 on a GPU that multiplies it in hardware, else float32.
            CPUs that could are not trusted: torch 2.15 gives wrong gradients there (docs/step.md).
        accelerator: Lightning's.
    """
    if precision in ("16", "16-mixed") and accelerator in ("cpu", "auto"):
        return precision if accelerator == "auto" and torch.accelerator.is_available() else "bf16-mixed"
    if precision != "auto":
        return precision
    has_gpu = accelerator in ("gpu", "auto") and torch.cuda.is_available()
    return "bf16-mixed" if has_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def lay_out_channels_last(network: nn.Module) -> None:
    """Keep the weights of 3D convolutions with the channels innermost; what goes through them then follows.

    Views have one channel, for which both layouts are the same, so they need no change.
    """
    for weight in network.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.to(memory_format=torch.channels_last_3d)


def skip_padded_kernels(network: nn.Module) -> None:
    """Leave out work that changes no value and no gradient.

    Of the kernels of 3D convolutions what meets nothing but zero padding: on a grid of one voxel, where small patches
    end, 26 of the 27 parts of a 3 x 3 x 3 kernel. Of the ReLU before the pooling of MONAI's ResNets what pooling drops:
    seven of eight voxels. Layers with a `forward` of their own stay as they are.
    """
    for layer in network.modules():
        if getattr(layer.forward, "__func__", None) not in (nn.Conv3d.forward, ResNet.forward):
            continue
        if isinstance(layer, ResNet) and isinstance(layer.act, nn.ReLU) and not layer.no_max_pool:
            # The greatest number above zero is the greatest one, cut off at zero.
            layer.act, layer.maxpool = nn.Identity(), nn.Sequential(layer.maxpool, layer.act)
        elif isinstance(layer, nn.Conv3d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer.forward = partial(_convolved, layer)  # type: ignore[method-assign]


def _convolved(layer: nn.Conv3d, inputs: Tensor) -> Tensor:
    if inputs.ndim != 5:  # one patch without its batch, or what torch refuses
        return type(layer).forward(layer, inputs)
    weight, paddings = layer.weight, []
    padded = cast(tuple[int, ...], layer.padding)  # no word: `skip_padded_kernels` leaves those layers alone
    axes = zip(inputs.shape[2:], layer.kernel_size, padded, layer.stride, layer.dilation, strict=True)
    for axis, (size, kernel_size, padding, stride, dilation) in enumerate(axes, start=2):
        first, count, still_padded = _met_part(size, kernel_size, padding, stride, dilation)
        weight = weight.narrow(axis, first, count)
        paddings.append(still_padded)
    return F.conv3d(inputs, weight, layer.bias, layer.stride, paddings, layer.dilation, layer.groups)


def _met_part(size: int, kernel_size: int, padding: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """The part of a kernel that ever meets a voxel of the input, along one axis.

    Args:
        size: of the input, voxels.
        kernel_size: parts of the kernel; the first is `padding` voxels before the input at the first position.
        padding: voxels of zeros on either side.
        stride: voxels from one position to the next.
        dilation: voxels from one part of the kernel to the next.

    Returns:
        The first part that is needed, how many are, and the padding with which these give the same; the whole kernel
        where none do, since both sides are padded alike.
    """
    num_positions = (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1
    starts = range(-padding, -padding + num_positions * stride, stride)
    met = [part for part in range(kernel_size) if any(0 <= start + part * dilation < size for start in starts)]
    if not met:
        return 0, kernel_size, padding
    first, count = met[0], met[-1] - met[0] + 1
    less = padding - first * dilation
    if less < 0 or (size + 2 * less - dilation * (count - 1) - 1) // stride + 1 != num_positions:
        return 0, kernel_size, padding
    return first, count, less


def recompute_blocks(encoder: nn.Module) -> int:
    """Drop the activations within each block of an encoder and compute them again in the backward.

    A block is a module with parts of its own in a stage, which is a child that is a list or a sequence: the residual
    blocks of a ResNet. The second pass draws the random numbers of the first and leaves running statistics as they
    were. Does nothing without gradients.

    Returns:
        The number of blocks.

    Raises:
        ValueError: the encoder has none.
    """
    stages = [child for child in encoder.children() if isinstance(child, nn.Sequential | nn.ModuleList)]
    blocks = [block for stage in stages for block in stage if next(block.children(), None) is not None]
    if not blocks:
        raise ValueError(
            f"{type(encoder).__name__} has no blocks to compute again, which are looked for in its Sequential and "
            "ModuleList children: set hardware.gradient_checkpointing=false, or use method.chunk_size"
        )
    for block in blocks:
        block.forward = partial(_recomputed_block, block)
    return len(blocks)


def _recomputed_block(block: nn.Module, *inputs: Any) -> Any:
    return recomputed(partial(type(block).forward, block), block, *inputs)


def recomputed(forward: Callable[..., Any], networks: nn.Module, *inputs: Any) -> Any:
    """What `forward(*inputs)` gives, without its activations: the backward computes them again.

    The second pass draws the random numbers of the first, and leaves the buffers of the networks that it runs as they
    were.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if torch.compiler.is_compiling():  # the compiler cuts the second pass down to what the backward reads
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _BuffersKept(networks)))


class _BuffersKept(AbstractContextManager[None]):
    """Leaves the buffers of networks as it found them; may be entered again."""

    def __init__(self, networks: nn.Module) -> None:
        self.networks = networks

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in self.networks.buffers()]

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for buffer, value in self.before:
            buffer.copy_(value)
        del self.before


def compile_training(encoder: nn.Module) -> None:
    """Compile an encoder with torch's compiler, one program for each shape of batch that it is trained with.

    Only passes of a network in training mode that want a gradient are compiled, so probes and exports with their other
    shapes cost no compilation. Needs a C++ compiler on a CPU, Triton on a GPU; without, the first step fails.
    """
    logger.info("the encoder is compiled in the first step, which takes a minute or more")
    compiled = torch.compile(type(encoder).forward, dynamic=False)
    encoder.forward = partial(_compiled_in_training, encoder, compiled)


def _compiled_in_training(encoder: nn.Module, compiled: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    forward = compiled if encoder.training and torch.is_grad_enabled() else type(encoder).forward
    return forward(encoder, *inputs, **options)
