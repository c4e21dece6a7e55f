"""The module on one device: what it sends where, what it logs, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny import FixedViews, Recorder, a_batch, make_module, make_trainer
from torch.utils.data import DataLoader

from fmcib_ssl.losses import InfoNCELoss, NTXentNegativeMinedLoss


@pytest.mark.parametrize("forwards", ["joint", "separate"])
def test_forwards_agree_without_batch_norm(forwards: Any) -> None:
    module, batch = make_module(NTXentNegativeMinedLoss(), forwards=forwards), a_batch(3)
    out = module.embed(batch)
    for key in ("positive", "negative"):
        for view, embedding in zip(batch[key], out[key], strict=True):  # type: ignore[literal-required]
            torch.testing.assert_close(embedding, module.head(module.encoder(view)))


def test_batch_norm_tells_the_forwards_apart() -> None:
    batch = a_batch()
    joint = make_module(NTXentNegativeMinedLoss(), norm=True)
    separate = make_module(NTXentNegativeMinedLoss(), norm=True, forwards="separate")
    assert joint.encoder[1].num_batches_tracked == separate.encoder[1].num_batches_tracked == 0
    first = joint.embed(batch)["positive"][0]
    assert not torch.allclose(first, separate.embed(batch)["positive"][0])
    assert joint.encoder[1].num_batches_tracked == 1
    assert separate.encoder[1].num_batches_tracked == 4


@pytest.mark.parametrize(("options", "message"), [({"forwards": "both"}, "'separate'"), ({"chunk_size": 0}, "is 0")])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(NTXentNegativeMinedLoss(), **options)


class Rates(L.Callback):
    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append(float(trainer.callback_metrics["lr"]))


def test_every_step_is_logged_with_the_true_gradient_norm_and_its_rate(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        assert total_steps == 3
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    loss = InfoNCELoss.from_temperature(0.2, trainable_temperature=True)
    module, recorder, rates = make_module(loss, schedule=schedule), Recorder(), Rates()
    reference = copy.deepcopy(module)
    value = reference.loss(reference.embed(a_batch(4)))
    value.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]).norm()
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[recorder, rates])
    trainer.fit(module, DataLoader(FixedViews(4), batch_size=4))
    row = recorder.metrics[0]
    assert row["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert row["train/loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert row["train/temperature"] == pytest.approx(0.2)
    assert rates.rates == pytest.approx([1.0, 1 / 2, 1 / 3])


def test_the_loss_gathers_with_lightnings_all_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices, the second of which holds what the first does, plus one."""
    rows, gathered = torch.randn(2, 3, 8), []
    loss = NTXentNegativeMinedLoss(gather_distributed=True)
    monkeypatch.setattr(loss, "forward", lambda out, gather: gathered.append(gather(rows)) or torch.zeros(()))
    module = make_module(loss)
    monkeypatch.setattr("fmcib_ssl.models.mined_contrast.num_ranks", lambda: 2)
    monkeypatch.setattr(module, "all_gather", lambda rows, *, sync_grads: torch.stack([rows, rows + sync_grads]))
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    module.training_step(a_batch(3), 0)
    assert torch.equal(gathered[0], torch.cat([rows, rows + 1], dim=1))


def test_devices_that_share_no_negatives_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make_module(NTXentNegativeMinedLoss())
    module.trainer = L.Trainer(accelerator="cpu", devices=2, logger=False)
    module.on_fit_start()
    assert "each device contrasts its lesions with its own negatives only" in caplog.text
