"""Schedules against torch's own pieces put in sequence."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from fmcib_ssl.training.schedules import constant, warmup_cosine, warmup_cosine_factor


def optimizer(lr: float = 0.3) -> SGD:
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler: LRScheduler, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The epoch parameter in", UserWarning)  # torch's SequentialLR to itself
            scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.0, 0), (1, 1), (10, 10), (0.25, 25), (99, 99)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_warmup_cosine_is_torchs_line_and_cosine(warmup: float, steps: int, final: float) -> None:
    ours = rates(warmup_cosine(optimizer(), 100, warmup=warmup, final_lr_ratio=final), 100)
    sgd = optimizer()
    cosine = CosineAnnealingLR(sgd, T_max=100 - steps, eta_min=0.3 * final)
    if steps:
        for group in sgd.param_groups:
            group["lr"] = 0.3
        line = LinearLR(sgd, start_factor=1 / (steps + 1), total_iters=steps)
        expected = rates(SequentialLR(sgd, [line, cosine], milestones=[steps]), 100)
    else:
        expected = rates(cosine, 100)
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_rate_rises_to_the_top_falls_to_the_end_and_stays() -> None:
    factor = partial(warmup_cosine_factor, total_steps=50, warmup_steps=10, final_lr_ratio=0.01)
    values = [factor(step) for step in range(60)]
    assert 0 < values[0] < values[1] < values[9] < values[10] == 1
    assert all(before > after for before, after in pairwise(values[10:51]))
    assert values[30] == pytest.approx((1 + 0.01) / 2)
    assert values[50:] == pytest.approx([0.01] * 10)


def test_constant_stays_after_warmup() -> None:
    assert rates(constant(optimizer(), 10, warmup=3), 10) == pytest.approx([0.075, 0.15, 0.225, *[0.3] * 7])


def test_state_is_plain_and_resumes() -> None:
    scheduler = warmup_cosine(optimizer(), 20, warmup=0.2)
    rates(scheduler, 7)
    resumed = warmup_cosine(optimizer(), 20, warmup=0.2)
    resumed.load_state_dict(scheduler.state_dict())
    for group, other in zip(resumed.optimizer.param_groups, scheduler.optimizer.param_groups, strict=True):
        group["lr"] = other["lr"]  # part of the optimizer's own state
    assert rates(resumed, 10) == pytest.approx(rates(scheduler, 10))


@pytest.mark.parametrize("make", [warmup_cosine, constant])
@pytest.mark.parametrize(
    ("total_steps", "warmup", "message"),
    [
        (20, 20, "takes all of the 20 steps"),
        (3, 0.9, "warm-up of 3 steps"),
        (20, 1.0, "share of all steps"),
        (20, -1, "warmup=-1"),
        (0, 0, "total_steps=0"),
        (-1, 0, "total_steps=-1"),
    ],
)
def test_impossible_schedules_are_refused(make: type, total_steps: int, warmup: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer(), total_steps, warmup=warmup)


def test_final_rate_above_the_top_is_refused() -> None:
    with pytest.raises(ValueError, match=r"final_lr_ratio=1\.5"):
        warmup_cosine(optimizer(), 10, final_lr_ratio=1.5)
