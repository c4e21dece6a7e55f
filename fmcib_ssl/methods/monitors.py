"""What a contrastive method logs of its own embeddings."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from fmcib_ssl.representation import contrast_figures, unit_vectors
from fmcib_ssl.types import ViewPairs


def contrast_monitors(out: ViewPairs) -> dict[str, Tensor]:
    """Figures for the log from the embeddings of one device's batch; see `fmcib_ssl.representation`.

    Args:
        out: embeddings, each tensor `(batch, dim)`, of any norm.

    Returns:
        `positive_cosine`, `alignment` and, if there are negatives, `negative_cosine`; with two lesions or more also
        `lesion_cosine` (between different lesions) and `uniformity`.
    """
    positive, negative = unit_vectors(out["positive"]), unit_vectors(out["negative"])
    return contrast_figures(cast(tuple[Tensor, Tensor], positive), cast(tuple[Tensor, Tensor], negative))
