r"""Two contrastive losses and the cross entropy under them: embeddings in, one scalar out.

Each of the 2N embeddings of N lesions is an anchor `a` once. With its other view `p`, its negatives `n`, cosines as
scores, a temperature and a margin (0 in NT-Xent),

    loss(a) = -log( e^p' / (e^p' + sum_n e^(a.n / temperature)) ),    p' = (a.p - margin) / temperature

Other lesions of the anchor's patient are negatives like others, or none, or further positives: loss(a) is then the mean
over all its positives, each against the same negatives (Khosla et al., Supervised Contrastive Learning, eq. 2).

Read from top to bottom: what both losses do, which is to check, gather and sum loss(a); the two losses; the sum over
negatives in panels, for large batches; gathering; checks. `docs/losses.md` says what the choices do.

Departs from the published class in this only: the positive logit is a row-wise product, not the diagonal of a matrix;
what is gathered is what the choice of negatives needs; all is computed in float32, backward too, whatever autocast
says; a batch without a lesion or without negatives is an error, not a loss of NaN or 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fmcib_ssl.types import ViewPairs

__all__ = [
    "InfoNCELoss",
    "Kernel",
    "NTXentNegativeMinedLoss",
    "Negatives",
    "at_least_float32",
    "gather_rows",
    "num_ranks",
]

#: What an anchor is pushed away from: the mined patches in its view, both views of the other lesions (SimCLR), or both
#: kinds; or both views of the other lesions' mined patches (the published run).
Negatives = Literal["mined", "mined_and_lesions", "lesions", "mined_of_others"]
_COMPARE_LESIONS = ("mined_and_lesions", "lesions")
#: How the sum over negatives is computed: with the matrix of similarities, without, or as the size suggests.
Kernel = Literal["auto", "plain", "streamed"]
_Reduction = Literal["mean", "sum"]
#: Other lesions of the anchor's patient: negatives as any, left out of the negatives, or positives too.
_SamePatient = Literal["keep", "ignore", "attract"]
#: Rows `(views, n, dim)` of a rank to those of all, `(views, ranks * n, dim)`, rank after rank, with gradients.
_Gather = Callable[[Tensor], Tensor]

#: From this many logits on, streaming is faster than the matrix (docs/contrast_kernel.md has the measurement).
_WORTH_STREAMING = 2**19
#: Elements of a panel: 16 MiB of float32 on a CPU, whose caches reuse it; 256 MiB where kernels have to be kept busy.
_PANEL_CPU, _PANEL_OTHER = 2**22, 2**26
_MIN_TEMPERATURE = 1e-8
#: Powers of two up to this magnitude, and sums of very many of them, are safe in float32 without subtracting a maximum.
_SAFE_EXPONENT = 60.0
_LOG2_E = math.log2(math.e)


class _ContrastiveLoss(nn.Module):
    """The sum of `loss(a)`; the arguments are explained in the two losses."""

    temperature: float | Tensor
    margin = 0.0

    def __init__(
        self,
        negatives: Negatives,
        gather_distributed: bool,
        kernel: Kernel,
        same_patient: _SamePatient,
        reduction: _Reduction = "mean",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("negatives", negatives, get_args(Negatives)),
            ("same_patient", same_patient, get_args(_SamePatient)),
            ("gather_distributed", gather_distributed, (True, False)),
            ("kernel", kernel, get_args(Kernel)),
            ("reduction", reduction, get_args(_Reduction)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
        if negatives not in _COMPARE_LESIONS and same_patient == "attract":
            raise ValueError(
                'same_patient="attract" makes positives of lesions that are compared, but '
                f'negatives="{negatives}" compares none: choose negatives="mined_and_lesions", or same_patient="keep"'
            )
        self.negatives: Negatives = negatives
        self.same_patient: _SamePatient = same_patient
        self.gather_distributed = gather_distributed
        self.kernel: Kernel = kernel
        self.reduction: _Reduction = reduction

    def forward(self, out: ViewPairs, gather: _Gather | None = None) -> Float[Tensor, ""]:
        """Mean or sum of `loss(a)` over this rank's `2 * batch` anchors, in float32 (float64 if an input is).

        Args:
            out: embeddings `(batch, dim)`, not normalized; `negative` may hold another number of rows, with
                "mined_of_others" a multiple: those of lesion 0 first. Unless `same_patient` is "keep", also `patient`,
                `(batch,)` integers that are equal for lesions of one patient.
            gather: what gathers the negatives of all ranks, if `gather_distributed`; by default `gather_rows`.
                `MinedContrast` gives Lightning's `all_gather`.

        Raises:
            AssertionError: a key is missing.
            ValueError: embeddings are no pairs of float tensors, their shapes, devices, or sizes across ranks do not
                fit, or an anchor has no negative. Where `same_patient` leaves an anchor none, its loss is 0.
        """
        positive, mined = _stack_views(out)
        loss = self._sum(positive, mined, self._patients(out), gather or gather_rows)
        return loss / (2 * positive.shape[1]) if self.reduction == "mean" else loss

    def _patients(self, out: ViewPairs) -> Tensor | None:
        """The patient of each lesion, where it matters."""
        if self.same_patient == "keep" or self.negatives not in _COMPARE_LESIONS:
            return None
        patients, num = out.get("patient"), len(out["positive"][0])
        if patients is None or patients.shape != (num,) or patients.is_floating_point():
            got = "none" if patients is None else f"{patients.dtype} {tuple(patients.shape)}"
            raise ValueError(f'same_patient="{self.same_patient}" needs `patient`, {num} integers; got {got}')
        return patients.to(out["positive"][0].device)

    def _sum(self, positive: Tensor, mined: Tensor, patients: Tensor | None, gather: _Gather) -> Tensor:
        """Of `loss(a)` over the anchors, both views of `positive`."""
        all_patients, first_lesion = patients, 0  # of all ranks, and the row where this rank's begin
        if self.gather_distributed and num_ranks() > 1:
            _check_sizes_across_ranks(positive, mined)  # before anything that may fail on one rank only
            mined, others = self._keys(positive, mined, gather)
            first_lesion = dist.get_rank() * positive.shape[1]
            all_patients = None if patients is None else torch.cat(_of_all_ranks(patients))
        else:
            mined, others = self._keys(positive, mined, lambda rows: rows)
        num_anchors, num_mined, num_lesions = positive.shape[1], mined.shape[1], len(others[0]) if others else 0
        with torch.autocast(positive.device.type, enabled=False):
            unit = F.normalize(positive, dim=2)
            temperature = self.temperature
            anchors = unit / temperature
            positive_logits = ((unit[0] * unit[1]).sum(dim=1) - self.margin) / temperature
            margin = positive_logits.new_zeros(()) + self.margin / temperature  # of a logit
            if self.kernel == "streamed" or (
                self.kernel == "auto" and 2 * num_anchors * (num_mined + len(others) * num_lesions) >= _WORTH_STREAMING
            ):
                own_keys = [num_mined + view * num_lesions + first_lesion for view in range(len(others))]
                groups = None
                if patients is not None and all_patients is not None:
                    of_mined = all_patients.new_full((num_mined,), -1)
                    of_keys = torch.cat([of_mined, *([all_patients] * len(others))])
                    groups = (patients, of_keys, num_mined, self.same_patient == "attract")
                loss = positive_logits.new_zeros(())
                for queries, own_mined in zip(anchors, mined, strict=True):
                    keys = F.normalize(torch.cat([*([own_mined] if num_mined else []), *others]))
                    loss = loss + _Streamed.apply(queries, positive_logits, keys, margin, own_keys, groups)
                return loss
            numbers = torch.arange(max(num_anchors, num_lesions), device=positive.device)
            own = numbers[:num_anchors, None] + first_lesion == numbers[:num_lesions]
            same = own if patients is None or all_patients is None else patients[:, None] == all_patients
            keys_of_others = [F.normalize(keys) for keys in others]
            terms = [torch.stack([_logsumexp(queries, keys, same) for queries in anchors]) for keys in keys_of_others]
            if num_mined:
                terms += [torch.stack([_logsumexp(anchors[view], F.normalize(mined[view])) for view in (0, 1)])]
            negative_logits = torch.stack(terms).logsumexp(dim=0)
            # -log(e^p / (e^p + e^n)), without cancellation where the pair is well separated already.
            losses = -F.logsigmoid(positive_logits - negative_logits)
            if self.same_patient == "attract":
                siblings = (same & ~own).to(losses.dtype)
                for keys in keys_of_others:
                    logits = _similarities(anchors.flatten(0, 1), keys).view(2, num_anchors, -1) - margin
                    losses = losses - (F.logsigmoid(logits - negative_logits[..., None]) * siblings).sum(dim=2)
                losses = losses / (1 + len(keys_of_others) * siblings.sum(dim=1))
            return losses.sum()

    def _keys(self, positive: Tensor, mined: Tensor, gather: _Gather) -> tuple[Tensor, list[Tensor]]:
        """What anchors are contrasted with, of all ranks.

        Returns:
            The mined patches of both views `(2, m, dim)`, each a negative of its own view only; and matrices
            `(lesions, dim)` whose rows are negatives of both views of all lesions but the row's own.
        """
        num_all = positive.shape[1] * (num_ranks() if self.gather_distributed else 1)
        lesions = gather(positive) if self.negatives in _COMPARE_LESIONS else positive[:0]
        mined = gather(mined) if self.negatives != "lesions" else mined[:, :0]
        _check_rows(positive.shape[1], mined.shape[1], num_all, self.negatives)
        if self.negatives != "mined_of_others":
            return mined, list(lesions)
        # As lesions are, but their mined patches: one of each lesion at a time.
        return mined[:, :0], list(mined.reshape(2, num_all, -1, mined.shape[2]).movedim(2, 1).flatten(0, 1))

    def extra_repr(self) -> str:
        """What `print(loss)` shows."""
        return (
            f"temperature={torch.as_tensor(self.temperature).item():.6g}, margin={self.margin}, "
            f"negatives={self.negatives!r}, same_patient={self.same_patient!r}, reduction={self.reduction!r}, "
            f"gather_distributed={self.gather_distributed}, kernel={self.kernel!r}"
        )


class NTXentNegativeMinedLoss(_ContrastiveLoss):
    """NT-Xent with explicitly mined negatives: the mean of `loss(a)` without a margin.

    Args:
        temperature: divides the cosines; 0.05 to 0.5 is usual. A negative one is allowed, as published, with a warning.
        gather_distributed: contrast with the negatives of all ranks, with gradients.
        negatives: what an anchor is contrasted with.
        kernel: how the sum over negatives is computed; "streamed" has no second derivative.
        same_patient: what other lesions of the anchor's patient are, where lesions are compared.

    Raises:
        ValueError: `abs(temperature) < 1e-8` or not finite, or an unknown choice.

    Attributes:
        cross_entropy, eps: as published, for what reads them; the loss does not call the module.

    Source: Pai et al., Foundation model for cancer imaging biomarkers, Nat. Mach. Intell. 2024: its code's class of
    this name ("mined") and the criterion of its run ("mined_of_others"); Chen et al., SimCLR, ICML 2020, eq. 1
    ("lesions").
    """

    def __init__(
        self,
        temperature: float = 0.1,
        gather_distributed: bool = False,
        negatives: Negatives = "mined",
        kernel: Kernel = "auto",
        same_patient: _SamePatient = "keep",
    ) -> None:
        _check_temperature(temperature)
        super().__init__(negatives, gather_distributed, kernel, same_patient)
        if temperature < 0:
            warnings.warn(
                f"temperature {temperature} is negative: the loss then rewards similarity to the negatives "
                "and pushes the two views of a lesion apart, the opposite of contrastive learning",
                stacklevel=2,
            )
        self.temperature = temperature
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = _MIN_TEMPERATURE


class InfoNCELoss(_ContrastiveLoss):
    """InfoNCE with an additive margin, on embeddings (`forward`) and, as PyKEEN's class of the same name, on scores.

    Args:
        margin: what the score of a positive must exceed a negative's by; 0 or more, 0.01 to 0.1 is usual.
        log_adversarial_temperature: natural logarithm of the temperature; `from_temperature` takes it plain.
        reduction: "mean" or "sum" over the anchors or rows.
        negatives: what an anchor is contrasted with.
        trainable_temperature: make `log_temperature` a parameter that starts where it is given.
        gather_distributed: contrast with the negatives of all ranks, with gradients.
        kernel: how the sum over negatives is computed; "streamed" has no second derivative.
        same_patient: what other lesions of the anchor's patient are, where lesions are compared.

    Raises:
        ValueError: a negative or infinite margin, a temperature below 1e-8 or not finite, or an unknown choice.

    Source: Wang et al., SimKGC, ACL 2022, training loss; the score methods follow `pykeen.losses.InfoNCELoss`.
    """

    hpo_default: ClassVar[Mapping[str, Any]] = {
        "margin": {"type": float, "low": 0.01, "high": 0.10},
        "log_adversarial_temperature": {"type": float, "low": -3.0, "high": 3.0},
    }

    def __init__(
        self,
        margin: float = 0.02,
        log_adversarial_temperature: float = math.log(0.05),
        reduction: _Reduction = "mean",
        *,
        negatives: Negatives = "mined",
        trainable_temperature: bool = False,
        gather_distributed: bool = False,
        kernel: Kernel = "auto",
        same_patient: _SamePatient = "keep",
    ) -> None:
        super().__init__(negatives, gather_distributed, kernel, same_patient, reduction)
        if margin < 0:
            raise ValueError(f"Cannot have a negative margin: {margin}; 0 turns it off, 0.01 to 0.1 is usual")
        if not math.isfinite(margin):
            raise ValueError(f"margin must be finite, got {margin}; 0 turns it off, 0.01 to 0.1 is usual")
        if log_adversarial_temperature > 700:  # where exp() overflows
            raise ValueError(f"log_adversarial_temperature must be a logarithm, got {log_adversarial_temperature}")
        _check_temperature(math.exp(log_adversarial_temperature))
        self.margin = margin
        self.log_temperature: float | nn.Parameter = log_adversarial_temperature
        if trainable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(float(log_adversarial_temperature)))

    @classmethod
    def from_temperature(cls, temperature: float, margin: float = 0.02, *args: Any, **options: Any) -> InfoNCELoss:
        """The loss with a temperature instead of its logarithm; everything else, and errors, as in the class."""
        _check_temperature(temperature)
        if temperature < 0:
            raise ValueError(f"InfoNCE takes a positive temperature, got {temperature}; 0.05 to 0.5 is usual")
        return cls(margin, math.log(temperature), *args, **options)

    @property
    def temperature(self) -> float | Float[Tensor, ""]:  # type: ignore[override]
        """What scores are divided by; a tensor with a gradient when it is trained."""
        if isinstance(self.log_temperature, Tensor):
            return self.log_temperature.exp()
        return math.exp(self.log_temperature)

    @property
    def inverse_softmax_temperature(self) -> float | Float[Tensor, ""]:
        """`temperature`, by the name it has in PyKEEN."""
        return self.temperature

    def process_lcwa_scores(
        self,
        predictions: Float[Tensor, "batch candidates"],
        labels: Float[Tensor, "batch candidates"],
        label_smoothing: float | None = None,
        num_entities: int | None = None,
        weights: Float[Tensor, "batch num_weights"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy of each row's candidates against its labels, scaled to sum to 1; a row without any counts as 0.

        Args:
            predictions: scores of all candidates.
            labels: 1 for a positive, 0 for a negative, any dtype; what is over 0.5 gets the margin.
            label_smoothing: the share of the target, 0 to 1, that is spread evenly over a row's candidates.
            num_entities: accepted for compatibility; a softmax smooths over the candidates it has.
            weights: a row counts as much as its weights sum to; the mean is then the weighted one. PyKEEN gives each
                row one, or one for each candidate.

        Raises:
            ValueError: not two matrices of one shape, weights not one row for each of theirs, or `label_smoothing` not
                in 0 to 1.
        """
        if predictions.ndim != 2 or predictions.shape != labels.shape:
            raise ValueError(
                "predictions and labels must both be (batch, candidates), "
                f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
            )
        if weights is not None and (weights.ndim != 2 or len(weights) != len(labels)):
            raise ValueError(f"weights must be ({len(labels)}, any number), got {tuple(weights.shape)}")
        scores = at_least_float32(predictions)
        logits = (scores - self.margin * (labels > 0.5)) / self.temperature
        target = F.normalize(labels.to(scores.dtype), p=1, dim=1)
        smoothing = _checked_smoothing(label_smoothing)
        if weights is None:
            return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=self.reduction)
        of_rows = weights.to(scores.dtype).sum(dim=1)
        total = (of_rows * F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")).sum()
        return total if self.reduction == "sum" else total / of_rows.sum().clamp_min(torch.finfo(scores.dtype).eps)

    def process_slcwa_scores(  # noqa: PLR0917  # as PyKEEN calls it
        self,
        positive_scores: Float[Tensor, "batch 1"],
        negative_scores: Float[Tensor, "batch num_negatives"] | Float[Tensor, " kept"],
        label_smoothing: float | None = None,
        batch_filter: Bool[Tensor, "batch num_negatives"] | None = None,
        num_entities: int | None = None,
        pos_weights: Tensor | None = None,
        neg_weights: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy of one positive a row against that row's sampled negatives.

        Departs from PyKEEN where `label_smoothing` meets negatives that `batch_filter` removed: there they get a
        share of the target, and the loss is infinite; here only the candidates that remain share it.

        Args:
            positive_scores: `(batch, 1)` or `(batch,)`.
            negative_scores: dense, or sparse: only those where `batch_filter` is True, row by row.
            label_smoothing: the share of the target, 0 to 1, that is spread evenly over a row's candidates.
            batch_filter: True where a negative was kept; given if and only if `negative_scores` is sparse.
            num_entities: accepted for compatibility; a softmax smooths over the candidates it has.
            pos_weights: None; PyKEEN passes them always, and its cross entropies take none either.
            neg_weights: likewise.

        Raises:
            RuntimeError: weights are given.
            ValueError: the shapes do not fit each other, `batch_filter` is not boolean, or `label_smoothing` not in 0
                to 1.
        """
        if pos_weights is not None or neg_weights is not None:
            raise RuntimeError(
                f"{type(self).__name__} does not support sample weights in process_slcwa_scores; "
                "process_lcwa_scores takes them, or train without a loss_weighter"
            )
        smoothing = _checked_smoothing(label_smoothing)
        positive = at_least_float32(positive_scores)
        negative = _dense_scores(at_least_float32(negative_scores), batch_filter)
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
        losses = -(1 - smoothing) * log_probability[:, 0] - smoothing * evenly
        return losses.mean() if self.reduction == "mean" else losses.sum()


def _logsumexp(queries: Tensor, keys: Tensor, excluded: Tensor | None = None) -> Float[Tensor, " queries"]:
    """`log(sum_j exp(queries[i] . keys[j]))` over the keys that are not excluded, `(queries, keys)`."""
    similarity = _similarities(queries, keys)
    if excluded is not None:
        similarity = similarity.masked_fill(excluded, -math.inf)
    return similarity.logsumexp(dim=1)


def _similarities(queries: Float[Tensor, "n dim"], keys: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    """`queries @ keys.T`, exact also where a backward, of any order, runs inside autocast, which rounds products."""
    compiling = torch.compiler.is_compiling()  # cannot trace a `jvp`
    similarity: Tensor = queries @ keys.T if compiling else _Similarities.apply(queries, keys)
    return similarity


class _Similarities(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries: Float[Tensor, "n dim"], keys: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
        with torch.autocast(queries.device.type, enabled=False):
            product: Tensor = queries @ keys.T
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        queries, keys = ctx.saved_tensors
        of_queries = _Similarities.apply(grad, keys.T) if ctx.needs_input_grad[0] else None
        return of_queries, _Similarities.apply(grad.T, queries.T) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, queries_tangent: Tensor, keys_tangent: Tensor) -> Tensor:
        queries, keys = ctx.saved_tensors
        tangent: Tensor = _Similarities.apply(queries_tangent, keys) + _Similarities.apply(queries, keys_tangent)
        return tangent


class _Streamed(torch.autograd.Function):
    """`sum_i -log(e^p_i / (e^p_i + sum_j e^(queries[i] . keys[j])))`, in memory that grows with n + m, not with n * m.

    A panel is some queries against all keys. It sees all negatives of its anchors at once, so their share of the
    gradients is known while the panel is still in the cache: they are accumulated in the forward, and the backward only
    scales them. Query `i` does not see the keys `own_key + i`, nor those of its patient: `groups` has the patients of
    queries and keys, the first key that is a lesion, and whether lesions of one patient attract each other. Then the
    term of an anchor is the mean over all its positives; `margin` is subtracted from the logits of the further ones.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd takes no keywords
        ctx: Any,
        queries: Float[Tensor, "n dim"],
        positive_logits: Float[Tensor, " n"],
        keys: Float[Tensor, "m dim"],
        margin: Float[Tensor, ""],
        own_keys: Sequence[int],
        groups: tuple[Tensor, Tensor, int, bool] | None,
    ) -> Float[Tensor, ""]:
        loss = positive_logits.new_zeros(())
        of_queries, of_positives = torch.zeros_like(queries), torch.zeros_like(positive_logits)
        of_margin = torch.zeros_like(margin)
        of_keys = torch.zeros_like(keys) if ctx.needs_input_grad[2] else None
        # Whether no logit can be so large or small that its exponential needs a maximum subtracted. False for NaN.
        bounded = float(queries.norm(dim=1).max() * keys.norm(dim=1).max()) * _LOG2_E < _SAFE_EXPONENT
        num_rows = max(16, (_PANEL_CPU if queries.device.type == "cpu" else _PANEL_OTHER) // len(keys))
        for start in range(0, len(queries), num_rows):
            rows = slice(start, min(start + num_rows, len(queries)))
            # To base 2: torch computes `exp2` more than twice as fast as `exp` on a CPU.
            panel = (queries[rows] * _LOG2_E) @ keys.T
            further = _exclude(panel, rows, own_keys, groups, margin)
            total, log_total = _exponentiate(panel, bounded)
            difference = positive_logits[rows] - log_total
            share = torch.sigmoid(-difference)  # of an anchor's probability: what its negatives have
            if further is None:
                loss -= F.logsigmoid(difference).sum()
                of_positives[rows] = -share
            else:
                row, key, logits = further
                weight = 1 / (1 + torch.bincount(row, minlength=len(share)).to(share.dtype))
                logits = logits - log_total[row]
                loss -= (weight * F.logsigmoid(difference)).sum() + (weight[row] * F.logsigmoid(logits)).sum()
                pulls = weight[row] * torch.sigmoid(-logits)
                of_positives[rows] = -weight * share
                of_margin += pulls.sum()
                share = (weight * share).index_add_(0, row, pulls)
                # `factor` below turns these into `-pulls`; a pull is at most the anchor's share.
                panel[row, key] = -pulls / share.clamp_min(torch.finfo(share.dtype).tiny)[row] * total[row]
            factor = (share / total)[:, None]  # turns exponentials into gradients of logits
            torch.mul(panel @ keys, factor, out=of_queries[rows])
            if of_keys is not None:
                of_keys.addmm_(panel.T, queries[rows] * factor)
            del panel  # before the next one is made
        ctx.save_for_backward(of_queries, of_positives, of_keys, of_margin)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # autograd would take the gradients for constants
            raise RuntimeError("the streamed loss has no second derivative (create_graph=True): kernel='plain' has one")
        return *(None if saved is None else grad * saved for saved in ctx.saved_tensors), None, None


def _exclude(
    panel: Tensor,
    rows: slice,
    own_keys: Sequence[int],
    groups: tuple[Tensor, Tensor, int, bool] | None,
    margin: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Take the logits of own keys, and those of the patient, out of a panel of logits to base 2.

    Returns:
        Row, key and logit of the further positives; None where lesions of one patient do not attract each other.
    """
    further = None
    if groups is not None:
        patients, of_keys, first, attract = groups
        same = patients[rows, None] == of_keys
        if attract:
            for own_key in own_keys:
                same[:, own_key + rows.start :].diagonal().fill_(False)
            row, key = same.nonzero(as_tuple=True)
            further = row, key, panel[row, key] / _LOG2_E - margin
        panel[:, first:].masked_fill_(same[:, first:], -math.inf)
    for own_key in own_keys:
        panel[:, own_key + rows.start :].diagonal().fill_(-math.inf)
    return further


def _exponentiate(panel: Tensor, bounded: bool) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Turn logits to base 2 into exponentials, in place, up to a factor for each row.

    Returns:
        The sum of each row, and the natural logarithm of what the sum would be without that factor.
    """
    lowest = torch.finfo(panel.dtype)
    shift = None if bounded else panel.amax(dim=1, keepdim=True).clamp_min(lowest.min)
    if shift is not None:
        panel.sub_(shift)
    total = panel.exp2_().sum(dim=1)
    log2_total = total.log2() if shift is None else total.log2() + shift[:, 0]
    # Only a row that sees no key at all has a sum of 0; its exponentials are 0 too, and stay it when divided.
    return total.clamp_min(lowest.tiny), log2_total * math.log(2.0)


def num_ranks() -> int:
    """The number of processes that share this training; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Float[Tensor, "*views n dim"]) -> Float[Tensor, "*views all dim"]:
    """Rows of all ranks, rank after rank, as many of each; the gradient is summed over what all ranks did with them."""
    gathered: Tensor = _GatherRows.apply(rows) if num_ranks() > 1 else rows
    return gathered


class _GatherRows(torch.autograd.Function):
    # Why not torch.distributed.nn.functional.all_gather: torch has deprecated it, and the successor it names
    # is missing from the oldest torch that we support.
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts, dim=-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), dim=-2)[dist.get_rank()]


def _of_all_ranks(own: Tensor) -> list[Tensor]:
    """A tensor of each rank, all of one shape, without gradients."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return parts


def _check_sizes_across_ranks(positive: Float[Tensor, "2 n dim"], mined: Float[Tensor, "2 m dim"]) -> None:
    """Raise ValueError, on every rank, when batches differ in size: a gather would hang or mix up rows."""
    own = torch.tensor([positive.shape[1], mined.shape[1], positive.shape[2]], device=positive.device)
    rows = torch.stack(_of_all_ranks(own)).tolist()
    if any(row != rows[0] for row in rows):
        table = "; ".join(f"rank {rank}: {n} lesions, {m} mined, dim {d}" for rank, (n, m, d) in enumerate(rows))
        raise ValueError(
            f"every rank must hold a batch of the same size, got {table}. "
            "Give all ranks the same batch size, and drop the last, incomplete batch"
        )


def _stack_views(out: ViewPairs) -> tuple[Float[Tensor, "2 n dim"], Float[Tensor, "2 m dim"]]:
    """Check all embeddings; gives both views of the lesions and of the negatives, float32 (float64 if any input is)."""
    pairs: dict[str, Any] = {}
    for name in ("positive", "negative"):
        if name not in out:
            raise AssertionError(f"`{name}` key needs to be specified; got the keys {list(out)}")
        pair: Any = out[name]
        if isinstance(pair, Tensor) and pair.ndim == 3:
            pair = pair.unbind()
        pairs[name] = pair
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"{len(pair)} entries" if isinstance(pair, tuple | list) else type(pair).__name__
            raise ValueError(f"`{name}` must be a pair (view 0, view 1) of embeddings, got {got}")
        for view, embeddings in enumerate(pair):
            is_tensor = isinstance(embeddings, Tensor)
            if not is_tensor or not embeddings.is_floating_point() or embeddings.ndim != 2:
                got = f"{embeddings.dtype} {tuple(embeddings.shape)}" if is_tensor else type(embeddings).__name__
                raise ValueError(f"`{name}` view {view} must be a float tensor (batch, dim), one row each; got {got}")
        if len(pair[0]) != len(pair[1]):
            raise ValueError(f"the two views of `{name}` differ: {len(pair[0])} and {len(pair[1])} rows")
    views = [embeddings for pair in pairs.values() for embeddings in pair]
    for what, values in (("dim", [view.shape[1] for view in views]), ("device", [view.device for view in views])):
        if len(set(values)) > 1:
            got = "`positive` {} and {}, `negative` {} and {}".format(*values)
            raise ValueError(f"all embeddings must have the same {what}, got {got}")
    dtype = torch.float64 if any(embeddings.dtype == torch.float64 for embeddings in views) else torch.float32
    positive, mined = (torch.stack([view.to(dtype) for view in pair]) for pair in pairs.values())
    return positive, mined


def _check_rows(num_anchors: int, num_mined: int, num_lesions: int, negatives: Negatives) -> None:
    """Raise ValueError unless there is an anchor, and negatives of the kind that is chosen."""
    if num_anchors == 0:
        raise ValueError("`positive` has no rows; a batch needs at least one lesion")
    if negatives != "lesions" and num_mined == 0:
        raise ValueError(
            f'`negative` has no rows, but negatives="{negatives}" contrasts with them: '
            'mine at least one negative per batch, or set negatives="lesions"'
        )
    if negatives in ("lesions", "mined_of_others") and num_lesions < 2:
        raise ValueError(
            f'negatives="{negatives}" needs at least 2 lesions in all, got 1: '
            "use a larger batch, and drop the last one if it is incomplete"
        )
    if negatives == "mined_of_others" and num_mined % num_lesions:
        raise ValueError(
            f'negatives="{negatives}" needs to know whose a mined patch is, as many for every lesion: '
            f"got {num_mined} for {num_lesions} lesions"
        )


def _check_temperature(temperature: float) -> None:
    if not _MIN_TEMPERATURE <= abs(temperature) < math.inf:
        raise ValueError(
            f"Illegal temperature: abs({temperature}) < 1e-8, or not finite; for cosines 0.05 to 0.5 is usual"
        )


def at_least_float32(values: Tensor) -> Tensor:
    """In float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def _checked_smoothing(label_smoothing: float | None) -> float:
    if label_smoothing is not None and not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 to 1, got {label_smoothing}")
    return label_smoothing or 0.0


def _dense_scores(
    negative_scores: Tensor, batch_filter: Bool[Tensor, "batch num_negatives"] | None
) -> Float[Tensor, "batch num_negatives"]:
    """Put sparse negatives in their columns, with -inf where the filter removed one."""
    if batch_filter is None and negative_scores.ndim == 2:
        return negative_scores
    shape = None if batch_filter is None else tuple(batch_filter.shape)
    if batch_filter is None or batch_filter.dtype != torch.bool or negative_scores.shape != (int(batch_filter.sum()),):
        raise ValueError(
            "negative_scores are (batch, num_negatives) without batch_filter; sparse, one for each True of a boolean "
            f"batch_filter (batch, num_negatives); got {tuple(negative_scores.shape)} and {shape}"
        )
    dense = negative_scores.new_full(batch_filter.shape, -math.inf)
    return dense.masked_scatter(batch_filter, negative_scores)
