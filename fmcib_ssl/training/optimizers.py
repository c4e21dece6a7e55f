"""Optimizers over named parameters, with biases and norms in a group of their own, and learning-rate schedules.

Schedules count optimizer steps, and are stepped after each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NamedParameters = Iterable[tuple[str, nn.Parameter]]


def _parameter_groups(
    named_parameters: _NamedParameters, weight_decay: float, *, one_group: bool = False
) -> list[dict[str, Any]]:
    """Split parameters into `weights`, which decay, and `biases_and_norms`, which do not, unless they are one group.

    To the second belong those with at most one dimension, so a trained temperature too, and those named `bias`.
    Parameters that need no gradient are left out, as is a group without members.

    Raises:
        ValueError: nothing is left to train.
    """
    weights: list[nn.Parameter] = []
    biases_and_norms: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = not one_group and (parameter.ndim <= 1 or name.rpartition(".")[2] == "bias")
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
    named_parameters: _NamedParameters,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    trust_coeff: float = 0.001,
    one_group: bool = False,
) -> Optimizer:
    """LARS: SGD with momentum and a rate for each layer; for biases and norms it is plain SGD with momentum.

    Weights are adapted also where `weight_decay` is 0, unless everything is one group.

    Args:
        named_parameters: as from `Module.named_parameters()`.
        lr: the global rate.
        momentum: share of the last update that is kept, 0 to 1.
        weight_decay: added to the gradient, as a multiple of the weight.
        trust_coeff: how far a layer moves in one step at rate 1, relative to its norm.
        one_group: decay and adapt biases and norms as weights, as the code of Pai et al. 2024 does; nothing is
            adapted there where `weight_decay` is 0.

    Source: You et al. 2017, Large batch training of convolutional networks, algorithm 1. Departs from it, as torch's
    SGD does, in keeping momentum before the rate is multiplied in: a change of rate acts at once.
    """
    groups = _parameter_groups(named_parameters, weight_decay, one_group=one_group)
    for group in groups:
        group["always_adapt"] = group["name"] == "weights" and not one_group
    return _resumable(Lars(groups, lr=lr, momentum=momentum, trust_coeff=trust_coeff))


def adamw(
    named_parameters: _NamedParameters,
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
        betas: how much of the running means of gradient and squared gradient is kept in a step, 0 to 1.
        weight_decay: share of a weight that is taken away in a step at rate 1.
        fused: one kernel for all parameters. Set to False to clip gradients in float16 mixed precision.

    Source: Loshchilov and Hutter 2019, Decoupled weight decay regularization.
    """
    groups = _parameter_groups(named_parameters, weight_decay)
    return _resumable(AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused))


def _resumable(optimizer: Optimizer) -> Optimizer:
    """Let it resume from the state of a run whose weights had another layout in memory.

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


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1, final_lr_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `final_lr_ratio` of the rate.

    Warm-up starts at `1 / (warmup_steps + 1)`, since a step with rate 0 would be lost.

    Args:
        optimizer: its rates are the ones at the top.
        total_steps: optimizer steps of the whole training; from there on the rate stays.
        warmup: a float is a share of all steps, below 1; an integer is a number of steps.
        final_lr_ratio: rate at the end over rate at the top, 0 to 1.

    Raises:
        ValueError: warm-up takes all steps, or a number is out of range.

    Source: Loshchilov and Hutter 2017, SGDR, equation 5, without restarts; warm-up as in Goyal et al. 2017.
    """
    if not 0 <= final_lr_ratio <= 1:
        raise ValueError(f"final_lr_ratio={final_lr_ratio}: must be from 0 to 1.")
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: a schedule needs to know where training ends; set its length.")
    is_share = isinstance(warmup, float)
    if warmup < 0 or (is_share and warmup >= 1):
        raise ValueError(
            f"warmup={warmup}: a float is a share of all steps and must be from 0 to below 1; for a number of steps "
            "give a non-negative integer."
        )
    warmup_steps = round(warmup * total_steps) if is_share else int(warmup)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warm-up of {warmup_steps} steps (warmup={warmup}) takes all of the {total_steps} steps of training: "
            "warm up for less or train for longer."
        )
    return LambdaLR(optimizer, partial(_factor, warmup_steps, total_steps, final_lr_ratio))


def _factor(warmup_steps: int, total_steps: int, final_lr_ratio: float, step: int) -> float:
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return final_lr_ratio + (1 - final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1) -> LambdaLR:
    """Linear warm-up, then the same rate to the end: `warmup_cosine` with `final_lr_ratio=1`."""
    return warmup_cosine(optimizer, total_steps, warmup=warmup, final_lr_ratio=1.0)
