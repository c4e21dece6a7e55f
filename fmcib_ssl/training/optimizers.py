"""Optimizers over named parameters, with biases and norms in a group of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def scaled_learning_rate(base_lr: float, global_batch: int, reference_batch: int = 256) -> float:
    """The rate for a batch, in proportion to it.

    Args:
        base_lr: for a batch of `reference_batch`.
        global_batch: lesions per optimizer step: all devices, all accumulated batches.
        reference_batch: what `base_lr` is meant for.

    Raises:
        ValueError: a batch is below 1.

    Source: Goyal et al. 2017, Accurate, large minibatch SGD; SimCLR trains with 0.3 for 256.
    """
    if global_batch < 1 or reference_batch < 1:
        raise ValueError(f"global_batch={global_batch}, reference_batch={reference_batch}: both must be at least 1.")
    return base_lr * global_batch / reference_batch


def parameter_groups(named_parameters: NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into `weights`, which decay, and `biases_and_norms`, which do not.

    To the second belong those with at most one dimension, so a trained temperature too, and those named `bias`.
    Parameters that need no gradient are left out, as is a group without members.

    Raises:
        ValueError: nothing is left to train.
    """
    weights: list[nn.Parameter] = []
    biases_and_norms: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
            (biases_and_norms if plain else weights).append(parameter)
    groups = [
        {"params": weights, "weight_decay": weight_decay, "name": "weights"},
        {"params": biases_and_norms, "weight_decay": 0.0, "name": "biases_and_norms"},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("no parameter needs a gradient: there is nothing to train.")
    return groups


def lars(
    named_parameters: NamedParameters,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    trust_coeff: float = 0.001,
) -> Optimizer:
    """LARS: SGD with momentum and a rate for each layer; for biases and norms it is plain SGD with momentum.

    Weights are adapted also where `weight_decay` is 0.

    Args:
        named_parameters: as from `Module.named_parameters()`.
        lr: the global rate.
        momentum: of the update.
        weight_decay: of the weights.
        trust_coeff: how far a layer moves in one step at rate 1, relative to its norm.

    Source: You et al. 2017, Large batch training of convolutional networks, algorithm 1. Departs from it, as torch's
    SGD does, in keeping momentum before the rate is multiplied in: a change of rate acts at once.
    """
    groups = parameter_groups(named_parameters, weight_decay)
    for group in groups:
        group["always_adapt"] = group["name"] == "weights"
    return _resumable(Lars(groups, lr=lr, momentum=momentum, trust_coeff=trust_coeff))


def adamw(
    named_parameters: NamedParameters,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.05,
    fused: bool = True,
) -> Optimizer:
    """AdamW; biases and norms do not decay.

    Args:
        named_parameters: as from `Module.named_parameters()`.
        lr: the rate.
        betas: of the running means of gradient and squared gradient.
        weight_decay: of the weights.
        fused: one kernel for all parameters. Set to False to clip gradients in float16 mixed precision.

    Source: Loshchilov and Hutter 2019, Decoupled weight decay regularization.
    """
    groups = parameter_groups(named_parameters, weight_decay)
    return _resumable(AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused))


def _resumable(optimizer: Optimizer) -> Optimizer:
    """Let it go on from the state of a run whose weights had another layout in memory.

    Torch loads the state in the layout that it was saved in, and a fused step on a CPU takes weight and state to have
    the same one without looking: it would update each weight with the averages of others.
    """
    optimizer.register_load_state_dict_post_hook(_lay_out_as_weights)
    return optimizer


def _lay_out_as_weights(optimizer: Optimizer) -> None:
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
