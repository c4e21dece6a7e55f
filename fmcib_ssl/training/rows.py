"""When a row of metrics is written: what is logged at other times costs as much and is not seen."""

from __future__ import annotations

import lightning as L


def row_is_due(trainer: L.Trainer) -> bool:
    """Whether loggers get a row at the end of this batch; to be asked in `on_train_batch_end`."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()
