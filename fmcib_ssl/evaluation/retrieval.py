"""Which lesions the features take for alike: each with its nearest neighbours of other patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fmcib_ssl.evaluation.figures import INK, LUNG_WINDOW_HU, MUTED, save_figure
from fmcib_ssl.evaluation.probes import Neighbors
from fmcib_ssl.types import Array


def agreement(neighbors: Neighbors, queries: Sequence[int], labels: Array, patients: Array) -> tuple[float, float]:
    """How often a neighbour has the query's label, and how often a lesion drawn from the other patients would.

    Args:
        neighbors: of the queries.
        queries: rows of `labels`.
        labels: one for each lesion.
        patients: of every lesion.

    Returns:
        Both shares; NaN where all lesions are of one patient.
    """
    there = neighbors.rows >= 0
    if not there.any():
        return np.nan, np.nan
    own = labels[np.asarray(queries)]
    hits = (labels[neighbors.rows] == own[:, None])[there].mean()
    chances = [(labels[patients != patients[query]] == labels[query]).mean() for query in queries]
    return float(hits), float(np.mean(chances))


def spread_queries(labels: Array | None, num_lesions: int, num_queries: int) -> list[int]:
    """Lesions to ask for: as many of each label as can be, spread evenly over the table.

    Args:
        labels: one for each lesion, or None.
        num_lesions: rows of the table.
        num_queries: rows to choose.
    """
    groups = (
        [np.arange(num_lesions)] if labels is None else [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
    )
    num_queries = min(num_queries, num_lesions)
    chosen: list[int] = []
    share = max(1, num_queries // len(groups))
    for group in groups:
        chosen += group[np.linspace(0, len(group) - 1, min(share, len(group))).round().astype(int)].tolist()
    return chosen[:num_queries]


def retrieval_sheet(
    queries: Sequence[int],
    neighbors: Neighbors,
    read_patch: Callable[[int], Tensor],
    caption: Callable[[int], str],
    path: Path | str,
    *,
    window_hu: tuple[float, float] = LUNG_WINDOW_HU,
) -> Path:
    """Draw each query and its neighbours, the axial plane through the middle of each patch.

    Args:
        queries: rows of the features.
        neighbors: of the queries.
        read_patch: gives a row's patch, HU, `(1, z, y, x)`.
        caption: a short text under a row's patch.
        path: of the PNG.
        window_hu: darkest and brightest value shown.
    """
    across = neighbors.rows.shape[1]
    height = 0.65 + 1.95 * len(queries)
    figure = Figure(figsize=(1.72 * (across + 1) + 0.3, height), facecolor="white")
    grid = figure.add_gridspec(
        len(queries), across + 2, width_ratios=(1, 0.08, *[1] * across), left=0.01, right=0.99,
        top=1 - 0.3 / height, bottom=0.6 / height, wspace=0.06, hspace=0.27,
    )  # fmt: skip
    for line, query in enumerate(queries):
        shown = [(0, query, None)] + [
            (place + 2, int(row), float(neighbors.cosines[line, place]))
            for place, row in enumerate(neighbors.rows[line])
            if row >= 0
        ]
        for place, row, cosine in shown:
            axes = figure.add_subplot(grid[line, place])
            volume = read_patch(row)[0].float().numpy()
            axes.imshow(volume[volume.shape[0] // 2], cmap="gray", vmin=window_hu[0], vmax=window_hu[1])
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="#d9622b" if cosine is None else "#cbd2d9", linewidth=2.4 if cosine is None else 0.8)
            below = caption(row) if cosine is None else f"{caption(row)}\ncosine {cosine:.3f}"
            axes.text(0.5, -0.04, below, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, color=INK)
            if line == 0 and place in (0, 2):
                title = "query" if place == 0 else "nearest lesions of other patients"
                axes.set_title(title, fontsize=9, color=INK, weight="bold", pad=5, loc="left")
    low, high = window_hu
    note = (
        f"Axial plane through the middle of each patch, {low:.0f} to {high:.0f} HU. The patient's right is on the left."
    )
    figure.text(0.01, 0.08 / height, note, fontsize=7, color=MUTED)
    return save_figure(figure, path, dpi=130)
