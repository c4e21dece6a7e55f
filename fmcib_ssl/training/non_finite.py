"""A step whose loss or gradient is not finite is never taken; the run says so, and stops or continues without it.

The check is on the device, of every backward pass, before the optimizer's step; ranks compare what they have found
before any of them acts, so all skip or all stop. What the forward pass has done to buffers, such as the running
statistics of batch norm or a queue of embeddings, is undone with the step. What it takes to repeat the step is kept:

```
faults/step-00000012/lesions.csv    the lesions of the step's batches, all ranks
faults/step-00000012/rank-0.pt      a rank's batch, weights and random state, plain data
```
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from fmcib_ssl.io import atomic_write, write_atomically
from fmcib_ssl.training.checkpoints import random_state
from fmcib_ssl.types import UserError

logger = logging.getLogger(__name__)

#: Of the files that keep a step.
FAULT_FORMAT = 1
#: The first so many steps of a run are kept for a replay, and the one that it stops at.
_NUM_KEPT = 3
#: A run that leaves out a larger share of its steps learns too little; judged from so many steps on, and at its end.
_MAX_SHARE, _JUDGED_FROM = 0.5, 100
#: What to try against steps that are not finite.
_REMEDIES = ("a lower optimizer.base_lr", "trainer.gradient_clip_val=1", "a higher loss.temperature")
#: Below this scale of the loss, half precision is not what makes a gradient infinite.
_MIN_SCALE = 1.0
_MAX_NAMED = 12


class TrainingFaultError(UserError, RuntimeError):
    """Training cannot continue; the message says what happened and what to do."""


class NonFiniteGuard(L.Callback):
    """Leaves out steps whose loss or gradient holds NaN or infinity; stops the run, or counts them.

    A step that is left out changes neither weights, nor buffers, nor the optimizer's state; the schedule counts it. Its
    batch, the weights and the random state are kept for `fmcib-ssl replay`.

    With `16-mixed` the scaler of the loss leaves out steps by itself while it looks for a scale; those count only once
    the loss itself is not finite, or the scale has fallen to 1.

    Should be the first callback: those after it do not see the embeddings of a step that was left out.

    Args:
        folder: where steps are kept, one folder each.
        on_non_finite: `"stop"` or `"skip"`.
        stop_after: with `"stop"`, how many in a row are left out before the run stops.

    Attributes:
        num_skipped: steps left out in the whole run; logged as `train/non_finite_steps` once there is one.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self, folder: str | Path, *, on_non_finite: Literal["stop", "skip"] = "stop", stop_after: int = 3
    ) -> None:
        if on_non_finite not in ("stop", "skip") or stop_after < 1:
            raise ValueError(
                f"on_non_finite={on_non_finite!r} must be 'stop' or 'skip', stop_after={stop_after} at least 1"
            )
        self.folder = Path(folder)
        self.on_non_finite = on_non_finite
        self.stop_after = stop_after
        self.num_skipped = 0
        self.num_in_a_row = 0
        self._buffers: dict[str, Tensor] = {}
        self._batch: dict[str, Any] = {}
        self._bad_batch: dict[str, Any] | None = None  # the first one since the optimizer's last step
        self._loss: Tensor | None = None
        self._skipped = False

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume the counts."""
        self.num_skipped, self.num_in_a_row = state_dict["num_skipped"], state_dict["num_in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the step begins with."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._bad_batch, self._skipped = None, False
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        self._batch = {"batch": batch, "batch_idx": batch_idx, "random_state": random_state()}

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss, on its device."""
        self._loss = loss.detach()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the loss and at the gradient that has come together so far."""
        if self._bad_batch is not None or self._loss is None:
            return
        largest = _largest_gradient(pl_module)
        loss, gradient = torch.stack([self._loss.float().sum(), largest.to(self._loss.device).float()]).tolist()
        scaler = _scaler(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        loss *= trainer.accumulate_grad_batches / scale
        bad_gradient = not math.isfinite(gradient) and (scaler is None or scale <= _MIN_SCALE)
        if not math.isfinite(loss) or bad_gradient:
            self._bad_batch = {**self._batch, "loss": loss, "largest_gradient": gradient}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Agree with the other ranks; if any has found something, leave the step out.

        Raises:
            TrainingFaultError: on all ranks, if the run is to stop.
        """
        if not trainer.strategy.reduce_boolean_decision(self._bad_batch is not None, all=False):
            self.num_in_a_row = 0
            return
        self.num_skipped += 1
        self.num_in_a_row += 1
        self._skipped = True
        stops = self.on_non_finite == "stop" and self.num_in_a_row >= self.stop_after
        message = self._record(trainer, pl_module, stops)
        if stops:
            raise TrainingFaultError(message)
        if trainer.global_step + 1 >= _JUDGED_FROM:
            self._check_share(trainer.global_step + 1)
        _leave_out(optimizer, _scaler(trainer))
        with torch.no_grad():
            for name, buffer in pl_module.named_buffers():
                buffer.copy_(self._buffers[name])
        if trainer.is_global_zero and (self.num_skipped <= _NUM_KEPT or self.num_skipped % 100 == 0):
            logger.warning("%s", message)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the count; keep what was left out from the callbacks that watch embeddings."""
        self._loss = None
        self._batch = {}
        if self._skipped:
            outputs.pop("embeddings", None)
            outputs.pop("negatives", None)
        if self.num_skipped:
            pl_module.log("train/non_finite_steps", float(self.num_skipped), batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a result of too few steps.

        Raises:
            TrainingFaultError: more than half of the run's steps were left out.
        """
        self._check_share(trainer.global_step)

    def _check_share(self, num_steps: int) -> None:
        if self.num_skipped > _MAX_SHARE * num_steps:
            raise TrainingFaultError(
                f"{self.num_skipped} of {num_steps} steps were not finite and were left out: the others are too few to "
                f"learn from, and the run stops. To try: {'; '.join(_REMEDIES)}"
            )

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, stops: bool) -> str:
        """Keep the step, on every rank, and say what happened; never fails for a full disk."""
        bad = self._bad_batch or {**self._batch, "loss": math.nan, "largest_gradient": math.nan}
        own = (self._bad_batch is not None, _lesions(trainer, bad["batch"]))
        everyone: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(everyone, own)
        ranks = [rank for rank, (is_bad, _) in enumerate(everyone) if is_bad]
        lesions = pd.DataFrame([row for _, rows in everyone for row in rows])
        where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if trainer.world_size > 1 else ""
        message = (
            f"step {trainer.global_step} is not finite{where} (loss {bad['loss']:g}, largest gradient "
            f"{bad['largest_gradient']:g}) and was left out: {self.num_in_a_row} in a row, {self.num_skipped} in this "
            "run."
        )
        remedies = [*_REMEDIES]
        if "16" in str(trainer.precision):
            remedies.insert(0, "hardware.precision=32-true")
        if len(lesions):
            suspects = lesions[lesions["rank"].isin(ranks)].sort_values("views_are_finite", kind="stable")
            more = f"; and {len(suspects) - _MAX_NAMED} more" if len(suspects) > _MAX_NAMED else ""
            message += f" Its lesions: {'; '.join(map(_name, suspects[:_MAX_NAMED].itertuples()))}{more}."
            if not suspects["views_are_finite"].all():
                remedies = ["look at the scans of these lesions, and at the augmentation"]
        if self.num_skipped <= _NUM_KEPT or stops:
            message += self._save(trainer, pl_module, bad, lesions)
        if stops:
            message += (
                f" The run stops; nothing was learned from these steps. To try: {'; '.join(remedies)}; or "
                "without such steps, counting them: callbacks.non_finite.on_non_finite=skip"
            )
        return message

    def _save(
        self, trainer: L.Trainer, pl_module: L.LightningModule, bad: dict[str, Any], lesions: pd.DataFrame
    ) -> str:
        step, folder = trainer.global_step, self.folder / f"step-{trainer.global_step:08d}"
        fault = {
            "format": FAULT_FORMAT,
            **bad,
            "step": step,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "weights": {name: self._buffers.get(name, value) for name, value in pl_module.state_dict().items()},
        }
        # seeds of views are NumPy's; a tensor that is part of a larger one would bring all of that
        fault = apply_to_collection(fault, (np.ndarray, Tensor), lambda v: torch.as_tensor(v).detach().cpu().clone())
        try:
            with atomic_write(folder / f"rank-{trainer.global_rank}.pt") as file:
                torch.save(fault, file)
            if trainer.is_global_zero:
                write_atomically(folder / "lesions.csv", lesions.to_csv(index=False))
        except (OSError, RuntimeError) as error:  # torch's writer turns what the disk says into a RuntimeError
            return f" The step could not be kept for a replay ({getattr(error, 'strerror', None) or error})."
        return (
            f" The step is kept in {folder}: fmcib-ssl replay run={self.folder.parent} step={step} finds the "
            "layer where it begins."
        )


def _lesions(trainer: L.Trainer, batch: Any) -> list[dict[str, Any]]:
    """The lesions of a batch, with the names that people know them by; none of a batch without `lesion`."""
    rows = batch.get("lesion") if isinstance(batch, Mapping) else None
    if not isinstance(rows, Tensor):
        return []
    patches: Any = getattr(getattr(getattr(trainer, "datamodule", None), "dataset", None), "patches", None)
    table = getattr(patches, "lesions", {})
    views = [view for key in ("positive", "negative") for view in batch.get(key, ()) if len(view) % len(rows) == 0]
    return [
        {
            "rank": trainer.global_rank,
            "place": i,
            "lesion": row,
            "lesion_id": str(table["lesion_id"].iloc[row]) if "lesion_id" in table else "",
            "title": patches.title(row) if patches is not None else f"row {row}",
            "views_are_finite": all(bool(view.reshape(len(rows), -1)[i].isfinite().all()) for view in views),
        }
        for i, row in enumerate(rows.tolist())
    ]


def _name(lesion: Any) -> str:
    name = f"{lesion.lesion_id} ({lesion.title})" if lesion.lesion_id else lesion.title
    return name if lesion.views_are_finite else f"{name}, whose views are not finite themselves"


def _largest_gradient(module: torch.nn.Module) -> Tensor:
    """The largest absolute value; NaN if there is a NaN. Zero of none."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf) if gradients else torch.zeros(())


def _scaler(trainer: L.Trainer) -> Any:
    """The scaler of the loss with `16-mixed`, else None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _leave_out(optimizer: Optimizer, scaler: Any) -> None:
    """Make the optimizer's coming step do nothing: neither to weights nor to its state."""
    own = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in own.param_groups for p in group["params"] if p.grad is not None]
    if scaler is not None and own.defaults.get("fused"):
        for parameter in parameters[:1]:  # the scaler has not looked yet, and leaves the step out for this
            parameter.grad.fill_(math.inf)
        return
    for parameter in parameters:
        parameter.grad = None
