"""Learning-rate schedules that count optimizer steps and are stepped after each."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine_factor(step: int, *, total_steps: int, warmup_steps: int = 0, final_lr_ratio: float = 0.0) -> float:
    """What the rate is multiplied with: up in a line, then down in half a cosine.

    Args:
        step: optimizer steps taken so far.
        total_steps: of the whole training; from there on the factor stays at `final_lr_ratio`.
        warmup_steps: the factor first is 1 after as many steps; it starts at `1 / (warmup_steps + 1)`, since a step
            with rate 0 would be lost.
        final_lr_ratio: the factor at the end.

    Source: Loshchilov and Hutter 2017, SGDR, equation 5, without restarts; warm-up as in Goyal et al. 2017.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return final_lr_ratio + (1 - final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1, final_lr_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `final_lr_ratio` of the rate.

    Args:
        optimizer: its rates are the ones at the top.
        total_steps: optimizer steps of the whole training.
        warmup: a float is a share of all steps, below 1; an integer is a number of steps.
        final_lr_ratio: rate at the end over rate at the top.

    Raises:
        ValueError: warm-up takes all steps, or a number that makes no sense.
    """
    if not 0 <= final_lr_ratio <= 1:
        raise ValueError(f"final_lr_ratio={final_lr_ratio}: must be from 0 to 1.")
    warmup_steps = _warmup_steps(warmup, total_steps)
    factor = partial(
        warmup_cosine_factor, total_steps=total_steps, warmup_steps=warmup_steps, final_lr_ratio=final_lr_ratio
    )
    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1) -> LambdaLR:
    """Linear warm-up, then the same rate to the end: `warmup_cosine` with `final_lr_ratio=1`."""
    return warmup_cosine(optimizer, total_steps, warmup=warmup, final_lr_ratio=1.0)


def _warmup_steps(warmup: float, total_steps: int) -> int:
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
    return warmup_steps
