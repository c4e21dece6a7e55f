"""Two processes with half the lesions each are one with all of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_methods import FixedViews, make_method, make_trainer
from torch.utils.data import DataLoader

#: Two epochs: the second looks at what the first left in queues and moving averages.
EPOCHS = 2


@pytest.mark.parametrize("name", ["simclr", "nnclr", "swav", "byol", "vicreg"])
def test_two_processes_equal_one_with_the_doubled_batch(name: str, tmp_path: Path) -> None:
    data = FixedViews(6)
    # Batch norm's statistics are each process's own on a CPU; double precision, to compare many digits.
    one, two = (make_method(name, heads_with_norm=False).double() for _ in range(2))
    before = copy.deepcopy(one.state_dict())
    trainer_one = make_trainer(tmp_path, precision="64-true", max_epochs=EPOCHS)
    trainer_one.fit(one, DataLoader(data, batch_size=6))
    trainer_two = make_trainer(tmp_path, devices=2, strategy="ddp_fork", precision="64-true", max_epochs=EPOCHS)
    trainer_two.fit(two, DataLoader(data, batch_size=3))
    losses = [float(trainer.callback_metrics["train/loss"]) for trainer in (trainer_one, trainer_two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for key, value in one.state_dict().items():
        if "queue" in key and key.endswith("features"):  # the same lesions, in another order
            continue
        torch.testing.assert_close(two.state_dict()[key], value, rtol=1e-6, atol=1e-9, msg=key)
    assert not torch.equal(before["encoder.0.weight"], one.state_dict()["encoder.0.weight"])
