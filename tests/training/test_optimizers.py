"""Optimizers against loops written from the papers; schedules against torch's own pieces put in sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from fmcib_ssl.training.build import learning_rate
from fmcib_ssl.training.optimizers import (
    _parameter_groups,
    adamw,
    constant,
    lars,
    warmup_cosine,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(24, 5), nn.LayerNorm(5))


def train(
    make: Callable[[Any], Optimizer], num_steps: int = 6
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Weights before, the gradients of every step, weights after."""
    model = network()
    optimizer = make(model.named_parameters())
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    gradients = []
    for step in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 4, 4, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        gradients.append({name: p.grad.double().numpy().copy() for name, p in model.named_parameters()})  # type: ignore[union-attr]
        optimizer.step()
    return before, gradients, {name: p.detach().double().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.1])
def test_lars_is_the_papers_loop(weight_decay: float) -> None:
    lr, momentum, trust = 0.3, 0.9, 0.02
    make = partial(lars, lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coeff=trust)
    weights, gradients, after = train(make)
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    for gradient in gradients:
        for name, w in weights.items():
            g = gradient[name]
            if w.ndim > 1:  # algorithm 1: v = m v + gamma lambda (g + beta w), lambda = eta |w| / (|g| + beta |w|)
                local = trust * np.linalg.norm(w) / (np.linalg.norm(g) + weight_decay * np.linalg.norm(w))
                velocity[name] = momentum * velocity[name] + lr * local * (g + weight_decay * w)
            else:
                velocity[name] = momentum * velocity[name] + lr * g
            weights[name] = w - velocity[name]
    for name, expected in weights.items():
        np.testing.assert_allclose(after[name], expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_papers_loop(fused: bool) -> None:
    lr, beta1, beta2, decay = 0.01, 0.8, 0.99, 0.1
    weights, gradients, after = train(partial(adamw, lr=lr, betas=(beta1, beta2), weight_decay=decay, fused=fused))
    mean = {name: np.zeros_like(w) for name, w in weights.items()}
    square = {name: np.zeros_like(w) for name, w in weights.items()}
    for t, gradient in enumerate(gradients, start=1):
        for name, w in weights.items():
            g = gradient[name]
            mean[name] = beta1 * mean[name] + (1 - beta1) * g
            square[name] = beta2 * square[name] + (1 - beta2) * g**2
            update = mean[name] / (1 - beta1**t) / (np.sqrt(square[name] / (1 - beta2**t)) + 1e-8)
            weights[name] = w - lr * (update + (decay * w if w.ndim > 1 else 0))
    for name, expected in weights.items():
        np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_groups_hold_every_trained_parameter_once() -> None:
    model = network()
    model.register_parameter("log_temperature", nn.Parameter(torch.tensor(0.1)))
    model.register_parameter("bias", nn.Parameter(torch.zeros(2, 2)))
    model[3].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    names = {id(p): name for name, p in model.named_parameters()}
    weights, rest = _parameter_groups(model.named_parameters(), weight_decay=0.3)
    assert [names[id(p)] for p in weights["params"]] == ["0.weight"]
    assert sorted(names[id(p)] for p in rest["params"]) == sorted(
        ["0.bias", "1.weight", "1.bias", "3.bias", "4.weight", "4.bias", "log_temperature", "bias"]
    )
    assert (weights["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert (weights["name"], rest["name"]) == ("weights", "biases_and_norms")


def test_groups_without_members_are_left_out() -> None:
    assert [g["name"] for g in _parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), 0.1)] == ["weights"]
    with pytest.raises(ValueError, match="nothing to train"):
        _parameter_groups(network().requires_grad_(False).named_parameters(), 0.1)


def test_learning_rate_scales_with_the_global_batch() -> None:
    settings: Any = SimpleNamespace(
        optimizer={"base_lr": 0.3, "reference_batch": 256},
        world_size=2,
        trainer=SimpleNamespace(accumulate_grad_batches=1),
    )
    assert learning_rate(settings, 32) == pytest.approx(0.075)  # as published
    assert learning_rate(settings, 2048) == pytest.approx(4.8)  # SimCLR's


@pytest.mark.parametrize("make", [partial(adamw, lr=0.01, fused=True), partial(adamw, lr=0.01, fused=False), lars])
def test_a_run_goes_on_with_another_layout_of_its_weights(make: Any) -> None:
    """Torch loads the state in the layout it was saved in; a fused step would not look."""
    make = partial(make, lr=0.01)

    def trained(resumed_as: torch.memory_format) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(2, 3, 3), nn.Flatten(), nn.Linear(24, 5))
        state: dict[str, Any] | None = None
        for layout in (torch.contiguous_format, resumed_as):
            model.to(memory_format=layout)
            optimizer = make(model.named_parameters())
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(2):
                optimizer.zero_grad()
                views = torch.randn(4, 2, 4, 4, 4, generator=torch.Generator().manual_seed(step))
                model(views).square().sum().backward()
                optimizer.step()
            state = optimizer.state_dict()
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}

    expected = trained(torch.contiguous_format)
    for name, weight in trained(torch.channels_last_3d).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def sgd(lr: float = 0.3) -> SGD:
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
    ours = rates(warmup_cosine(sgd(), 100, warmup=warmup, final_lr_ratio=final), 105)
    top = sgd()
    cosine = CosineAnnealingLR(top, T_max=100 - steps, eta_min=0.3 * final)
    if steps:
        for group in top.param_groups:
            group["lr"] = 0.3
        line = LinearLR(top, start_factor=1 / (steps + 1), total_iters=steps)
        expected = rates(SequentialLR(top, [line, cosine], milestones=[steps]), 100)
    else:
        expected = rates(cosine, 100)
    assert ours == pytest.approx([*expected, *[0.3 * final] * 5], rel=1e-6, abs=1e-9)  # after the end it stays


def test_constant_stays_after_warmup() -> None:
    assert rates(constant(sgd(), 10, warmup=3), 10) == pytest.approx([0.075, 0.15, 0.225, *[0.3] * 7])


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
        make(sgd(), total_steps, warmup=warmup)
    with pytest.raises(ValueError, match=r"final_lr_ratio=1\.5"):
        warmup_cosine(sgd(), 10, final_lr_ratio=1.5)
