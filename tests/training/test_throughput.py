"""Pace and progress against a clock that only the test moves, and operations against hand formulas."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from math import prod
from typing import Any

import lightning as L
import pytest
import torch
from tiny_trainer import Figures, tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmcib_ssl.models.encoders import monai_resnet
from fmcib_ssl.training import throughput
from fmcib_ssl.training.throughput import Progress, Throughput, flops_of_lesion

STEP_SECONDS = 4.0
#: Reading takes longer from batch to batch.
READ_SECONDS = (1.0, 6.0, 9.0)
FLOPS = 7_000_000_000_000


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Timed(L.LightningModule):
    """Each step takes seconds of a clock; the seventh says something and warns."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.weight = nn.Parameter(torch.zeros(1))
        self.flops_per_lesion: int | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        self.clock.now += STEP_SECONDS
        if self.global_step == 6:
            logging.getLogger("fmcib_ssl").info("a line of the log")
            warnings.warn("a warning of a library", stacklevel=1)
        loss = (self.weight - 2).square().sum()
        self.log("train/loss", loss.detach())
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def fit(clock: Clock, *callbacks: L.Callback, seconds: tuple[float, ...] = (0.0,) * 5, **options: Any) -> None:
    def collate(items: list[float]) -> dict[str, Any]:
        clock.now += sum(items)
        return {"positive": (torch.zeros(2), torch.zeros(2))}

    module = Timed(clock)
    module.flops_per_lesion = options.pop("flops", None)
    tiny_trainer(*callbacks, **options).fit(module, DataLoader(list(seconds), collate_fn=collate))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fmcib_ssl.training.throughput"]


def test_the_mean_of_a_window(clock: Clock) -> None:
    figures = Figures()
    fit(clock, Throughput(window=4), figures, seconds=READ_SECONDS, max_epochs=4, flops=FLOPS)
    waited = READ_SECONDS * 4
    for i in range(len(waited)):
        # The first five steps are on their own: they warm up, and the window begins with the last of them.
        window = waited[max(4, i - 3) : i + 1] if i >= 5 else waited[i : i + 1]
        seconds = sum(window) + STEP_SECONDS * len(window)
        logged = figures.steps[i]
        assert logged["perf/samples_per_s"] == pytest.approx(2 * len(window) / seconds)
        assert logged["perf/data_wait_share"] == pytest.approx(sum(window) / seconds)
        assert logged["perf/tflops"] == pytest.approx(7 * logged["perf/samples_per_s"])


def test_waiting_is_said_once_with_a_remedy(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        fit(clock, Throughput(), seconds=READ_SECONDS, max_epochs=20)
    (line,) = lines(caplog)
    assert re.match(
        r"5\d% of the time is spent waiting for data: raise hardware.num_workers, now 0; this machine", line
    )


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        Throughput(window=0)


def test_a_log_gets_a_line_now_and_then(clock: Clock, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        fit(clock, Throughput(), Progress(), max_steps=200, max_epochs=-1)
    shown = lines(caplog)
    # 4 s a step: a line with the first, then after at least 10, 20, 40, 80, 160 and 300 s.
    assert [int(line.split("/")[0].split()[1]) for line in shown] == [1, 4, 9, 19, 39, 79, 154]
    assert shown[0].startswith("step 1/200, loss 4, ") and "left" not in shown[0]
    assert re.fullmatch(r"step 79/200, loss 4, \S+ lesions/s, \d+% waiting, 0:08:04 left", shown[5])  # 121 steps: 484 s
    assert "\r" not in capfd.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_bar_and_the_log_above_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("fmcib_ssl"), "level", logging.INFO)
    fit(clock, Throughput(), Progress(), max_epochs=3, max_steps=12)
    text = terminal.getvalue()
    assert "12/12" in text and "loss 4, " in text
    assert not lines(caplog)
    for message in ("a line of the log", "a warning of a library"):
        before = text[: text.index(message)].rpartition("\n")[2]
        assert "\r" in before and "%|" not in before.rpartition("\r")[2]  # the bar was wiped
    assert logging.root.handlers == [handler]


def test_nothing_is_shown_if_nothing_is_asked_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with caplog.at_level(logging.INFO, "fmcib_ssl.training.throughput"):
        fit(clock, Progress(refresh_rate=0))
    assert not lines(caplog) and not terminal.getvalue()


def operations(layer: nn.Module, out: Tensor) -> int:
    """Two for each weight that each output is a sum over."""
    if isinstance(layer, nn.Conv3d):
        return 2 * out.numel() * prod(layer.kernel_size) * (layer.in_channels // layer.groups)
    return 2 * out.numel() * layer.in_features if isinstance(layer, nn.Linear) else 0


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1, "bias": False}, {"groups": 2}, {"dilation": 2}])
def test_operations_of_a_lesion(options: dict[str, int]) -> None:
    """Each layer once forward, once for its weights, once for its input if something before it is trained."""
    first, second = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 8, (3, 3, 2), **options)  # type: ignore[arg-type]
    network = nn.Sequential(first, nn.BatchNorm3d(4), nn.ReLU(), second, nn.AdaptiveAvgPool3d(1), nn.Flatten())
    network.append(last := nn.Linear(8, 5))
    forward: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda layer, _, out: forward.append(operations(layer, out)))
        for layer in (first, second, last)
    ]
    network.eval()(torch.zeros(1, 1, 9, 9, 9))
    for hook in hooks:
        hook.remove()
    a, b, c = forward
    before, random = [value.clone() for value in network.state_dict().values()], torch.get_rng_state()
    size = (9, 9, 9)
    assert flops_of_lesion(network, size, num_views=1) == 2 * a + 3 * b + 3 * c
    assert flops_of_lesion(network, size, num_views=4, num_watched=2) == 4 * (2 * a + 3 * b + 3 * c) + 2 * (a + b + c)
    first.requires_grad_(False)
    network[1].requires_grad_(False)
    assert flops_of_lesion(network, size, num_views=1) == a + 2 * b + 3 * c
    network.requires_grad_(False)
    assert flops_of_lesion(network, size, num_views=1) == a + b + c
    # Counting leaves no trace.
    assert all(map(torch.equal, before, network.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), random) and not network.training
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in network.parameters())


def test_the_published_trunk_takes_what_was_published() -> None:
    with torch.device("meta"):
        trunk = monai_resnet(50, widen_factor=2, conv1_t_stride=2)
    assert flops_of_lesion(trunk, (50, 50, 50), num_views=0, num_watched=1) / 1e9 == pytest.approx(25.7, abs=0.05)
