"""The arithmetic under both losses, as functions of tensors.

`contrast` is the definition, written to be read: it checks, gathers, normalizes, and takes the cross entropy
of every anchor. All work that grows with anchors times negatives is in `logsumexp_similarity`: a version that
never holds the whole matrix of similarities needs to replace that one function.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.types import ViewPairs

#: What an anchor is pushed away from: the mined patches, the other lesions, or both.
Negatives = Literal["mined", "mined_and_lesions", "lesions"]


def contrast(
    out: ViewPairs,
    *,
    temperature: float | Tensor,
    margin: float = 0.0,
    negatives: Negatives = "mined",
    lesions: tuple[Tensor, Tensor] | None = None,
    first_lesion: int = 0,
    gather_distributed: bool = False,
) -> Float[Tensor, " anchors"]:
    """Cross entropy of every anchor against its other view: the N first views, then the N second views.

    Computed in float32 (float64 if an input is), whatever autocast says.

    Args:
        out: embeddings `(batch, dim)`, not normalized; `negative` may hold another number of rows.
        temperature: divides the cosines. A tensor receives a gradient.
        margin: subtracted from the cosine of the positive pair.
        negatives: what counts as a negative.
        lesions: both views of the lesions of all ranks, `(all_lesions, dim)`; by default `out["positive"]`.
            Not looked at when `negatives` is "mined".
        first_lesion: the row of `lesions` that holds this rank's first lesion.
        gather_distributed: gather the negatives of all ranks here, with gradients.

    Raises:
        AssertionError: a key is missing.
        TypeError: an embedding is not a tensor of real floats.
        ValueError: pairs, shapes, devices, or sizes across ranks do not fit, or an anchor has no negative.
    """
    use_mined, use_lesions = negatives != "lesions", negatives != "mined"
    positive, mined, others = stack_views(out, lesions if use_lesions else None)
    num_lesions = positive.shape[1]

    if gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if use_lesions and lesions is not None:
            raise ValueError("`lesions` were given and gather_distributed is on: gather here or outside, not both")
        check_sizes_across_ranks(positive, mined)  # before anything that may fail on one rank only
        if use_mined:
            mined = all_gather_rows(mined)
        if use_lesions:
            others = all_gather_rows(positive)
            first_lesion = dist.get_rank() * num_lesions
    check_rows(num_lesions, mined.shape[1], others.shape[1], negatives)
    if use_lesions and not 0 <= first_lesion <= others.shape[1] - num_lesions:
        raise ValueError(
            f"first_lesion is {first_lesion}, which puts this rank's {num_lesions} lesions outside the "
            f"{others.shape[1]} rows of `lesions`; give the lesions of all ranks and where this rank's begin"
        )

    with torch.autocast(positive.device.type, enabled=False):
        positive, mined, others = (F.normalize(views, dim=2) for views in (positive, mined, others))
        cross_entropy = []
        for view, other_view in ((0, 1), (1, 0)):
            anchors = positive[view] / temperature
            positive_logits = (anchors * positive[other_view]).sum(dim=1) - margin / temperature
            terms = [logsumexp_similarity(anchors, mined[view])] if use_mined else []
            if use_lesions:
                terms += [logsumexp_similarity(anchors, keys, own_key=first_lesion) for keys in others]
            negative_logits = torch.stack(terms).logsumexp(dim=0)
            # -log(e^p / (e^p + e^n)), without cancellation where the pair is well separated already.
            cross_entropy.append(-F.logsigmoid(positive_logits - negative_logits))
        return torch.cat(cross_entropy)


def logsumexp_similarity(
    queries: Float[Tensor, "queries dim"], keys: Float[Tensor, "keys dim"], own_key: int | None = None
) -> Float[Tensor, " queries"]:
    """`log(sum_j exp(queries[i] . keys[j]))` for every query.

    The queries carry the temperature already, which also leaves its gradient to autograd.

    Args:
        queries: rows of any length.
        keys: rows of any length; none at all give -inf.
        own_key: leaves key `own_key + i` out of the sum of query `i`.
    """
    similarity = queries @ keys.T
    if own_key is not None:
        query_numbers = torch.arange(len(queries), device=queries.device)
        key_numbers = torch.arange(len(keys), device=keys.device)
        similarity = similarity.masked_fill(query_numbers[:, None] + own_key == key_numbers, -math.inf)
    return similarity.logsumexp(dim=1)


def stack_views(
    out: ViewPairs, lesions: tuple[Tensor, Tensor] | None = None
) -> tuple[Float[Tensor, "2 n dim"], Float[Tensor, "2 m dim"], Float[Tensor, "2 all dim"]]:
    """Check all embeddings, and stack both views of the lesions, of the mined negatives, and of all lesions.

    The tensors returned are float32, or float64 if any input is. Without `lesions` the third is the first.

    Raises:
        AssertionError: a key is missing.
        TypeError: an embedding is not a tensor of real floats.
        ValueError: not two, not 2-dimensional, views of unequal shape, unequal `dim`, or several devices.
    """
    for key in ("positive", "negative"):
        if key not in out:
            raise AssertionError(f"`{key}` key needs to be specified; got the keys {sorted(out)}")
    pairs: dict[str, Any] = {"positive": out["positive"], "negative": out["negative"]}
    if lesions is not None:
        pairs["lesions"] = lesions
    for name, pair in pairs.items():
        _check_pair(name, pair)
    if len({pair[0].shape[1] for pair in pairs.values()}) > 1:
        dims = ", ".join(f"`{name}` {pair[0].shape[1]}" for name, pair in pairs.items())
        raise ValueError(f"all embeddings must have the same dim, got {dims}")
    views = [embeddings for pair in pairs.values() for embeddings in pair]
    if len({embeddings.device for embeddings in views}) > 1:
        devices = ", ".join(f"`{name}` {pair[0].device} and {pair[1].device}" for name, pair in pairs.items())
        raise ValueError(f"all embeddings must be on one device, got {devices}")
    dtype = torch.float64 if any(embeddings.dtype == torch.float64 for embeddings in views) else torch.float32
    positive, mined, *given = (torch.stack([view.to(dtype) for view in pair]) for pair in pairs.values())
    return positive, mined, given[0] if given else positive


def _check_pair(name: str, pair: Any) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = f"{len(pair)} entries" if isinstance(pair, tuple | list) else type(pair).__name__
        raise ValueError(f"`{name}` must be a pair (view 0, view 1) of embeddings, got {got}")
    for view, embeddings in enumerate(pair):
        expected = f"`{name}` view {view} must be a float tensor (batch, dim)"
        if not isinstance(embeddings, Tensor):
            raise TypeError(f"{expected}, got {type(embeddings).__name__}")
        if not embeddings.is_floating_point():
            raise TypeError(f"{expected}, got {embeddings.dtype}")
        if embeddings.ndim != 2:
            raise ValueError(f"{expected}, got shape {tuple(embeddings.shape)}; flatten embeddings to one row each")
    if pair[0].shape != pair[1].shape:
        shapes = f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
        raise ValueError(f"the two views of `{name}` must have the same shape, got {shapes}")


def check_rows(num_lesions: int, num_mined: int, num_all_lesions: int, negatives: Negatives) -> None:
    """Raise ValueError unless there is an anchor, and negatives of the kind that was asked for."""
    if num_lesions == 0:
        raise ValueError("`positive` has no rows; a batch needs at least one lesion")
    if negatives != "lesions" and num_mined == 0:
        raise ValueError(
            f'`negative` has no rows, but negatives="{negatives}" contrasts with them: '
            'mine at least one negative per batch, or set negatives="lesions"'
        )
    if negatives == "lesions" and num_all_lesions < 2:
        raise ValueError(
            'negatives="lesions" needs at least 2 lesions in all, got 1: '
            "use a larger batch, and drop the last one if it is incomplete"
        )


def check_negatives(negatives: str) -> None:
    """Raise ValueError unless `negatives` names a choice."""
    if negatives not in get_args(Negatives):
        raise ValueError(f"negatives must be one of {', '.join(get_args(Negatives))}; got {negatives!r}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that cosines cannot be divided by."""
    advice = "give a finite temperature that is not zero; for cosines 0.05 to 0.5 is usual"
    if not math.isfinite(temperature):
        raise ValueError(f"Illegal temperature: {temperature}; {advice}")
    if abs(temperature) < 1e-8:
        raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8; {advice}")


def check_sizes_across_ranks(positive: Float[Tensor, "2 n dim"], mined: Float[Tensor, "2 m dim"]) -> None:
    """Raise ValueError, on every rank, when batches differ in size: a gather would hang or mix up rows."""
    own = torch.tensor([positive.shape[1], mined.shape[1], positive.shape[2]], device=positive.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    rows = torch.stack(sizes).tolist()
    if any(row != rows[0] for row in rows):
        table = "; ".join(f"rank {rank}: {n} lesions, {m} mined, dim {d}" for rank, (n, m, d) in enumerate(rows))
        raise ValueError(
            f"every rank must hold a batch of the same size, got {table}. "
            "Give all ranks the same batch size, and drop the last, incomplete batch"
        )


def all_gather_rows(views: Float[Tensor, "2 n dim"]) -> Float[Tensor, "2 all dim"]:
    """Both views of all ranks, rank after rank; the gradient is summed over what all ranks did with them."""
    gathered: Tensor = _AllGatherRows.apply(views)
    return gathered


class _AllGatherRows(torch.autograd.Function):
    # Why not torch.distributed.nn.functional.all_gather: torch has deprecated it, and the successor it names
    # is missing from the oldest torch that we support.
    @staticmethod
    def forward(ctx: Any, views: Tensor) -> Tensor:
        parts = [torch.empty_like(views) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
