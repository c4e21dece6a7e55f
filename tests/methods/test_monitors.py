"""What the module logs, from embeddings of any norm; the figures themselves are tested in test_representation."""

from __future__ import annotations

import pytest
import torch

from fmcib_ssl.methods.monitors import contrast_monitors


def test_norm_and_precision_of_embeddings_do_not_matter() -> None:
    views = [torch.randn(4, 5, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    plain = contrast_monitors({"positive": (views[0], views[1]), "negative": (views[2], views[3])})
    pos0, pos1, neg0, neg1 = (view.double() * 7 for view in views)
    scaled = contrast_monitors({"positive": (pos0, pos1), "negative": (neg0, neg1)})
    assert plain.keys() == {"positive_cosine", "alignment", "negative_cosine", "lesion_cosine", "uniformity"}
    cosine = torch.nn.functional.cosine_similarity(views[0], views[1]).mean()
    assert float(plain["positive_cosine"]) == pytest.approx(float(cosine), abs=1e-6)
    for name, value in plain.items():
        assert float(scaled[name]) == pytest.approx(float(value), abs=1e-5)
