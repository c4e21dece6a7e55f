"""The projection head against Lightly's."""

from __future__ import annotations

import pytest
import torch
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import nn

from fmcib_ssl.models import ProjectionHead


@pytest.mark.parametrize("num_layers", [2, 3, 4])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_head_is_simclrs(num_layers: int, batch_norm: bool) -> None:
    theirs = SimCLRProjectionHead(24, 12, 8, num_layers=num_layers, batch_norm=batch_norm)
    ours = ProjectionHead(24, 12, 8, num_layers=num_layers, batch_norm=batch_norm)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = torch.randn(16, 24)
    torch.testing.assert_close(ours(features), theirs(features))
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))


def test_hidden_layers_are_as_wide_as_the_features_unless_told() -> None:
    linear = [layer for layer in ProjectionHead(24, num_layers=3).layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(24, 24), (24, 24), (24, 128)]


def test_one_layer_is_linear() -> None:
    head = ProjectionHead(6, out_dim=4, num_layers=1, batch_norm=False)
    features = torch.randn(3, 6)
    torch.testing.assert_close(head(features), features @ head.layers[0].weight.T + head.layers[0].bias)  # type: ignore[operator, union-attr]


def test_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        ProjectionHead(6, num_layers=0)
