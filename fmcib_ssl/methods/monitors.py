"""What is worth watching while a contrastive loss falls: pure functions of embeddings.

A falling loss alone says little: it also falls when the encoder learns nothing but "lesion or not", and then
`lesion_cosine` climbs towards 1. All functions take unit vectors and cost time linear in the batch, except the
uniformity, whose pairs are those of one device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fmcib_ssl.types import ViewPairs


def mean_cosine(anchors: Float[Tensor, "n dim"], others: Float[Tensor, "m dim"]) -> Tensor:
    """Mean cosine over all `n * m` pairs; the mean of dot products is the dot product of the means."""
    return anchors.mean(0) @ others.mean(0)


def mean_cosine_within(points: Float[Tensor, "n dim"]) -> Tensor:
    """Mean cosine over all pairs of different rows; needs at least two."""
    n = points.shape[0]
    return (points.sum(0).square().sum() - points.square().sum()) / (n * (n - 1))


def alignment(view0: Float[Tensor, "n dim"], view1: Float[Tensor, "n dim"]) -> Tensor:
    """Mean squared distance of the two views of a lesion; 0 is perfect.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity
    on the Hypersphere", ICML 2020, with exponent 2.
    """
    return (view0 - view1).square().sum(1).mean()


def uniformity(points: Float[Tensor, "n dim"]) -> Tensor:
    """Log of the mean Gaussian potential over pairs of lesions; lower is more spread out, 0 is collapsed.

    Source: Wang and Isola (as above), with t = 2. Needs at least two rows.
    """
    return F.pdist(points).square().mul(-2).exp().mean().log()


@torch.no_grad()
def contrast_monitors(out: ViewPairs) -> dict[str, Tensor]:
    """Figures for the log from the embeddings of one device's batch.

    Args:
        out: embeddings, each tensor `(batch, dim)`, of any norm.

    Returns:
        `positive_cosine`, `alignment` and, if there are negatives, `negative_cosine`; with two lesions or more also
        `lesion_cosine` (between different lesions) and `uniformity`.
    """
    pos0, pos1 = (F.normalize(view.detach().float(), dim=1) for view in out["positive"])
    neg0, neg1 = (F.normalize(view.detach().float(), dim=1) for view in out["negative"])
    figures = {"positive_cosine": (pos0 * pos1).sum(1).mean(), "alignment": alignment(pos0, pos1)}
    if neg0.shape[0] > 0:
        figures["negative_cosine"] = (mean_cosine(pos0, neg0) + mean_cosine(pos1, neg1)) / 2
    if pos0.shape[0] > 1:
        figures["lesion_cosine"] = (mean_cosine_within(pos0) + mean_cosine_within(pos1)) / 2
        figures["uniformity"] = (uniformity(pos0) + uniformity(pos1)) / 2
    return figures
