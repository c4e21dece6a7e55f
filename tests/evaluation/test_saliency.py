"""Occlusion against a loop that hides cube after cube, and the readout against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fmcib_ssl.evaluation.report_features import linear_readout, occlusion
from fmcib_ssl.types import Preprocessing

pytest.importorskip("captum")

SIZE = (6, 8, 8)
PRE = Preprocessing(SIZE)


class Readout(nn.Module):
    """Not linear, and looks at one corner only."""

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return views[:, 0, :3, :4, :4].square().sum((1, 2, 3)) * 100


def patch() -> torch.Tensor:
    return torch.randint(-900, 300, (1, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.int16)


def test_it_is_the_mean_fall_over_the_cubes_that_cover_a_voxel() -> None:
    edge, step = 4, 2
    hu = patch()
    view = PRE.normalize(hu)[None]
    hidden_by = torch.from_numpy(gaussian_filter(view[0, 0].numpy(), edge / 2, mode="nearest"))
    total, times = np.zeros(SIZE), np.zeros(SIZE)
    readout = Readout()
    starts = [range(0, n - edge + step, step) for n in SIZE]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                cube = (slice(z, z + edge), slice(y, y + edge), slice(x, x + edge))
                hidden = view.clone()
                hidden[0, 0][cube] = hidden_by[cube]
                total[cube] += float(readout(view) - readout(hidden))
                times[cube] += 1
    np.testing.assert_allclose(occlusion(readout, hu, PRE, edge=edge), total / times, rtol=1e-4, atol=1e-4)


def test_what_the_answer_does_not_rest_on_has_no_saliency() -> None:
    falls = occlusion(Readout(), patch(), PRE, edge=2)  # cubes reach one voxel further
    assert np.abs(falls[4:]).max() < 1e-4 < np.abs(falls[:3, :4, :4]).max()


def test_the_readout_is_scikit_learns_probe_behind_the_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6 * 8 * 8, 5), nn.ReLU(), nn.Dropout(0.5))
    views = torch.randn(60, 1, *SIZE)
    with torch.no_grad():
        features = encoder.eval()(views).numpy()
    labels = (features[:, 0] > np.median(features[:, 0])).astype(int)
    readout = linear_readout(encoder.train(), features, labels, c=0.1)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000)).fit(features, labels)
    with torch.no_grad():
        np.testing.assert_allclose(readout(views).numpy(), oracle.decision_function(features), rtol=1e-3, atol=1e-4)
