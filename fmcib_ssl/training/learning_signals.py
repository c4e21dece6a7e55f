"""Says, while a run goes on, whether its loss still teaches the encoder anything, and what to try if not."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from fmcib_ssl.representation import contrast_figures, effective_rank, negative_shares, unit_vectors
from fmcib_ssl.training.rows import row_is_due

logger = logging.getLogger(__name__)

Views = tuple[Tensor, Tensor]

#: Rows that the effective rank is computed from, gathered over the last steps.
RANK_ROWS = 512
MORE = "docs/while_training.md says more."


class LearningSignals(L.Callback):
    """Logs what the embeddings of each batch look like, and warns, once each, of two ways to learn nothing.

    **Collapse**: all lesions get one embedding (their mean cosine), or embeddings lie along a few directions (their
    effective rank). **Negatives solved**: the softmax puts next to nothing on the negatives, so the loss is near its
    floor and its gradient near zero, whatever is still to be learned about lesions.

    Figures are averaged over windows of steps, and logged in steps that get a row: in short runs all of them, in others
    twenty a window, since Lightning takes half a millisecond for each figure. The first window is never judged:
    embeddings of random weights look collapsed. Each device looks at its own lesions; the first device's figures are
    logged. No device waits for another.

    Needs `training_step` to return `embeddings`, the detached embeddings `(z0, z1)` of two views of the batch's
    lesions, and, for mined negatives, `negatives`, theirs. Of the module's attribute `loss` it reads `temperature`,
    `margin` and `negatives`; methods whose loss has no `negatives` get the figures of collapse only.

    Args:
        window: steps that are judged together; in a short run a tenth of it.
        max_lesion_cosine: of two random lesions, above which embeddings count as collapsed.
        min_rank: effective rank below which they do.
        min_negative_share: of the softmax, below which the negatives count as solved.

    Raises:
        ValueError: a number that makes no sense.
    """

    def __init__(
        self,
        window: int = 200,
        max_lesion_cosine: float = 0.95,
        min_rank: float = 3.0,
        min_negative_share: float = 0.05,
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}: it takes at least one step to judge")
        if not 0 < max_lesion_cosine <= 1 or not 0 <= min_negative_share < 1:
            raise ValueError(
                f"max_lesion_cosine={max_lesion_cosine} must be in 0 to 1, and "
                f"min_negative_share={min_negative_share} in 0 to 1, 1 excluded"
            )
        self.window = window
        self.max_lesion_cosine = max_lesion_cosine
        self.min_rank = min_rank
        self.min_negative_share = min_negative_share
        self._window = window
        self._num_windows = 0
        self._unlogged = 0
        self._figures: list[dict[str, Tensor]] = []
        self._recent: deque[Tensor] = deque()
        self._said: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the window to the length of the run."""
        self._window = min(self.window, max(10, int(min(trainer.estimated_stepping_batches, 1e9)) // 10))
        # Of a run that is gone on with, what the checkpoint had.
        self._figures = [{name: v.to(pl_module.device) for name, v in step.items()} for step in self._figures]
        self._recent = deque(rows.to(pl_module.device) for rows in self._recent)

    def state_dict(self) -> dict[str, Any]:
        """The window that has begun: a run that is stopped in it and gone on with judges it whole."""
        return {
            "figures": list(self._figures),
            "recent": list(self._recent),
            "num_windows": self._num_windows,
            "unlogged": self._unlogged,
            "said": sorted(self._said),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a state of `state_dict`."""
        self._figures = list(state_dict["figures"])
        self._recent = deque(state_dict["recent"])
        self._num_windows = state_dict["num_windows"]
        self._unlogged = state_dict["unlogged"]
        self._said = set(state_dict["said"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at this step's embeddings; at the end of a window log their rank, and judge it."""
        if not isinstance(outputs, dict) or "embeddings" not in outputs:
            return
        positive = cast(Views, unit_vectors(outputs["embeddings"]))
        mined = cast(Views, unit_vectors(outputs["negatives"])) if outputs.get("negatives") is not None else None
        figures = contrast_figures(positive, mined)
        shares = self._shares(pl_module, positive, mined, trainer.world_size)
        if shares:
            figures |= shares | {"negative_share": torch.stack(list(shares.values())).sum()}
        self._unlogged += 1
        if self._unlogged >= self._window // 20 and row_is_due(trainer):
            self._unlogged = 0
            self._log(pl_module, figures, len(positive[0]))

        self._figures.append(figures)
        self._recent.append(positive[0][:RANK_ROWS])
        while sum(map(len, self._recent)) - len(self._recent[0]) >= RANK_ROWS:
            self._recent.popleft()
        if len(self._figures) == self._window:
            self._end_window(pl_module)

    def _end_window(self, pl_module: L.LightningModule) -> None:
        rows = torch.cat(list(self._recent))[-RANK_ROWS:]
        # on the CPU: a GPU takes longer for singular values of so small a matrix, and its results are awaited anyway
        rank = float(effective_rank(rows.cpu()))
        names = self._figures[0].keys()
        mean = {
            name: float(torch.stack([figures[name] for figures in self._figures if name in figures]).mean())
            for name in names
        }
        self._figures.clear()
        self._num_windows += 1
        self._log(pl_module, {"rank": rank}, len(rows))
        if self._num_windows == 1:
            return
        collapsed = self._collapse(pl_module, mean, rank, len(rows))
        solved = self._solved(pl_module, mean)
        flags = {"collapsed": collapsed is not None, "negatives_solved": solved is not None}
        pl_module.log_dict({f"signals/{name}": float(flag) for name, flag in flags.items()})
        for name, message in zip(flags, (collapsed, solved), strict=True):
            if message is not None and name not in self._said:
                self._said.add(name)
                _warn(f"step {pl_module.global_step}: {message} {MORE}")

    def _collapse(self, pl_module: L.LightningModule, mean: dict[str, float], rank: float, num_rows: int) -> str | None:
        cosine = mean.get("lesion_cosine", 0.0)
        if cosine > self.max_lesion_cosine:
            seen = f"two random lesions have a cosine of {cosine:.3f} over {self._window} steps; 1 is one point for all"
        elif rank < self.min_rank and num_rows > 4 * self.min_rank:
            seen = f"{num_rows} embeddings lie along {rank:.1f} directions"
        else:
            return None
        choice = _negatives(pl_module)
        if choice == "mined":
            remedy = (
                "mined negatives alone put no force between lesions: set loss.negatives=mined_and_lesions, or "
                "method=simclr"
            )
        elif choice is not None:
            remedy = "lower loss.temperature or optimizer.base_lr, or take a larger batch"
        else:
            remedy = "lower optimizer.base_lr, take a larger batch, or choose a method with negatives"
        return f"the embeddings have collapsed: {seen}. To try: {remedy}."

    def _solved(self, pl_module: L.LightningModule, mean: dict[str, float]) -> str | None:
        share = mean.get("negative_share", 1.0)
        if share >= self.min_negative_share:
            return None
        remedy = (
            "loss.negatives=mined_and_lesions, which also tells lesions from each other; data.mining=hard"
            if _negatives(pl_module) == "mined"
            else "a larger batch; stronger augmentation; data.mining=hard"
        )
        return (
            f"the negatives are solved: over {self._window} steps they held {share:.1%} of the softmax, so the loss "
            f"has next to nothing left to teach. To try: {remedy}; a higher loss.temperature."
        )

    @staticmethod
    def _shares(
        pl_module: L.LightningModule, positive: Views, mined: Views | None, world_size: int
    ) -> dict[str, Tensor]:
        """What the negatives hold of the softmax; nothing for methods that have none."""
        choice = _negatives(pl_module)
        if choice is None:
            return {}
        loss = cast(Any, pl_module).loss
        with torch.no_grad():
            return negative_shares(
                positive,
                mined if choice != "lesions" else None,
                temperature=loss.temperature,
                margin=getattr(loss, "margin", 0.0),
                lesions=choice != "mined",
                world_size=world_size,
            )

    @staticmethod
    def _log(pl_module: L.LightningModule, figures: dict[str, Any], num_lesions: int) -> None:
        pl_module.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=num_lesions)


def _negatives(pl_module: L.LightningModule) -> str | None:
    """What the module's loss contrasts lesions with; None where it is not a loss of negatives."""
    loss: Any = getattr(pl_module, "loss", None)
    return str(loss.negatives) if hasattr(loss, "temperature") and hasattr(loss, "negatives") else None


@rank_zero_only
def _warn(message: str) -> None:
    logger.warning("%s", message)
