"""Projection heads: they carry the contrast during training and are thrown away after it."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """SimCLR's projection head: linear layers with ReLU between them, each followed by batch norm.

    The published CT foundation model has `ProjectionHead(4096, 2048, batch_norm=False)`.

    Args:
        in_dim: the encoder's features.
        hidden_dim: units of the layers between; None means `in_dim`.
        out_dim: of the embedding.
        num_layers: linear layers; 2 in SimCLR, 3 in SimCLR v2.
        batch_norm: after every linear layer, the last too, which then have no bias.

    Raises:
        ValueError: `num_layers` is below 1.

    Source: Chen et al. 2020, A simple framework for contrastive learning of visual representations, and its code.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int | None = None,
        out_dim: int = 128,
        *,
        num_layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; a projection head has at least 1 linear layer.")
        dims = [in_dim, *[hidden_dim or in_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(dims):
            layers += [nn.ReLU()] if layers else []
            layers += [nn.Linear(before, after, bias=not batch_norm)]
            layers += [nn.BatchNorm1d(after)] if batch_norm else []
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch out_dim"]:
        """Project features to embeddings, not normalised."""
        return cast(Tensor, self.layers(features))
