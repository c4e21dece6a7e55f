"""Says, while a run goes on, whether its loss still teaches the encoder anything, and what to try if not."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fmcib_ssl.models import contrast_figures, effective_rank, negative_shares, row_is_due, unit_vectors

logger = logging.getLogger(__name__)

#: Mean cosine of two random lesions above which embeddings count as collapsed, and effective rank below which they do.
_MAX_LESION_COSINE, _MIN_RANK = 0.95, 3.0
#: Share of the softmax below which the negatives count as solved.
_MIN_NEGATIVE_SHARE = 0.05
#: Rows that the effective rank is computed from, gathered over the last steps.
_RANK_ROWS = 512
#: Negatives of a loss that compares no two lesions.
_NO_LESIONS = ("mined", "mined_of_others")


class CollapseMonitor(L.Callback):
    """Logs what the embeddings of each batch look like, and warns, once each, of two ways to learn nothing.

    **Collapse**: all lesions get one embedding (their mean cosine), or embeddings lie along a few directions (their
    effective rank). **Negatives solved**: the softmax puts next to nothing on the negatives, so the loss is near its
    floor and its gradient near zero, whatever is still to be learned about lesions.

    Figures are averaged over windows of steps, and logged in every row. The first window is never judged: embeddings of
    random weights look collapsed. Each device looks at its own lesions; the first device's figures are logged. No
    device waits for another.

    Needs `training_step` to return `embeddings`, the detached embeddings `(z0, z1)` of two views of the batch's
    lesions, and, for mined negatives, `negatives`, theirs. Of the module's attribute `loss` it reads `temperature`,
    `margin` and `negatives`; methods whose loss has no `negatives` get the figures of collapse only.

    Args:
        window: steps that are judged together; in a short run a tenth of it.

    Raises:
        ValueError: an empty window.
    """

    def __init__(self, window: int = 200) -> None:
        if window < 1:
            raise ValueError(f"window={window}: it takes at least one step to judge")
        self.window = window
        self._window = window
        self._num_windows = 0
        self._figures: list[dict[str, Tensor]] = []
        self._recent: deque[Tensor] = deque()
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        """Its name in checkpoints, those of earlier versions too."""
        return "LearningSignals"

    def state_dict(self) -> dict[str, Any]:
        """The window that has begun: a run that is stopped in it and resumed judges it whole."""
        return {
            "figures": list(self._figures),
            "recent": list(self._recent),
            "num_windows": self._num_windows,
            "said": sorted(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the window."""
        self._figures = list(state_dict["figures"])
        self._recent = deque(state_dict["recent"])
        self._num_windows = state_dict["num_windows"]
        self._warned = set(state_dict["said"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the window to the length of the run, and bring what a checkpoint had to the device."""
        self._window = min(self.window, max(10, int(min(trainer.estimated_stepping_batches, 1e9)) // 10))
        self._figures = [{name: v.to(pl_module.device) for name, v in step.items()} for step in self._figures]
        self._recent = deque(rows.to(pl_module.device) for rows in self._recent)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at this step's embeddings; at the end of a window log their rank, and judge it."""
        if "embeddings" not in outputs:
            return
        view0, view1 = unit_vectors(outputs["embeddings"])
        mined = None
        if outputs.get("negatives") is not None:
            mined0, mined1 = unit_vectors(outputs["negatives"])
            mined = (mined0, mined1)
        figures = contrast_figures((view0, view1), mined)
        if (negatives := _negatives(pl_module)) is not None:
            loss: Any = pl_module.loss
            with torch.no_grad():
                shares = negative_shares(
                    (view0, view1),
                    mined if negatives != "lesions" else None,
                    temperature=loss.temperature,
                    margin=getattr(loss, "margin", 0.0),
                    lesions=negatives not in _NO_LESIONS,
                    of_others=negatives == "mined_of_others",
                    world_size=trainer.world_size,
                )
            if shares:  # a single lesion has no others
                figures |= shares | {"negative_share": torch.stack(list(shares.values())).sum()}
        if row_is_due(trainer, batch_idx):
            pl_module.log_dict({f"train/{name}": value for name, value in figures.items()})

        self._figures.append(figures)
        self._recent.append(view0[:_RANK_ROWS])
        while sum(map(len, self._recent)) - len(self._recent[0]) >= _RANK_ROWS:
            self._recent.popleft()
        if len(self._figures) == self._window:
            self._end_window(trainer, pl_module)

    def _end_window(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rows = torch.cat(list(self._recent))[-_RANK_ROWS:]
        # on the CPU: a GPU takes longer for singular values of so small a matrix, and its results are awaited anyway
        rank = float(effective_rank(rows.cpu()))
        mean = {
            name: float(torch.stack([figures[name] for figures in self._figures if name in figures]).mean())
            for name in self._figures[0]
        }
        self._figures.clear()
        self._num_windows += 1
        pl_module.log("train/rank", rank)
        if self._num_windows == 1:
            return
        negatives = _negatives(pl_module)
        warnings = {
            "collapsed": self._collapse(negatives, mean.get("lesion_cosine", 0.0), rank, len(rows)),
            "negatives_solved": self._solved(negatives, mean.get("negative_share", 1.0)),
        }
        pl_module.log_dict({f"signals/{name}": float(message is not None) for name, message in warnings.items()})
        for name, message in warnings.items():
            if message is not None and name not in self._warned:
                self._warned.add(name)
                if trainer.is_global_zero:
                    logger.warning("step %d: %s docs/while_training.md says more.", trainer.global_step, message)

    def _collapse(self, negatives: str | None, cosine: float, rank: float, num_rows: int) -> str | None:
        if cosine > _MAX_LESION_COSINE:
            evidence = f"two lesions have a cosine of {cosine:.3f} on average over {self._window} steps"
        elif rank < _MIN_RANK and num_rows > 4 * _MIN_RANK:
            evidence = f"{num_rows} embeddings lie along {rank:.1f} directions"
        else:
            return None
        if negatives in _NO_LESIONS:
            remedy = "loss.negatives=mined_and_lesions or method=simclr: mined ones put no force between lesions"
        elif negatives is None:
            remedy = "lower optimizer.base_lr, take a larger batch, or choose a method with negatives"
        else:
            remedy = "lower loss.temperature or optimizer.base_lr, or take a larger batch"
        return f"the embeddings have collapsed: {evidence}. To try: {remedy}."

    def _solved(self, negatives: str | None, share: float) -> str | None:
        if share >= _MIN_NEGATIVE_SHARE:
            return None
        lesions_too = "loss.negatives=mined_and_lesions, which also tells lesions from each other"
        remedy = lesions_too if negatives in _NO_LESIONS else "a larger batch; stronger augmentation"
        return (
            f"the negatives are solved: over {self._window} steps they held {share:.1%} of the softmax, so the loss "
            f"has next to nothing left to teach. To try: {remedy}; data.mining=hard; a higher loss.temperature."
        )


def _negatives(pl_module: L.LightningModule) -> str | None:
    """What the module's loss contrasts lesions with; None where it is not a loss of negatives."""
    loss: Any = getattr(pl_module, "loss", None)
    return str(loss.negatives) if hasattr(loss, "temperature") and hasattr(loss, "negatives") else None
