"""Steps that are not finite: left out as if they had never been, on every rank alike."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmcib_ssl.training import guards
from fmcib_ssl.training.faults import read_faults
from fmcib_ssl.training.guards import NonFiniteGuard, TrainingFaultError, _largest, _leave_out

NUM_BATCHES = 6


class Small(L.LightningModule):
    """Batch norm, momentum and a schedule: all that a bad step could leave something in."""

    def __init__(self, name: str = "adamw") -> None:
        super().__init__()
        self.name = name
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        embeddings = self.net(batch["positive"])
        return {"loss": embeddings.square().mean() * batch["factor"].mean(), "embeddings": embeddings.detach()}

    def configure_optimizers(self) -> Any:
        optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if self.name == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(bad: dict[int, str]) -> list[dict[str, Tensor]]:
    made = []
    for i in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(i)
        one = {"positive": torch.randn(4, 3, generator=generator), "lesion": torch.arange(4) + 4 * i}
        one["factor"] = torch.ones(1)
        if bad.get(i) == "view":
            one["positive"][2, 1] = math.nan
        elif bad.get(i) == "loss":
            one["factor"] *= math.inf
        made.append(one)
    return made


def fit(folder: Path, bad: dict[int, str], name: str = "adamw", data: Any = None, **guard: Any) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[NonFiniteGuard(folder / "faults", **guard)],
    )  # fmt: skip
    data = batches(bad) if data is None else data
    trainer.fit(Small(name), DataLoader(data, batch_size=None, shuffle=False))
    return trainer


@pytest.mark.parametrize("what", ["view", "loss"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_is_left_out_leaves_nothing(what: str, name: str, tmp_path: Path) -> None:
    """Oracle: the training written out, with that batch's forward and backward never done."""
    trainer = fit(tmp_path, {2: what, 4: what}, name, on_non_finite="skip")
    expected = Small(name)
    made = expected.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    expected.train()
    for i, batch in enumerate(batches({})):
        optimizer.zero_grad()
        if i not in (2, 4):
            expected.training_step(batch, i)["loss"].backward()
            optimizer.step()
        schedule.step()
    assert trainer.global_step == NUM_BATCHES
    for name_, value in expected.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name_], value), name_
    for parameter, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(trainer.optimizers[0].state_dict()["state"][parameter][key]),
                               torch.as_tensor(value)), key  # fmt: skip
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert trainer.callbacks[0].num_skipped == 2


def test_without_a_fault_nothing_changes(tmp_path: Path) -> None:
    trainer = fit(tmp_path, {})
    bare = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Small()
    bare.fit(module, DataLoader(batches({}), batch_size=None, shuffle=False))
    assert all(torch.equal(trainer.model.state_dict()[k], v) for k, v in module.state_dict().items())
    assert not (tmp_path / "faults").exists()


def test_stops_after_so_many_in_a_row(tmp_path: Path) -> None:
    trainer = fit(tmp_path, {1: "view", 3: "view", 5: "view"}, stop_after=2)  # never two in a row
    assert trainer.callbacks[0].num_skipped == 3
    with pytest.raises(TrainingFaultError, match=r"step 3 is not finite.*2 in a row, 3 in this run"):
        fit(tmp_path / "other", {0: "view", 2: "view", 3: "view"}, stop_after=2)
    with pytest.raises(TrainingFaultError, match="row 10, whose views are not finite themselves; row 8"):
        fit(tmp_path / "third", {2: "view"}, stop_after=1)


@pytest.mark.parametrize("mode", ["skip", "stop"])
def test_a_run_of_which_little_is_left_does_not_finish(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "half", {1: "view", 3: "view", 5: "view"}, on_non_finite=mode)
    bad = dict.fromkeys((0, 1, 3, 4), "view")  # of six
    with pytest.raises(TrainingFaultError, match=r"4 of 6 steps were not finite .* a lower optimizer\.base_lr"):
        fit(tmp_path / "end", bad, on_non_finite=mode)
    monkeypatch.setattr(guards, "_JUDGED_FROM", 2)  # a run of days does not wait for its end
    with pytest.raises(TrainingFaultError, match="2 of 2 steps"):
        fit(tmp_path / "early", bad, on_non_finite=mode)


def test_what_is_kept_is_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingFaultError):
        fit(tmp_path, {0: "view", 1: "loss", 2: "loss", 3: "loss"}, stop_after=4, keep=2)
    kept = sorted(folder.name for folder in (tmp_path / "faults").iterdir())
    assert kept == ["step-00000000", "step-00000001", "step-00000003"]  # the first two, and the one it stopped at
    (fault,) = read_faults(tmp_path / "faults" / "step-00000001")
    assert torch.equal(fault["batch"]["positive"], batches({})[1]["positive"]) and fault["loss"] == math.inf
    module = Small()
    assert all(torch.equal(fault["weights"][k], v) for k, v in module.state_dict().items())  # nothing was learned yet


def test_accumulated_batches_are_left_out_together(tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2,
        callbacks=[NonFiniteGuard(tmp_path / "faults", on_non_finite="skip")],
    )  # fmt: skip
    trainer.fit(Small("sgd"), DataLoader(batches({2: "view"}), batch_size=None, shuffle=False))
    expected = Small("sgd")
    optimizer = expected.configure_optimizers()["optimizer"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    good = batches({})
    for window in ((0, 1), (), (4, 5)):
        optimizer.zero_grad()
        for i in window:
            (expected.training_step(good[i], i)["loss"] / 2).backward()
        if window:
            optimizer.step()
        schedule.step()
    for name, value in expected.state_dict().items():
        assert torch.allclose(trainer.model.state_dict()[name], value, rtol=1e-6, atol=1e-7), name
    (fault,) = read_faults(tmp_path / "faults" / "step-00000001")
    assert fault["batch_idx"] == 2  # the batch that was bad, not the one at whose end it was seen


def test_watchers_do_not_see_what_was_left_out(tmp_path: Path) -> None:
    class Watcher(L.Callback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append("embeddings" in outputs)

    watcher = Watcher()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[NonFiniteGuard(tmp_path, on_non_finite="skip"), watcher],
    )  # fmt: skip
    trainer.fit(Small(), DataLoader(batches({3: "view"}), batch_size=None, shuffle=False))
    assert watcher.seen == [True, True, True, False, True, True]


class Scaler:
    """A loss scaler as far as the guard asks it."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


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

    class Plugin:
        scaler = Scaler(scale)

    class Trainer:
        precision_plugin = Plugin()
        accumulate_grad_batches = 1

    guard.on_before_backward(Trainer(), module, torch.tensor(loss * scale))  # type: ignore[arg-type]
    guard.on_after_backward(Trainer(), module)  # type: ignore[arg-type]
    assert (guard._bad is not None) == is_fault
    if is_fault:
        assert guard._bad is not None and guard._bad["loss"] == pytest.approx(loss, nan_ok=True)


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_scaler_goes_on_after_a_step_that_was_left_out(fused: bool) -> None:
    """`GradScaler.update` refuses a step in which it saw no gradient at all."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    if not fused:
        scaler.unscale_(optimizer)
    _leave_out(optimizer, scaler)
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
    gradients = [torch.full((3,), 1e30), torch.ones(2, 2)]
    assert math.isfinite(float(_largest(gradients)))  # large is not infinite, though its square is
    gradients[place].view(-1)[-1] = bad
    assert not math.isfinite(float(_largest(gradients)))


@pytest.mark.parametrize("arguments", [{"on_non_finite": "halt"}, {"stop_after": 0}, {"keep": -1}])
def test_settings_that_make_no_sense(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NonFiniteGuard(tmp_path, **arguments)


def test_a_full_disk_does_not_hide_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmcib_ssl.training.guards.write_fault", full)
    with pytest.raises(TrainingFaultError, match=r"could not be kept for a replay \(No space left on device\)"):
        fit(tmp_path, {0: "view"}, stop_after=1)
