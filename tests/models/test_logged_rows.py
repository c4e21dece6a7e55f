"""What stands in a row of the metrics was logged in its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from tiny import FixedViews, make_method, make_trainer
from torch.utils.data import DataLoader

from fmcib_ssl.training.loggers import MetricsFile, read_metrics


class Seldom(L.Callback):
    """Logs a figure in one batch of each epoch, as what watches a run does at the end of a window."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            pl_module.log("seldom", float(trainer.current_epoch))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {2: "0.0", 8: "1.0"}),
        ({"accumulate_grad_batches": 2}, {1: "0.0", 4: "1.0"}),
        ({"log_every_n_steps": 4}, {3: "0.0", 11: "1.0"}),
    ],
)
def test_a_figure_is_not_repeated(options: dict[str, Any], expected: dict[int, str], tmp_path: Path) -> None:
    """Lightning would write it in every row until the epoch ends; a run that was gone on with would not."""
    metrics = MetricsFile(tmp_path / "metrics.csv")
    trainer = make_trainer(
        tmp_path, **{"logger": metrics, "log_every_n_steps": 1, "max_epochs": 2, "callbacks": [Seldom()], **options}
    )
    trainer.fit(make_method("simclr"), DataLoader(FixedViews(12), batch_size=2))
    rows = read_metrics(metrics.path)[1]
    assert {int(row["step"]): row["seldom"] for row in rows if row["seldom"]} == expected
    assert all(row["train/loss"] and row["lr"] for row in rows)
