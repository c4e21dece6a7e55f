"""The definition under both losses: it checks, gathers, normalizes, and takes the cross entropy of every anchor.

All work that grows with anchors times negatives is in `logsumexp` and `streamed`.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.losses.across_ranks import all_gather_rows, check_sizes_across_ranks, num_ranks
from fmcib_ssl.losses.logsumexp import Kernel, choose_kernel, logsumexp_similarity, streamed_logsumexp
from fmcib_ssl.losses.streamed import cross_entropy_sum
from fmcib_ssl.types import ViewPairs

#: What an anchor is pushed away from: the mined patches, the other lesions, or both.
Negatives = Literal["mined", "mined_and_lesions", "lesions"]
#: Whether a loss meets the negatives of other ranks: no, those of all at once, or those of one rank after the other.
Gather = bool | Literal["ring"]


def contrast(
    out: ViewPairs,
    *,
    temperature: float | Tensor,
    margin: float = 0.0,
    negatives: Negatives = "mined",
    lesions: tuple[Tensor, Tensor] | None = None,
    first_lesion: int = 0,
    gather_distributed: Gather = False,
    kernel: Kernel = "auto",
) -> Float[Tensor, ""]:
    """Cross entropy of the 2N anchors, each against its other view, summed.

    Computed in float32 (float64 if an input is), whatever autocast says.

    Args:
        out: embeddings `(batch, dim)`, not normalized; `negative` may hold another number of rows.
        temperature: divides the cosines. A tensor receives a gradient.
        margin: subtracted from the cosine of the positive pair.
        negatives: what counts as a negative.
        lesions: both views of the lesions of all ranks, `(all_lesions, dim)`; by default `out["positive"]`.
            Not looked at when `negatives` is "mined".
        first_lesion: the row of `lesions` that holds this rank's first lesion.
        gather_distributed: contrast with the negatives of all ranks, with gradients: True gathers them here, "ring"
            takes one rank's at a time.
        kernel: how the sums over negatives are computed.

    Raises:
        AssertionError: a key is missing.
        TypeError: an embedding is not a tensor of real floats.
        ValueError: pairs, shapes, devices, or sizes across ranks do not fit, an anchor has no negative, or the kernel
            cannot compute this.
    """
    use_mined, use_lesions = negatives != "lesions", negatives != "mined"
    positive, mined, others = stack_views(out, lesions if use_lesions else None)
    num_lesions = positive.shape[1]
    world_size = num_ranks() if gather_distributed else 1
    ring = gather_distributed == "ring" and world_size > 1

    if world_size > 1:
        if use_lesions and lesions is not None:
            raise ValueError("`lesions` were given and gather_distributed is on: gather here or outside, not both")
        check_sizes_across_ranks(positive, mined)  # before anything that may fail on one rank only
        if use_mined and not ring:
            mined = all_gather_rows(mined)
        if use_lesions and not ring:
            others = all_gather_rows(positive)
            first_lesion = dist.get_rank() * num_lesions
    check_rows(num_lesions, mined.shape[1], others.shape[1] * (world_size if ring else 1), negatives)
    if use_lesions and not 0 <= first_lesion <= others.shape[1] - num_lesions:
        raise ValueError(
            f"first_lesion is {first_lesion}, which puts this rank's {num_lesions} lesions outside the "
            f"{others.shape[1]} rows of `lesions`; give the lesions of all ranks and where this rank's begin"
        )

    # Groups of negatives: for each view of the anchors, vectors and the row of the first anchor itself, if among them.
    mined_groups = [[(mined[view], None)] if use_mined else [] for view in (0, 1)]
    lesion_groups = [(keys, first_lesion) for keys in others] if use_lesions else []
    chosen = choose_kernel(kernel, positive, sum(len(keys) for keys, _ in mined_groups[0] + lesion_groups))
    with torch.autocast(positive.device.type, enabled=False):
        unit = F.normalize(positive, dim=2)
        anchors = unit / temperature
        positive_logits = ((unit[0] * unit[1]).sum(dim=1) - margin) / temperature
        if chosen == "streamed" and not ring:
            loss = positive_logits.new_zeros(())
            for view in (0, 1):
                groups = mined_groups[view] + lesion_groups
                first_rows = accumulate((len(keys) for keys, _ in groups), initial=0)
                own_keys = [row + own for row, (_, own) in zip(first_rows, groups, strict=False) if own is not None]
                keys = F.normalize(torch.cat([keys for keys, _ in groups]))
                loss = loss + cross_entropy_sum(anchors[view], positive_logits, keys, own_keys)
            return loss

        if chosen == "plain" and not ring:

            def logsumexp(views: slice, keys: Tensor, own_key: int | None) -> Float[Tensor, "views n"]:
                keys = F.normalize(keys)
                return torch.stack([logsumexp_similarity(queries, keys, own_key) for queries in anchors[views]])
        else:
            scale = _inverse_length(positive) / temperature
            all_embeddings = [*out["positive"], *out["negative"], *(lesions or ())]
            is_bfloat16 = all(embeddings.dtype == torch.bfloat16 for embeddings in all_embeddings)

            def logsumexp(views: slice, keys: Tensor, own_key: int | None) -> Float[Tensor, "views n"]:
                return streamed_logsumexp(
                    positive[views],
                    scale[views],
                    keys,
                    _inverse_length(keys),
                    own_key,
                    kernel="triton" if chosen == "triton" else "streamed",
                    storage=torch.bfloat16 if is_bfloat16 else None,
                    ring=ring,
                )

        both = slice(0, 2)
        terms = [logsumexp(both, keys, own_key) for keys, own_key in lesion_groups]
        if use_mined:
            terms.append(torch.cat([logsumexp(slice(view, view + 1), mined[view], None) for view in (0, 1)]))
        negative_logits = torch.stack(terms).logsumexp(dim=0)
        # -log(e^p / (e^p + e^n)), without cancellation where the pair is well separated already.
        cross_entropy: Tensor = -F.logsigmoid(positive_logits - negative_logits)
        return cross_entropy.sum()


def _inverse_length(vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows"]:
    # The bound is that of torch.nn.functional.normalize.
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length.clamp_min(1e-12).reciprocal()


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


def check_gather(gather_distributed: Gather) -> None:
    """Raise ValueError unless `gather_distributed` is True, False or "ring"."""
    if not isinstance(gather_distributed, bool) and gather_distributed != "ring":
        raise ValueError(f'gather_distributed must be True, False or "ring"; got {gather_distributed!r}')


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that cosines cannot be divided by."""
    advice = "give a finite temperature that is not zero; for cosines 0.05 to 0.5 is usual"
    if not math.isfinite(temperature):
        raise ValueError(f"Illegal temperature: {temperature}; {advice}")
    if abs(temperature) < 1e-8:
        raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8; {advice}")
