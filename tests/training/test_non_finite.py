"""Steps that are not finite: left out as if they had never been, on every rank alike, and found again by a replay."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from tiny_trainer import on_two_ranks, tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmcib_ssl.command import replay as command
from fmcib_ssl.models.export import read_archive
from fmcib_ssl.training import non_finite
from fmcib_ssl.training.non_finite import NonFiniteGuard, TrainingFaultError

NUM_BATCHES = 6


class Small(L.LightningModule):
    """Batch norm, momentum and a schedule: all that a bad step could leave something in."""

    def __init__(self, name: str = "adamw") -> None:
        super().__init__()
        self.name = name
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        embeddings = self.net(batch["positive"][0])
        return {"loss": embeddings.square().mean() * batch["factor"].mean(), "embeddings": embeddings.detach()}

    def configure_optimizers(self) -> Any:
        optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if self.name == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(bad: dict[int, str]) -> list[dict[str, Any]]:
    made = []
    for i in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(i)
        one: dict[str, Any] = {"positive": (torch.randn(4, 3, generator=generator),), "lesion": torch.arange(4) + 4 * i}
        one["factor"] = torch.ones(1)
        if bad.get(i) == "view":
            one["positive"][0][2, 1] = math.nan
        elif bad.get(i) == "loss":
            one["factor"] *= math.inf
        made.append(one)
    return made


class Watcher(L.Callback):
    """Comes after the guard, and keeps whether it saw a step's embeddings."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append("embeddings" in outputs)


def fit(
    folder: Path, bad: dict[int, str], name: str = "adamw", *, trainer: dict[str, Any] | None = None, **guard: Any
) -> tuple[Small, NonFiniteGuard, Watcher]:
    module, callbacks = Small(name), (NonFiniteGuard(folder / "faults", **guard), Watcher())
    tiny_trainer(*callbacks, **(trainer or {})).fit(module, DataLoader(batches(bad), batch_size=None, shuffle=False))
    return module, *callbacks


@pytest.mark.parametrize(
    ("what", "name", "accumulate"), [("view", "adamw", 1), ("loss", "sgd", 1), ("view", "sgd", 2), (None, "adamw", 1)]
)
def test_a_step_that_is_left_out_leaves_nothing(what: str | None, name: str, accumulate: int, tmp_path: Path) -> None:
    """Oracle: the training written out, with that step's forward and backward never done."""
    bad = {} if what is None else {2: what, 4: what} if accumulate == 1 else {2: what}
    tolerance = {"rtol": 1e-6 * (accumulate > 1), "atol": 1e-7 * (accumulate > 1)}
    module, guard, watcher = fit(
        tmp_path, bad, name, on_non_finite="skip", trainer={"accumulate_grad_batches": accumulate}
    )
    expected = Small(name)
    made = expected.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    expected.train()
    good = batches({})
    for first in range(0, NUM_BATCHES, accumulate):
        window = range(first, first + accumulate)
        optimizer.zero_grad()
        if bad.keys().isdisjoint(window):
            for i in window:
                (expected.training_step(good[i], i)["loss"] / accumulate).backward()
            optimizer.step()
        schedule.step()
    for name_, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name_], value, **tolerance)
    trained = module.trainer.optimizers[0]
    for parameter, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            made = trained.state_dict()["state"][parameter][key]
            torch.testing.assert_close(torch.as_tensor(made), torch.as_tensor(value), **tolerance)
    assert trained.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert guard.num_skipped == len(bad) and (tmp_path / "faults").exists() == bool(bad)
    if accumulate == 1:
        assert watcher.seen == [i not in bad for i in range(NUM_BATCHES)]


def test_stops_after_so_many_in_a_row(tmp_path: Path) -> None:
    assert fit(tmp_path, {1: "view", 3: "view", 5: "view"}, stop_after=2)[1].num_skipped == 3  # never two in a row
    with pytest.raises(TrainingFaultError, match=r"step 3 is not finite.*2 in a row, 3 in this run"):
        fit(tmp_path / "other", {0: "view", 2: "view", 3: "view"}, stop_after=2)
    with pytest.raises(TrainingFaultError, match="row 10, whose views are not finite themselves; row 8"):
        fit(tmp_path / "third", {2: "view"}, stop_after=1)


def test_what_is_kept_is_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingFaultError):
        fit(tmp_path, dict.fromkeys(range(5), "loss"), stop_after=5)
    kept = sorted(folder.name for folder in (tmp_path / "faults").iterdir())
    assert kept == [f"step-{step:08d}" for step in (0, 1, 2, 4)]  # the first three, and the one it stopped at
    fault = read_archive(tmp_path / "faults" / "step-00000001" / "rank-0.pt")
    assert torch.equal(fault["batch"]["positive"][0], batches({})[1]["positive"][0]) and fault["loss"] == math.inf
    module = Small()
    assert all(torch.equal(fault["weights"][k], v) for k, v in module.state_dict().items())  # nothing was learned yet


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_run_that_skipped_more_than_half_of_its_steps_does_not_finish(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "half", {1: "view", 3: "view", 5: "view"}, on_non_finite=mode)
    bad = dict.fromkeys((0, 1, 3, 4), "view")  # of six
    with pytest.raises(TrainingFaultError, match=r"4 of 6 steps were not finite .* a lower optimizer\.base_lr"):
        fit(tmp_path / "end", bad, on_non_finite=mode)
    monkeypatch.setattr(non_finite, "_JUDGED_FROM", 2)  # a run of days does not wait for its end
    with pytest.raises(TrainingFaultError, match="2 of 2 steps"):
        fit(tmp_path / "early", bad, on_non_finite=mode)


@pytest.mark.parametrize(
    ("scale", "loss", "gradient", "is_fault"),
    [
        (65536.0, 1.0, math.inf, False),  # the scaler looks for a scale
        (1.0, 1.0, math.inf, True),  # it has none left to try
        (65536.0, math.nan, math.nan, True),
        (65536.0, 1.0, 1.0, False),
    ],
)
def test_the_scaler_of_half_precision_is_let_do_its_work(
    scale: float, loss: float, gradient: float, is_fault: bool, tmp_path: Path
) -> None:
    guard, module = NonFiniteGuard(tmp_path), nn.Linear(1, 1)
    module.weight.grad = torch.full((1, 1), gradient)
    scaler = SimpleNamespace(get_scale=lambda: scale)
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=1)
    guard.on_before_backward(trainer, module, torch.tensor(loss * scale))  # type: ignore[arg-type]
    guard.on_after_backward(trainer, module)  # type: ignore[arg-type]
    assert (guard._bad_batch is not None) == is_fault
    if is_fault:
        assert guard._bad_batch is not None and guard._bad_batch["loss"] == pytest.approx(loss, nan_ok=True)


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_scaler_goes_on_after_a_step_that_was_left_out(fused: bool) -> None:
    """`GradScaler.update` refuses a step in which it saw no gradient at all."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    if not fused:
        scaler.unscale_(optimizer)
    non_finite._leave_out(optimizer, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.ones(2))
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(parameter.detach(), torch.ones(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_one_bad_number_is_enough(bad: float, place: int) -> None:
    module = nn.Linear(2, 3)
    module.weight.grad, module.bias.grad = torch.full((3, 2), 1e30), torch.ones(3)
    assert math.isfinite(float(non_finite._largest_gradient(module)))  # large is not infinite, though its square is
    (module.weight, module.bias)[place].grad.view(-1)[-1] = bad  # type: ignore[union-attr]
    assert not math.isfinite(float(non_finite._largest_gradient(module)))


@pytest.mark.parametrize("arguments", [{"on_non_finite": "halt"}, {"stop_after": 0}])
def test_settings_out_of_range(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NonFiniteGuard(tmp_path, **arguments)


def test_a_full_disk_does_not_hide_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(non_finite, "atomic_write", full)
    with pytest.raises(TrainingFaultError, match=r"could not be kept for a replay \(No space left on device\)"):
        fit(tmp_path, {0: "view"}, stop_after=1)


RANK = """
import os, torch, test_non_finite as t

rank = int(os.environ["RANK"])
guard, module = t.NonFiniteGuard({folder!r}, on_non_finite={mode!r}, stop_after=1), t.Small("sgd")
trainer = t.tiny_trainer(guard, devices=2, strategy="ddp")
try:
    trainer.fit(module, t.DataLoader(t.batches({{2: "view"}} if rank == 1 else {{}}), batch_size=None))
except t.TrainingFaultError as error:
    print("STOPPED", error)
torch.save((trainer.global_step, guard.num_skipped, module.state_dict()), f"{folder}/result-{{rank}}.pt")
"""


@pytest.mark.parametrize("mode", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_both_ranks_leave_out_what_one_has_met(mode: str, tmp_path: Path) -> None:
    ranks = on_two_ranks(RANK.format(folder=str(tmp_path), mode=mode))
    assert [code for code, _ in ranks] == [0, 0], ranks
    (step, skipped, weights), other = (
        torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert (step, skipped) == other[:2] == ((6, 1) if mode == "skip" else (2, 1))
    for name, value in weights.items():
        assert bool(torch.isfinite(value).all()) and ("running" in name or torch.equal(other[2][name], value)), name
    assert sorted(file.name for file in (tmp_path / "step-00000002").iterdir()) == [
        "lesions.csv", "rank-0.pt", "rank-1.pt",
    ]  # fmt: skip
    for text in [ranks[0][1]] if mode == "skip" else [text for _, text in ranks]:
        assert "step 2 is not finite on rank" in text and "row 10, whose views are not finite" in text


def test_a_gradient_is_followed_to_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite, with a gradient that is not: the slope of a root at 0 is infinite, and the product gives 0 times that."""

    class Root(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": (self.net(batch["positive"][0]) * 0).sqrt().sum()}

    with pytest.raises(TrainingFaultError):
        fit(tmp_path, {2: "loss"}, stop_after=1)
    monkeypatch.setattr(command, "build", lambda *_: Root())
    with pytest.warns(UserWarning, match="Error detected in MulBackward0"):
        text = "\n".join(command.replay(tmp_path))
    assert "the loss is 0; going back, Function 'MulBackward0' returned nan" in text


def test_a_foreign_run_folder_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingFaultError):
        fit(tmp_path, {2: "view"}, stop_after=1)
    config, canary = tmp_path / "config.yaml", tmp_path / "canary"
    interpolated = "${oc.create:{_target_: os.system, command: touch X}}".replace("X", str(canary))
    for encoder, message in (
        ({"_target_": "os.system", "command": f"touch {canary}"}, r"os\.system.*trusted_modules"),
        ({"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": interpolated}, "plain values only"),
    ):
        config.write_text(yaml.safe_dump({"encoder": encoder}))
        with pytest.raises(ValueError, match=message):
            list(command.replay(tmp_path))
    for text in ("[1", "- 1\n- 2"):
        config.write_text(text)
        with pytest.raises(ValueError, match="config"):
            list(command.replay(tmp_path))
    with pytest.raises(ValueError, match="nothing to replay"):
        list(command.replay(tmp_path, 77))
    assert not canary.exists()
