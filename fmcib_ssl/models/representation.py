"""What embeddings say by themselves: pure functions, tensors in, scalars out, cheap beside a training step.

A falling loss alone says little: it also falls when the encoder learns nothing but "lesion or not", and then the
cosine between lesions climbs towards 1. `docs/while_training.md` explains every figure.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

#: Anchors that `negative_shares` looks at, and negatives of each kind that it holds them against, at most.
_MAX_ROWS = 512


def mean_cosine_within(points: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Mean cosine over all pairs of different rows, unit vectors; needs at least two."""
    n = points.shape[0]
    return (points.sum(0).square().sum() - points.square().sum()) / (n * (n - 1))


def alignment(view0: Float[Tensor, "n dim"], view1: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Mean squared distance of the two views of a lesion, unit vectors; 0 is perfect.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity
    on the Hypersphere", ICML 2020, with exponent 2.
    """
    return (view0 - view1).square().sum(1).mean()


def uniformity(points: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Log of the mean Gaussian potential over pairs of unit vectors; lower is more spread out, 0 is collapsed.

    Source: Wang and Isola (as above), with t = 2. Needs at least two rows.
    """
    return F.pdist(points).square().mul(-2).exp().mean().log()


def effective_rank(points: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """RankMe: over how many directions embeddings are spread, between 1 and `min(n, dim)`.

    The exponential of the entropy of the singular values' shares. It is bounded by the number of rows, so only figures
    from as many rows compare.

    Source: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations
    by Their Rank", ICML 2023, eq. 1 and 2.
    """
    singular_values = torch.linalg.svdvals(points)
    shares = singular_values / singular_values.sum().clamp_min(torch.finfo(points.dtype).tiny) + 1e-7
    return torch.exp(-(shares * shares.log()).sum())


def class_spread(points: Float[Tensor, "n dim"], classes: Int[Tensor, " n"], num_classes: int) -> tuple[Tensor, Tensor]:
    """How far unit vectors lie from the middle of their class, and from the middle of all.

    Args:
        points: unit vectors.
        classes: 0 to `num_classes - 1`, each present.
        num_classes: number of classes.

    Returns:
        The mean squared distance to the class's mean, `(num_classes,)`, and to the mean of all, a scalar. A class
        whose spread is that of all is not set apart; spreads near 0 throughout are a collapse.
    """
    members = F.one_hot(classes, num_classes).to(points.dtype)
    means = (members.T @ points) / members.sum(0)[:, None]
    # of unit vectors the mean squared distance to their mean is 1 - |mean|^2
    return (1 - means.square().sum(1)).clamp_min(0), (1 - points.mean(0).square().sum()).clamp_min(0)


def negative_shares(
    positive: tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]],
    mined: tuple[Float[Tensor, "m dim"], Float[Tensor, "m dim"]] | None,
    *,
    temperature: float | Tensor,
    margin: float = 0.0,
    lesions: bool = False,
    of_others: bool = False,
    world_size: int = 1,
) -> dict[str, Float[Tensor, ""]]:
    """The share of each anchor's softmax that lies on its negatives, averaged: what a contrastive loss has to teach.

    With loss `l` of an anchor it is `1 - exp(-l)`, and it is the length of the loss's gradient in the logits: where it
    is 0, negatives no longer move the encoder.

    Args:
        positive: unit vectors, both views of the lesions.
        mined: unit vectors, both views of the mined negatives; None where the loss takes none. An anchor meets those
            of its own view; those of other lesions than its own, in both views, with `of_others`.
        temperature: divides the cosines.
        margin: subtracted from the cosine of the positive pair.
        lesions: whether both views of the other lesions are negatives too.
        of_others: whether the mined negatives are those of the other lesions. As many rows for each, lesion by lesion.
        world_size: devices that share their negatives. Others' are taken to be like one's own.

    Returns:
        `mined_share` and `lesion_share`, those there are. Of large batches 512 rows are looked at, and count for all.
    """
    num_all, num_mined = len(positive[0]), 0 if mined is None else len(mined[0])
    view0, view1 = (view[:_MAX_ROWS] for view in positive)

    def log_sum_of_others(anchors: Tensor, views: tuple[Tensor, ...]) -> Tensor:
        """Over both views, `(lesions * K, dim)` each, of what is not the anchor's own."""
        numbers = torch.arange(len(views[0]), device=view0.device)
        own = numbers[: len(anchors), None] == (numbers // (len(views[0]) // len(anchors))).repeat(2)
        similarity = (anchors @ torch.cat(views).T / temperature).masked_fill(own, -torch.inf)
        return similarity.logsumexp(1) + math.log((world_size * num_all - 1) / (len(anchors) - 1))

    names = [*(["mined_share"] if num_mined else []), *(["lesion_share"] if lesions and num_all > 1 else [])]
    shares = []
    for number, (anchors, partners) in enumerate(((view0, view1), (view1, view0))):
        logits = [((anchors * partners).sum(1) - margin) / temperature]
        if mined is not None and num_mined and of_others:
            logits.append(log_sum_of_others(anchors, tuple(m[: num_mined // num_all * len(view0)] for m in mined)))
        elif mined is not None and num_mined:
            negatives = mined[number][:_MAX_ROWS]
            more = math.log(world_size * num_mined / len(negatives))
            logits.append((anchors @ negatives.T / temperature).logsumexp(1) + more)
        if "lesion_share" in names:
            logits.append(log_sum_of_others(anchors, (view0, view1)))
        shares.append(torch.stack(logits).softmax(0)[1:].mean(1))
    return dict(zip(names, (shares[0] + shares[1]) / 2, strict=True))


@torch.no_grad()
def contrast_figures(
    positive: tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]],
    mined: tuple[Float[Tensor, "m dim"], Float[Tensor, "m dim"]] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Figures for the log from unit vectors of one device's batch.

    Returns:
        `positive_cosine`, `alignment` and, if there are negatives, `negative_cosine`; with two lesions or more also
        `lesion_cosine` (between different lesions) and `uniformity`.
    """
    pos0, pos1 = positive
    figures = {"positive_cosine": (pos0 * pos1).sum(1).mean(), "alignment": alignment(pos0, pos1)}
    if mined is not None and len(mined[0]) > 0:
        # The mean of dot products is the dot product of the means.
        cosines = [views.mean(0) @ negatives.mean(0) for views, negatives in zip(positive, mined, strict=True)]
        figures["negative_cosine"] = (cosines[0] + cosines[1]) / 2
    if len(pos0) > 1:
        figures["lesion_cosine"] = (mean_cosine_within(pos0) + mean_cosine_within(pos1)) / 2
        figures["uniformity"] = (uniformity(pos0) + uniformity(pos1)) / 2
    return figures


def unit_vectors(views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Embeddings `(batch, dim)` of any norm and precision as float32 unit vectors, without gradients."""
    return tuple(F.normalize(view.detach().float(), dim=1) for view in views)
