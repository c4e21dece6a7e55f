"""InfoNCE with an additive margin, on scores and on embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fmcib_ssl.losses.contrast import Gather, Negatives, check_gather, check_negatives, check_temperature, contrast
from fmcib_ssl.losses.logsumexp import Kernel, check_kernel
from fmcib_ssl.types import ViewPairs

_LOG_TEMPERATURE = math.log(0.05)


class InfoNCELoss(nn.Module):
    """Cross entropy with `(positive - margin) / temperature` and `negative / temperature` as logits.

    Args:
        margin: what the score of a positive must exceed a negative's by; not negative.
        log_adversarial_temperature: natural logarithm of the temperature; `from_temperature` takes it plain.
        reduction: "mean" or "sum" over the anchors or rows.
        negatives: what `forward` contrasts an anchor with. "mined": the mined negatives of the same view number;
            "lesions": both views of the other lesions (SimCLR); "mined_and_lesions": all of these.
        trainable_temperature: make `log_temperature` a parameter that starts where it is given.
        gather_distributed: `forward` contrasts with the negatives of all ranks, with gradients: True gathers them,
            "ring" takes one rank's at a time and holds two ranks' at most. Leave it off where the caller gathers.
        kernel: how `forward` computes the sums over negatives: "plain" holds the matrix of similarities, "streamed" and
            "triton" (GPUs) never do, and differentiate once only; "auto" takes one of the first two, by size.

    Raises:
        ValueError: a negative or infinite margin, a temperature below 1e-8 or not finite, an unknown `reduction`
            or choice of negatives, ranks or kernel.

    Source:
        Wang et al., SimKGC, ACL 2022, training loss. The score methods follow `pykeen.losses.InfoNCELoss`.
    """

    hpo_default: ClassVar[Mapping[str, Any]] = {
        "margin": {"type": float, "low": 0.01, "high": 0.10},
        "log_adversarial_temperature": {"type": float, "low": -3.0, "high": 3.0},
    }

    def __init__(
        self,
        margin: float = 0.02,
        log_adversarial_temperature: float = _LOG_TEMPERATURE,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        negatives: Negatives = "mined",
        trainable_temperature: bool = False,
        gather_distributed: Gather = False,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        if margin < 0:
            raise ValueError(f"Cannot have a negative margin: {margin}; 0 turns it off, 0.01 to 0.1 is usual")
        if not math.isfinite(margin):
            raise ValueError(f"margin must be finite, got {margin}; 0 turns it off, 0.01 to 0.1 is usual")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
        if log_adversarial_temperature > 700:  # where exp() overflows
            raise ValueError(f"log_adversarial_temperature must be a logarithm, got {log_adversarial_temperature}")
        check_temperature(math.exp(log_adversarial_temperature))
        check_negatives(negatives)
        check_gather(gather_distributed)
        check_kernel(kernel)
        self.margin = margin
        self.reduction = reduction
        self.negatives: Negatives = negatives
        self.gather_distributed: Gather = gather_distributed
        self.kernel: Kernel = kernel
        self.log_temperature: float | nn.Parameter = (
            nn.Parameter(torch.tensor(float(log_adversarial_temperature)))
            if trainable_temperature
            else log_adversarial_temperature
        )

    @classmethod
    def from_temperature(
        cls,
        temperature: float,
        margin: float = 0.02,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        negatives: Negatives = "mined",
        trainable_temperature: bool = False,
        gather_distributed: Gather = False,
        kernel: Kernel = "auto",
    ) -> InfoNCELoss:
        """The loss with a temperature instead of its logarithm; everything else as in the class.

        Raises:
            ValueError: the temperature is below 1e-8 or not finite; and whatever the class raises for.
        """
        check_temperature(temperature)
        if temperature < 0:
            raise ValueError(f"InfoNCE takes a positive temperature, got {temperature}; 0.05 to 0.5 is usual")
        return cls(
            margin,
            math.log(temperature),
            reduction,
            negatives=negatives,
            trainable_temperature=trainable_temperature,
            gather_distributed=gather_distributed,
            kernel=kernel,
        )

    @property
    def temperature(self) -> float | Float[Tensor, ""]:
        """What scores are divided by; a tensor with a gradient when it is trained."""
        if isinstance(self.log_temperature, Tensor):
            return self.log_temperature.exp()
        return math.exp(self.log_temperature)

    @property
    def inverse_softmax_temperature(self) -> float | Float[Tensor, ""]:
        """`temperature`, by the name it has in PyKEEN."""
        return self.temperature

    def forward(
        self, out: ViewPairs, *, lesions: tuple[Tensor, Tensor] | None = None, first_lesion: int = 0
    ) -> Float[Tensor, ""]:
        """Reduced cross entropy over the `2 * batch` anchors with cosines as scores, in float32 (or float64).

        Args:
            out: embeddings `(batch, dim)`, not normalized; `negative` may hold another number of rows.
            lesions: both views of the lesions of all ranks, `(all_lesions, dim)`, from a caller that gathers;
                by default `out["positive"]`. Not looked at when `negatives` is "mined".
            first_lesion: the row of `lesions` that holds this rank's first lesion.

        Raises:
            AssertionError: a key is missing.
            TypeError: an embedding is not a tensor of real floats.
            ValueError: pairs, shapes, devices, or sizes across ranks do not fit, or an anchor has no negative.
        """
        cross_entropy_sum = contrast(
            out,
            temperature=self.temperature,
            margin=self.margin,
            negatives=self.negatives,
            lesions=lesions,
            first_lesion=first_lesion,
            gather_distributed=self.gather_distributed,
            kernel=self.kernel,
        )
        return cross_entropy_sum / (2 * len(out["positive"][0])) if self.reduction == "mean" else cross_entropy_sum

    def process_lcwa_scores(
        self,
        predictions: Float[Tensor, "batch candidates"],
        labels: Float[Tensor, "batch candidates"],
        label_smoothing: float | None = None,
        num_entities: int | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy of each row's candidates against its labels, scaled to sum to 1.

        A row without a positive counts as zero, as in PyKEEN.

        Args:
            predictions: scores of all candidates.
            labels: 1 for a positive, 0 for a negative, any dtype; what is over 0.5 gets the margin.
            label_smoothing: the share of the target, 0 to 1, that is spread evenly over a row's candidates.
            num_entities: accepted for compatibility; a softmax smooths over the candidates it has.

        Raises:
            ValueError: not two matrices of one shape, or `label_smoothing` not in 0 to 1.
        """
        if predictions.ndim != 2 or predictions.shape != labels.shape:
            raise ValueError(
                "predictions and labels must both be (batch, candidates), "
                f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
            )
        scores = _at_least_float32(predictions)
        logits = (scores - self.margin * (labels > 0.5)) / self.temperature
        target = F.normalize(labels.to(scores.dtype), p=1, dim=1)
        smoothing = _checked_smoothing(label_smoothing)
        return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=self.reduction)

    def process_slcwa_scores(
        self,
        positive_scores: Float[Tensor, "batch 1"],
        negative_scores: Float[Tensor, "batch num_negatives"] | Float[Tensor, " kept"],
        label_smoothing: float | None = None,
        batch_filter: Bool[Tensor, "batch num_negatives"] | None = None,
        num_entities: int | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy of one positive a row against that row's sampled negatives.

        Departs from PyKEEN where `label_smoothing` meets negatives that `batch_filter` removed: there they get a
        share of the target, and the loss is infinite; here only the candidates that remain share it.

        Args:
            positive_scores: `(batch, 1)` or `(batch,)`.
            negative_scores: dense `(batch, num_negatives)`, or sparse: only those where `batch_filter` is True,
                row by row.
            label_smoothing: the share of the target, 0 to 1, that is spread evenly over a row's candidates.
            batch_filter: True where a negative was kept; given if and only if `negative_scores` is sparse.
            num_entities: accepted for compatibility; a softmax smooths over the candidates it has.

        Raises:
            TypeError: `batch_filter` is not boolean.
            ValueError: the shapes do not fit each other, or `label_smoothing` is not in 0 to 1.
        """
        smoothing = _checked_smoothing(label_smoothing)
        positive = _at_least_float32(positive_scores)
        negative = _dense(_at_least_float32(negative_scores), batch_filter)
        if positive.ndim == 1:
            positive = positive[:, None]
        if positive.shape != (negative.shape[0], 1):
            raise ValueError(
                f"positive_scores must be ({negative.shape[0]}, 1), one for each row of negatives, "
                f"got {tuple(positive_scores.shape)}"
            )
        scores = torch.cat([positive - self.margin, negative], dim=1)
        log_probability = (scores / self.temperature).log_softmax(dim=1)
        # Places of probability 0 are no candidates: they would turn the smoothed sum into infinity.
        removed = log_probability.isneginf()
        evenly = log_probability.masked_fill(removed, 0.0).sum(dim=1) / (~removed).sum(dim=1)
        return self._reduce(-(1 - smoothing) * log_probability[:, 0] - smoothing * evenly)

    def extra_repr(self) -> str:
        """What `print(loss)` shows."""
        temperature = torch.as_tensor(self.temperature).item()
        return (
            f"margin={self.margin}, temperature={temperature:.6g}, "
            f"trainable_temperature={isinstance(self.log_temperature, Tensor)}, "
            f"reduction={self.reduction!r}, negatives={self.negatives!r}, "
            f"gather_distributed={self.gather_distributed}, kernel={self.kernel!r}"
        )

    def _reduce(self, losses: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        return losses.mean() if self.reduction == "mean" else losses.sum()


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _checked_smoothing(label_smoothing: float | None) -> float:
    if label_smoothing is not None and not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 to 1, got {label_smoothing}")
    return label_smoothing or 0.0


def _dense(
    negative_scores: Tensor, batch_filter: Bool[Tensor, "batch num_negatives"] | None
) -> Float[Tensor, "batch num_negatives"]:
    """Put sparse negatives at their places, with -inf at the places that the filter removed."""
    if batch_filter is None:
        if negative_scores.ndim != 2:
            raise ValueError(
                f"negative_scores must be (batch, num_negatives), got {tuple(negative_scores.shape)}; "
                "sparse scores need the batch_filter that says where they belong"
            )
        return negative_scores
    if batch_filter.dtype != torch.bool:
        raise TypeError(f"batch_filter must be boolean, got {batch_filter.dtype}")
    num_kept = int(batch_filter.sum())
    if batch_filter.ndim != 2 or negative_scores.shape != (num_kept,):
        raise ValueError(
            f"a batch_filter of shape {tuple(batch_filter.shape)} that keeps {num_kept} needs negative_scores "
            f"({num_kept},), got {tuple(negative_scores.shape)}; dense scores take no filter"
        )
    dense = negative_scores.new_full(batch_filter.shape, -math.inf)
    return dense.masked_scatter(batch_filter, negative_scores)
