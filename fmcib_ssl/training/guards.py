"""A step whose loss or gradient is not finite is never taken; the run says so, and stops or goes on without it.

The check is on the device, of every backward pass, before the optimizer's step; ranks compare what they found before
any of them acts, so all skip or all stop. What the forward pass has done to buffers, such as the running statistics of
batch norm or a queue of embeddings, is undone with the step.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fmcib_ssl.training.faults import (
    TrainingFaultError,
    fault_folder,
    gathered,
    lesions_of,
    name_lesions,
    write_fault,
    write_lesions,
)
from fmcib_ssl.training.rng import random_state

logger = logging.getLogger(__name__)

__all__ = ["NonFiniteGuard", "TrainingFaultError"]

#: A run that leaves out a larger share of its steps learns too little; judged from so many steps on, and at its end.
_LARGEST_SHARE, _JUDGED_FROM = 0.5, 100
#: Below this scale of the loss, half precision is not what makes a gradient infinite.
_LOWEST_SCALE = 1.0


class NonFiniteGuard(L.Callback):
    """Leaves out steps whose loss or gradient holds NaN or infinity; stops the run, or counts them.

    A step that is left out changes neither weights, nor buffers, nor the optimizer's state; the schedule goes on with
    the number of steps. Its batch, the weights and the random state are kept for `scripts/replay.py`.

    With `16-mixed` the scaler of the loss leaves out steps by itself while it looks for a scale; those count only once
    the loss itself is not finite, or the scale has fallen to 1.

    Should be the first callback: those after it do not see the embeddings of a step that was left out.

    Args:
        folder: where steps are kept, one folder each.
        on_non_finite: `"stop"` or `"skip"`.
        stop_after: with `"stop"`, how many in a row are left out before the run stops.
        keep: the first so many are kept for a replay.

    Attributes:
        num_skipped: steps left out in the whole run; logged as `train/non_finite_steps` once there is one.

    Raises:
        ValueError: a number or a name that makes no sense.
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
        self._now: dict[str, Any] = {}
        self._bad: dict[str, Any] | None = None  # the first bad batch since the optimizer's last step
        self._loss: Tensor | None = None
        self._skipped = False

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.num_skipped, self.num_in_a_row = state_dict["num_skipped"], state_dict["num_in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the step begins with."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._bad, self._skipped = None, False
            buffers = list(pl_module.buffers())
            if [b.shape for b in self._buffers] != [b.shape for b in buffers]:
                self._buffers = [torch.empty_like(buffer) for buffer in buffers]
            _copy(buffers, self._buffers)
        self._now = {"batch": batch, "batch_idx": batch_idx, "random_state": random_state()}

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss, on its device."""
        self._loss = loss.detach()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the loss and at the gradient that has come together so far."""
        if self._bad is not None or self._loss is None:
            return
        largest = _largest(_gradients(pl_module))
        loss, gradient = torch.stack([self._loss.float().sum(), largest.to(self._loss.device).float()]).tolist()
        scaler = _scaler(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        loss *= trainer.accumulate_grad_batches / scale
        bad_gradient = not math.isfinite(gradient) and (scaler is None or scale <= _LOWEST_SCALE)
        if not math.isfinite(loss) or bad_gradient:
            self._bad = {**self._now, "loss": loss, "largest_gradient": gradient}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Agree with the other ranks; if any has found something, leave the step out.

        Raises:
            TrainingFaultError: on all ranks, if the run is to stop.
        """
        ranks = self._ranks_with_a_fault(trainer)
        if not ranks:
            self.num_in_a_row = 0
            return
        self.num_skipped += 1
        self.num_in_a_row += 1
        self._skipped = True
        message = self._record(trainer, pl_module, ranks)
        stop = self.on_non_finite == "stop" and self.num_in_a_row >= self.stop_after
        if stop:
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
        self._now = {}
        if self._skipped and isinstance(outputs, dict):
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
        if self.num_skipped > _LARGEST_SHARE * num_steps:
            raise TrainingFaultError(
                f"{self.num_skipped} of {num_steps} steps were not finite and were left out: the others are too few to "
                f"learn from, and the run stops. To try: {_remedies(trainer, [])}"
            )

    def _ranks_with_a_fault(self, trainer: L.Trainer) -> list[int]:
        if trainer.world_size == 1:
            return [0] if self._bad is not None else []
        mine = torch.tensor([int(self._bad is not None)], device=trainer.strategy.root_device)
        flags = [torch.zeros_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(flags, mine)
        return [rank for rank, flag in enumerate(torch.cat(flags).tolist()) if flag]

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, ranks: list[int]) -> str:
        """Keep the step, on every rank, and say what happened; never fails for a full disk."""
        bad = self._bad or {**self._now, "loss": float("nan"), "largest_gradient": float("nan")}
        patches = getattr(getattr(getattr(trainer, "datamodule", None), "dataset", None), "patches", None)
        own = lesions_of(bad["batch"], patches, trainer.global_rank)
        rows = gathered(own, trainer.world_size)
        folder, saved = fault_folder(self.folder, trainer.global_step), ""
        last = self.on_non_finite == "stop" and self.num_in_a_row >= self.stop_after
        if self.num_skipped <= self.keep or last:
            names = [name for name, _ in pl_module.named_buffers()]
            weights = {**pl_module.state_dict(), **dict(zip(names, self._buffers, strict=True))}
            fault = {
                **bad,
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "rank": trainer.global_rank,
                "world_size": trainer.world_size,
                "precision": str(trainer.precision),
                "weights": {name: weights[name] for name in pl_module.state_dict()},
            }
            try:
                write_fault(folder, trainer.global_rank, fault)
                if trainer.is_global_zero:
                    write_lesions(folder, rows)
                saved = (
                    f"The step is kept in {folder}: python scripts/replay.py run={self.folder.parent} "
                    f"step={trainer.global_step} finds the layer where it begins. "
                )
            except OSError as error:
                saved = f"The step could not be kept for a replay ({error.strerror or error}). "
        what = f"loss {bad['loss']:g}, largest gradient {bad['largest_gradient']:g}"
        where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if trainer.world_size > 1 else ""
        lesions = [row for row in rows if row["rank"] in ranks] or rows
        count = f"{self.num_in_a_row} in a row, {self.num_skipped} in this run"
        message = f"step {trainer.global_step} is not finite{where} ({what}) and was left out: {count}. "
        if lesions:
            message += f"Its lesions: {name_lesions(lesions)}. "
        message += saved
        if last:
            message += f"The run stops; nothing was learned from these steps. To try: {_remedies(trainer, lesions)}; "
            message += "or without such steps, counting them: callbacks.guards.on_non_finite=skip"
        return message.strip()


def _remedies(trainer: L.Trainer, lesions: list[dict[str, Any]]) -> str:
    if any(not row["views_are_finite"] for row in lesions):
        remedies = ["look at the scans of these lesions, and at the augmentation"]
    else:
        remedies = ["a lower optimizer.base_lr", "trainer.gradient_clip_val=1", "a higher loss.temperature"]
        if "16" in str(trainer.precision):
            remedies.insert(0, "hardware.precision=32-true")
    return "; ".join(remedies)


def _gradients(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _largest(gradients: list[Tensor]) -> Tensor:
    """The largest absolute value; NaN if there is a NaN. Zero of none."""
    if not gradients:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)


def _scaler(trainer: L.Trainer) -> Any:
    """The scaler of the loss with `16-mixed`, else None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _leave_out(optimizer: Optimizer, scaler: Any) -> None:
    """Make the optimizer's coming step do nothing: neither to weights nor to its state."""
    own = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in own.param_groups for p in group["params"] if p.grad is not None]
    if scaler is not None and getattr(own, "_step_supports_amp_scaling", False):
        for parameter in parameters[:1]:  # the scaler has not looked yet, and leaves the step out for this
            parameter.grad.fill_(math.inf)
        return
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
