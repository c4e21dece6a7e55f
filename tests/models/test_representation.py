"""Figures of embeddings against the papers' formulas, written as loops, and against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmcib_ssl.losses import InfoNCELoss
from fmcib_ssl.models import representation


def unit(seed: int, *shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = unit(3, 2, 7, 5)
    return a, b


def test_mean_cosine_within_leaves_out_the_diagonal(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, _ = points
    pairs = [float(x @ y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    assert float(representation.mean_cosine_within(a)) == pytest.approx(sum(pairs) / len(pairs))


def test_alignment_and_uniformity_are_wang_and_isolas(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = points
    distances = [float((x - y).norm()) ** 2 for x, y in zip(a, b, strict=True)]
    assert float(representation.alignment(a, b)) == pytest.approx(sum(distances) / len(distances))
    potentials = [math.exp(-2 * float((a[i] - a[j]).norm()) ** 2) for i in range(7) for j in range(i)]
    assert float(representation.uniformity(a)) == pytest.approx(math.log(sum(potentials) / len(potentials)))


def test_the_effective_rank_is_rankme() -> None:
    """Equations 1 and 2 of Garrido et al., from eigenvalues of the Gram matrix in numpy."""
    embeddings = np.random.default_rng(0).normal(size=(40, 6)) * [9, 4, 2, 1, 0.5, 0.1]
    sigma = [math.sqrt(max(value, 0)) for value in np.linalg.eigvalsh(embeddings.T @ embeddings)]
    p = [s / sum(sigma) + 1e-7 for s in sigma]
    rankme = math.exp(-sum(share * math.log(share) for share in p))
    assert float(representation.effective_rank(torch.from_numpy(embeddings))) == pytest.approx(rankme)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_effective_rank_counts_directions(rank: int) -> None:
    basis = torch.eye(8)[:rank]
    assert float(representation.effective_rank(basis.repeat(10, 1))) == pytest.approx(rank, rel=1e-4)
    assert math.isfinite(float(representation.effective_rank(torch.zeros(10, 8))))


def test_class_spread_is_the_mean_squared_distance_to_the_means() -> None:
    points, classes = unit(1, 30, 4), torch.arange(30) % 3
    spread, of_all = representation.class_spread(points, classes, 3)
    for c in range(3):
        own = points[classes == c]
        assert float(spread[c]) == pytest.approx(float(((own - own.mean(0)) ** 2).sum(1).mean()))
    assert float(of_all) == pytest.approx(float(((points - points.mean(0)) ** 2).sum(1).mean()))


@pytest.mark.parametrize("negatives", ["mined", "mined_and_lesions", "lesions", "mined_of_others"])
def test_the_shares_are_the_gradient_that_the_loss_has_left(negatives: str) -> None:
    """Of the loss itself, by autograd: minus its derivative by the margin, times the temperature, is their sum."""
    positive, mined = unit(5, 2, 6, 4), unit(6, 2, 12, 4)
    margin = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = InfoNCELoss.from_temperature(0.3, 0.0, negatives=negatives)  # type: ignore[arg-type]
    loss.margin = margin  # type: ignore[assignment]
    out = {"positive": (positive[0], positive[1]), "negative": (mined[0], mined[1])}
    (gradient,) = torch.autograd.grad(loss(out), margin)  # type: ignore[arg-type]
    shares = representation.negative_shares(
        (positive[0], positive[1]),
        (mined[0], mined[1]) if negatives != "lesions" else None,
        temperature=0.3,
        margin=0.1,
        lesions="lesions" in negatives,
        of_others=negatives == "mined_of_others",
    )
    expected = [f"{kind}_share" for kind in ("mined", "lesion") if kind in negatives]
    assert list(shares) == expected
    assert float(sum(shares.values())) == pytest.approx(0.3 * float(gradient))


def test_several_devices_alike_share_what_one_large_batch_has() -> None:
    anchors, mined = unit(5, 2, 6, 4), unit(6, 2, 9, 4)
    one = representation.negative_shares((anchors[0], anchors[1]), (mined[0], mined[1]), temperature=0.2, world_size=3)
    threefold = mined.repeat(1, 3, 1)
    all_of_them = representation.negative_shares(
        (anchors[0], anchors[1]), (threefold[0], threefold[1]), temperature=0.2
    )
    assert float(one["mined_share"]) == pytest.approx(float(all_of_them["mined_share"]))


def test_of_a_large_batch_a_part_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    positive, mined = unit(5, 2, 400, 16), unit(6, 2, 400, 16)

    def shares() -> list[float]:
        found = representation.negative_shares(
            (positive[0], positive[1]), (mined[0], mined[1]), temperature=0.5, lesions=True
        )
        return [float(value) for value in found.values()]

    exact = shares()
    monkeypatch.setattr(representation, "_MAX_ROWS", 100)
    assert shares() == pytest.approx(exact, rel=0.05)
    assert shares() != exact


def test_figures_of_a_batch() -> None:
    views, mined = unit(3, 2, 7, 5), unit(4, 2, 4, 5)
    figures = representation.contrast_figures((views[0], views[1]), (mined[0], mined[1]))
    pairs = [float(x @ y) for view in (0, 1) for x in views[view] for y in mined[view]]
    assert float(figures["negative_cosine"]) == pytest.approx(sum(pairs) / len(pairs))
    same = torch.ones(4, 3)
    collapsed = representation.contrast_figures(*[representation.unit_vectors((x, x)) for x in (same, -same)])  # type: ignore[arg-type]
    expected = {"positive_cosine": 1.0, "negative_cosine": -1.0, "lesion_cosine": 1.0, "alignment": 0.0}
    assert {name: float(value) for name, value in collapsed.items()} == pytest.approx(
        {**expected, "uniformity": 0.0}, abs=1e-6
    )
    one = (torch.randn(1, 3), torch.randn(1, 3))  # has no pairs
    assert set(representation.contrast_figures(one, one)) == {"positive_cosine", "negative_cosine", "alignment"}
    assert set(representation.contrast_figures(one)) == {"positive_cosine", "alignment"}
