"""The losses as sums over anchors and negatives, one exponential at a time, in float64: the oracle of these tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmcib_ssl.losses import InfoNCELoss, Negatives, NTXentNegativeMinedLoss
from fmcib_ssl.types import ViewPairs

NEGATIVES: tuple[Negatives, ...] = ("mined", "mined_and_lesions", "lesions", "mined_of_others")
LOSSES = ("ntxent_mined", "infonce")
KERNELS = ("plain", "streamed")


def make_loss(name: str, temperature: float, negatives: Negatives, **options: Any) -> torch.nn.Module:
    if name == "ntxent_mined":
        return NTXentNegativeMinedLoss(temperature, negatives=negatives, **options)
    return InfoNCELoss.from_temperature(temperature, margin=0.03, negatives=negatives, **options)


def margin_of(loss: torch.nn.Module) -> float:
    return getattr(loss, "margin", 0.0)


def random_views(seed: int, num_lesions: int, num_mined: int, dim: int = 8, **options: Any) -> ViewPairs:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "requires_grad": True, **options}

    def pair(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, dim, **options), torch.randn(rows, dim, **options)

    return {"positive": pair(num_lesions), "negative": pair(num_mined)}


def leaves(out: ViewPairs) -> list[Tensor]:
    return [*out["positive"], *out["negative"]]


def with_leaves(tensors: list[Tensor]) -> ViewPairs:
    return {"positive": (tensors[0], tensors[1]), "negative": (tensors[2], tensors[3])}


def as_double(out: ViewPairs) -> ViewPairs:
    return with_leaves([x.detach().double().requires_grad_() for x in leaves(out)])


def gradients(loss: Tensor, out: ViewPairs) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves(out), allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves(out), found, strict=True)]


def naive_cosine(a: Tensor, b: Tensor) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return x / x.square().sum().sqrt() if bool(x.any()) else x / 1e-12

    return (unit(a) * unit(b)).sum()


def naive_contrast(
    out: ViewPairs, temperature: float, negatives: Negatives, margin: float = 0.0, same_patient: str = "keep"
) -> Tensor:
    views, mined = out["positive"], out["negative"]
    patients = out["patient"].tolist() if same_patient != "keep" else list(range(len(views[0])))
    losses = []
    for view in (0, 1):
        for i, anchor in enumerate(views[view]):
            opponents = []
            if negatives in ("mined", "mined_and_lesions"):
                opponents += list(mined[view])
            if negatives in ("lesions", "mined_and_lesions"):
                opponents += [views[v][j] for v in (0, 1) for j in range(len(patients)) if patients[j] != patients[i]]
            if negatives == "mined_of_others":
                per_lesion = len(mined[0]) // len(patients)
                opponents += [mined[v][j] for v in (0, 1) for j in range(len(mined[v])) if j // per_lesion != i]
            partners = [views[1 - view][i]]
            if same_patient == "attract":
                siblings = [j for j in range(len(patients)) if j != i and patients[j] == patients[i]]
                partners += [views[v][j] for v in (0, 1) for j in siblings]
            rest = sum(torch.exp(naive_cosine(anchor, x) / temperature) for x in opponents)
            pairs = torch.stack([torch.exp((naive_cosine(anchor, x) - margin) / temperature) for x in partners])
            losses.append(-torch.log(pairs / (pairs + rest)).mean())
    return torch.stack(losses).mean()


def two_collapsed_classes(num_lesions: int, num_mined: int) -> tuple[ViewPairs, float]:
    """All lesions in one place, all mined patches opposite; and its "mined" loss at temperature 1, by hand."""
    lesion = torch.zeros(num_lesions, 4).index_fill(1, torch.tensor([0]), 1.0)
    patch = torch.zeros(num_mined, 4).index_fill(1, torch.tensor([0]), -1.0)
    return with_leaves([lesion, lesion, patch, patch]), math.log1p(num_mined * math.exp(-2.0))
