"""What every method keeps: its steps, what it says of itself, and several processes as one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tiny import LOSSES, METHODS, FixedViews, a_batch, fitted, make_method, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmcib_ssl.training.loggers import MetricsFile, read_metrics

every_method = pytest.mark.parametrize("name", METHODS)


class Outputs(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.outputs = outputs


@every_method
def test_a_step_gives_loss_and_embeddings_and_trains_everything(name: str, tmp_path: Path) -> None:
    module, outputs = make_method(name), Outputs()
    recorder = fitted(module, tmp_path, max_steps=1, callbacks=[outputs])
    z0, z1 = outputs.outputs["embeddings"]
    assert z0.shape == z1.shape == (4, z0.shape[1]) and not z0.requires_grad
    assert ("negatives" in outputs.outputs) == module.takes_negatives
    assert {"train/loss", "train/grad_norm", "lr"} <= set(recorder.metrics[0])
    for parameter_name, parameter in module.named_parameters():
        is_target = parameter_name.startswith("target_")
        assert parameter.requires_grad != is_target, parameter_name
        assert (parameter.grad is None) == is_target, parameter_name


@every_method
def test_half_precision_is_only_for_the_networks(name: str, tmp_path: Path) -> None:
    full, half = (fitted(make_method(name), tmp_path, precision=p).metrics[0] for p in ("32-true", "bf16-mixed"))
    assert half["train/loss"] == pytest.approx(full["train/loss"], rel=0.1)


@pytest.mark.parametrize("num_negatives", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in METHODS), ("mined_contrast", {"chunk_size": 2})]
)
def test_as_many_views_go_through_its_network_as_it_says(
    name: str, options: Any, num_negatives: int, tmp_path: Path
) -> None:
    module = make_method(name, loss=LOSSES["ntxent-lesions"](), **options)
    batch: Any = dict(a_batch(3))
    batch["negative"] = [torch.stack([view] * (num_negatives or 1), 1)[:, :num_negatives] for view in batch["negative"]]
    rows: Counter[bool] = Counter()  # that go through encoders, with a gradient and without one

    def note(_encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[torch.is_grad_enabled()] += len(inputs[0])

    hooks = [part.register_forward_pre_hook(note) for key, part in module.named_children() if key.endswith("encoder")]
    # What chunks compute a second time, in the backward, is no other work.
    module.backward = lambda loss: ([hook.remove() for hook in hooks], loss.backward())
    make_trainer(tmp_path, max_steps=1).fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    assert (rows[True], rows[False]) == (3 * module.trained_views(num_negatives), 3 * module.watched_views)


@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [
        *((name, None, {}) for name in METHODS if name not in ("mined_contrast", "denoising")),
        *(("mined_contrast", loss, {}) for loss in LOSSES),
        ("mined_contrast", "infonce-mined_and_lesions", {"chunk_size": 2}),
    ],
)
def test_two_processes_equal_one_with_the_doubled_batch(
    name: str, loss: str | None, options: dict[str, Any], tmp_path: Path
) -> None:
    data, states, losses = FixedViews(6), [], []
    for devices, batch_size in ((1, 6), (2, 3)):
        made = LOSSES[loss]() if loss else None
        # Batch norm's statistics are each process's own on a CPU; double precision, to compare many digits.
        module = make_method(name, loss=made, heads_with_norm=False, **options).double()
        before = module.encoder[0].weight.detach().clone()
        # Two epochs: the second looks at what the first left in queues and moving averages.
        several = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
        trainer = make_trainer(tmp_path, precision="64-true", max_epochs=2, **several)
        trainer.fit(module, DataLoader(data, batch_size=batch_size))
        losses.append(float(trainer.callback_metrics["train/loss"]))
        states.append(module.state_dict())
        assert not torch.equal(before, states[-1]["encoder.0.weight"])
    if loss is None or "sum" not in loss:  # each device logs its own
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for key, value in states[0].items():
        if not ("queue" in key and key.endswith("features")):  # the same lesions, in another order
            torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-9, msg=key)


class Seldom(L.Callback):
    """Logs a figure in one batch of each epoch, as what watches a run does at the end of a window."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[-1] == 2:
            pl_module.log("seldom", float(trainer.current_epoch))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {2: "0.0", 8: "1.0"}),
        ({"accumulate_grad_batches": 2}, {1: "0.0", 4: "1.0"}),
        ({"log_every_n_steps": 4}, {3: "0.0", 11: "1.0"}),
    ],
)
def test_a_figure_stands_in_the_row_of_its_step_alone(
    options: dict[str, Any], expected: dict[int, str], tmp_path: Path
) -> None:
    """Lightning would write it in every row until the epoch ends; a run that is resumed would not."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    trainer = make_trainer(tmp_path, **{"logger": metrics, "max_epochs": 2, "callbacks": [Seldom()], **options})
    trainer.fit(make_method("simclr"), DataLoader(FixedViews(12), batch_size=2))
    rows = read_metrics(metrics.path)
    assert {int(row["step"]): row["seldom"] for row in rows if row["seldom"]} == expected
    assert all(row["train/loss"] and row["lr"] for row in rows)


@pytest.mark.parametrize("name", ["simclr", "nnclr", "swav", "byol", "vicreg"])
def test_without_lightly_it_is_said_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == "lightly"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(ImportError, match=r"pip install 'fmcib_ssl\[baselines\]'"):
        make_method(name)


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_the_encoder_at_a_rate_of_its_own(name: str) -> None:
    """One step of plain SGD moves each weight by its rate times its gradient."""
    moved = {}
    for rate in (1.0, 0.25):
        method = make_method(name)
        method.encoder_rate = rate
        method.trainer = SimpleNamespace(estimated_stepping_batches=1)
        before = {key: value.detach().clone() for key, value in method.named_parameters()}
        for parameter in method.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        method.configure_optimizers().step()
        moved[rate] = {key: (value.detach() - before[key]) for key, value in method.named_parameters()}
    for key, step in moved[1.0].items():
        factor = 0.25 if key.startswith("encoder.") else 1.0
        torch.testing.assert_close(moved[0.25][key], factor * step)
        assert not key.startswith("encoder.") or step.abs().max() > 0
