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
#: A run that leaves out a larger share of its steps learns too little; judged from so many steps on, and at its end.
_MAX_SHARE, _JUDGED_FROM = 0.5, 100
#: Below this scale of the loss, half precision is not what makes a gradient infinite.
_MIN_SCALE = 1.0
_MAX_NAMED = 12


class TrainingFaultError(UserError, RuntimeError):
    """Training cannot continue; the message says what happened and what to do."""


class NonFiniteGuard(L.Callback):
    """Leaves out steps whose loss or gradient holds NaN or infinity; stops the run, or counts them.

    A step that is left out changes neither weights, nor buffers, nor the optimizer's state; the schedule counts it. Its
    batch, the weights and the random state are kept for `scripts/replay.py`.

    With `16-mixed` the scaler of the loss leaves out steps by itself while it looks for a scale; those count only once
    the loss itself is not finite, or the scale has fallen to 1.

    Should be the first callback: those after it do not see the embeddings of a step that was left out.

    Args:
        folder: where steps are kept, one folder each.
        on_non_finite: `"stop"` or `"skip"`.
        stop_after: with `"stop"`, how many in a row are left out before the run stops.
        keep: the first so many are kept for a replay, and the one that a run stops at.

    Attributes:
        num_skipped: steps left out in the whole run; logged as `train/non_finite_steps` once there is one.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        on_non_finite: Literal["stop", "skip"] = "stop",
        stop_after: int = 3,
        keep: int = 3,
    ) -> None:
        if on_non_finite not in ("stop", "skip"):
            raise ValueError(f"on_non_finite={on_non_finite!r}: must be 'stop' or 'skip'")
        if stop_after < 1 or keep < 0:
            raise ValueError(f"stop_after={stop_after} must be at least 1, and keep={keep} not negative")
        self.folder = Path(folder)
        self.on_non_finite = on_non_finite
        self.stop_after = stop_after
        self.keep = keep
        self.num_skipped = 0
        self.num_in_a_row = 0
        self._buffers: list[Tensor] = []
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
            buffers = list(pl_module.buffers())
            if [b.shape for b in self._buffers] != [b.shape for b in buffers]:
                self._buffers = [torch.empty_like(buffer) for buffer in buffers]
            _copy(buffers, self._buffers)
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
            self._check_share(trainer, trainer.global_step + 1)
        _leave_out(optimizer, _scaler(trainer))
        _copy(self._buffers, list(pl_module.buffers()))
        if trainer.is_global_zero and (self.num_skipped <= self.keep or self.num_skipped % 100 == 0):
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
        self._check_share(trainer, trainer.global_step)

    def _check_share(self, trainer: L.Trainer, num_steps: int) -> None:
        if self.num_skipped > _MAX_SHARE * num_steps:
            raise TrainingFaultError(
                f"{self.num_skipped} of {num_steps} steps were not finite and were left out: the others are too few to "
                f"learn from, and the run stops. To try: {_remedies(trainer, [])}"
            )

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, stops: bool) -> str:
        """Keep the step, on every rank, and say what happened; never fails for a full disk."""
        bad = self._bad_batch or {**self._batch, "loss": math.nan, "largest_gradient": math.nan}
        own = (self._bad_batch is not None, _lesions(trainer, bad["batch"]))
        everyone: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(everyone, own)
        ranks = [rank for rank, (is_bad, _) in enumerate(everyone) if is_bad]
        lesions = [lesion for rank in ranks for lesion in everyone[rank][1]]
        saved = ""
        if self.num_skipped <= self.keep or stops:
            saved = self._save(trainer, pl_module, bad, [lesion for _, rows in everyone for lesion in rows])
        where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if trainer.world_size > 1 else ""
        message = (
            f"step {trainer.global_step} is not finite{where} (loss {bad['loss']:g}, largest gradient "
            f"{bad['largest_gradient']:g}) and was left out: {self.num_in_a_row} in a row, {self.num_skipped} in this "
            f"run.{_names(lesions)}{saved}"
        )
        if stops:
            message += (
                f" The run stops; nothing was learned from these steps. To try: {_remedies(trainer, lesions)}; or "
                "without such steps, counting them: callbacks.non_finite.on_non_finite=skip"
            )
        return message

    def _save(
        self, trainer: L.Trainer, pl_module: L.LightningModule, bad: dict[str, Any], lesions: list[dict[str, Any]]
    ) -> str:
        step, folder = trainer.global_step, self.folder / f"step-{trainer.global_step:08d}"
        buffers = dict(zip((name for name, _ in pl_module.named_buffers()), self._buffers, strict=True))
        fault = {
            "format": FAULT_FORMAT,
            **bad,
            "step": step,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "weights": {name: buffers.get(name, value) for name, value in pl_module.state_dict().items()},
        }
        fault = apply_to_collection(fault, np.ndarray, torch.as_tensor)  # seeds of views
        try:
            with atomic_write(folder / f"rank-{trainer.global_rank}.pt") as file:
                torch.save(apply_to_collection(fault, Tensor, lambda tensor: tensor.detach().cpu().clone()), file)
            if trainer.is_global_zero:
                write_atomically(folder / "lesions.csv", pd.DataFrame(lesions).to_csv(index=False))
        except (OSError, RuntimeError) as error:  # torch's writer turns what the disk says into a RuntimeError
            return f" The step could not be kept for a replay ({getattr(error, 'strerror', None) or error})."
        return (
            f" The step is kept in {folder}: python scripts/replay.py run={self.folder.parent} step={step} finds the "
            "layer where it begins."
        )


def _lesions(trainer: L.Trainer, batch: Any) -> list[dict[str, Any]]:
    """The lesions of a batch, with the names that people know them by; none of a batch without `lesion`."""
    numbers = batch.get("lesion") if isinstance(batch, Mapping) else None
    if not isinstance(numbers, Tensor):
        return []
    patches: Any = getattr(getattr(getattr(trainer, "datamodule", None), "dataset", None), "patches", None)
    table = getattr(patches, "lesions", {})
    views = [batch.get(key, ()) for key in ("positive", "negative")]
    views = [view for each in views for view in ((each,) if isinstance(each, Tensor) else each)]
    return [
        {
            "rank": trainer.global_rank,
            "place": place,
            "lesion": number,
            "lesion_id": str(table["lesion_id"].iloc[number]) if "lesion_id" in table else "",
            "title": patches.title(number) if patches is not None else f"row {number}",
            "views_are_finite": all(bool(v[place].isfinite().all()) for v in views if place < len(v)),
        }
        for place, number in enumerate(numbers.tolist())
    ]


def _names(lesions: list[dict[str, Any]]) -> str:
    """Lesions in words, those with bad views first."""
    if not lesions:
        return ""
    names = [
        (f"{row['lesion_id']} ({row['title']})" if row["lesion_id"] else row["title"])
        + ("" if row["views_are_finite"] else ", whose views are not finite themselves")
        for row in sorted(lesions, key=lambda row: row["views_are_finite"])[:_MAX_NAMED]
    ]
    more = f"; and {len(lesions) - _MAX_NAMED} more" if len(lesions) > _MAX_NAMED else ""
    return f" Its lesions: {'; '.join(names)}{more}."


def _remedies(trainer: L.Trainer, lesions: list[dict[str, Any]]) -> str:
    if any(not row["views_are_finite"] for row in lesions):
        return "look at the scans of these lesions, and at the augmentation"
    remedies = ["a lower optimizer.base_lr", "trainer.gradient_clip_val=1", "a higher loss.temperature"]
    return "; ".join(["hardware.precision=32-true"] * ("16" in str(trainer.precision)) + remedies)


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


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
