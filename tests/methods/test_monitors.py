"""Monitors against the pairwise definitions, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fmcib_ssl.methods import monitors


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    return F.normalize(a, dim=1), F.normalize(b, dim=1)


def test_mean_cosine_is_the_mean_over_all_pairs(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = points
    pairs = [float(x @ y) for x in a for y in b[:4]]
    assert float(monitors.mean_cosine(a, b[:4])) == pytest.approx(sum(pairs) / len(pairs))


def test_mean_cosine_within_leaves_out_the_diagonal(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, _ = points
    pairs = [float(x @ y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    assert float(monitors.mean_cosine_within(a)) == pytest.approx(sum(pairs) / len(pairs))


def test_alignment_and_uniformity_are_wang_and_isolas(points: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = points
    distances = [float((x - y).norm()) ** 2 for x, y in zip(a, b, strict=True)]
    assert float(monitors.alignment(a, b)) == pytest.approx(sum(distances) / len(distances))
    potentials = [math.exp(-2 * float((a[i] - a[j]).norm()) ** 2) for i in range(7) for j in range(i)]
    assert float(monitors.uniformity(a)) == pytest.approx(math.log(sum(potentials) / len(potentials)))


def test_collapse_shows() -> None:
    same = torch.ones(4, 3)
    figures = monitors.contrast_monitors({"positive": (same, same), "negative": (-same, -same)})
    expected = {
        "positive_cosine": 1.0,
        "negative_cosine": -1.0,
        "lesion_cosine": 1.0,
        "alignment": 0.0,
        "uniformity": 0.0,
    }
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(expected, abs=1e-6)


def test_one_lesion_has_no_pairs_to_watch() -> None:
    one = torch.randn(1, 3)
    figures = monitors.contrast_monitors({"positive": (one, one), "negative": (one, one)})
    assert set(figures) == {"positive_cosine", "negative_cosine", "alignment"}
