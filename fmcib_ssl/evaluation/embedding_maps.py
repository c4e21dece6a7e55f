"""Maps of features in two dimensions, by PCA and UMAP, coloured by any column of the lesions' table."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from fmcib_ssl.evaluation.figures import COLORS, INK, MARKERS, MUTED, save_figure, tidy

Array = npt.NDArray[Any]

#: More different numbers than this are a measurement and get a colour bar.
MAX_CLASSES = len(COLORS)
#: Lesions on a map; of more, a random choice is shown.
MAX_POINTS = 4000
#: Fewer lesions than this have no neighbourhoods that UMAP could lay out.
MIN_UMAP = 15
#: Columns that say where a lesion is or what it is called, not what it is.
_NAMES = ("lesion_id", "scan_id", "row", "features")
MISSING = "#d5dae0"
_PLACES = ("center_", "coord", "table_")
_ID = re.compile(r"(^|_)(id|uid|number)$|(ID|UID|uid)$|path$")


def principal_components(features: Array) -> tuple[Array, Array]:
    """Features on the first two principal components of the standardised features.

    Args:
        features: `(n, dim)`; with one row or one column there is no second component, and it is 0.

    Returns:
        Places `(n, 2)`, and each component's share of the variance, `(2,)`.
    """
    scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)
    solver = "full" if min(features.shape) < 1000 else "randomized"
    pca = PCA(min(2, *features.shape), svd_solver=solver, random_state=0).fit(scaled)
    places, shares = np.zeros((len(features), 2)), np.zeros(2)
    places[:, : pca.n_components_], shares[: pca.n_components_] = pca.transform(scaled), pca.explained_variance_ratio_
    return places, np.nan_to_num(shares)


def has_umap() -> bool:
    """Whether umap-learn is installed: `pip install 'fmcib_ssl[report]'`."""
    return importlib.util.find_spec("umap") is not None


def umap_places(features: Array, seed: int = 0) -> Array:
    """Features laid out by UMAP with cosine distance, `(n, 2)`; near points are alike, distances mean little.

    Source: McInnes, Healy, Melville, "UMAP: Uniform Manifold Approximation and Projection", 2018.

    Raises:
        ImportError: umap-learn is not installed.
    """
    make = importlib.import_module("umap").UMAP  # heavy, and an optional extra
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value")  # a seed means one thread: said each time
        neighbors = max(2, min(15, len(features) - 1))
        places: Array = make(n_neighbors=neighbors, metric="cosine", random_state=seed).fit_transform(features)
    return places


def columns_to_color(lesions: pd.DataFrame, limit: int = 4) -> list[str]:
    """Columns that may say something of a lesion: not its name or place, with at least two values, few of them missing.

    Args:
        lesions: a row a lesion.
        limit: columns at most: classes before measurements, each in the order of the table.
    """
    classes: list[str] = []
    measurements: list[str] = []
    for column in map(str, lesions):
        values = lesions[column]
        if is_name(column) or column.startswith(_PLACES) or values.isna().mean() > 0.5:
            continue
        kinds = values.dropna().map(str).nunique()
        if 2 <= kinds <= MAX_CLASSES or (is_measurement(values) and kinds > MAX_CLASSES):
            (measurements if is_measurement(values) else classes).append(column)
    return (classes + measurements)[:limit]


def is_name(column: str) -> bool:
    """Whether a column names lesions, scans, patients or files."""
    return column in _NAMES or _ID.search(column) is not None


def is_measurement(values: pd.Series[Any]) -> bool:
    """Whether a column is drawn with a colour bar: numbers, and more of them than can be told apart as classes."""
    return bool(
        pd.api.types.is_numeric_dtype(values)
        and not pd.api.types.is_bool_dtype(values)
        and values.nunique() > MAX_CLASSES
    )


def map_of_columns(
    places: Mapping[str, tuple[Array, tuple[str, str]]], columns: pd.DataFrame, path: Path | str
) -> Path:
    """Draw layouts of the same lesions, a row a layout, a panel a column.

    Args:
        places: under the layout's name, places `(n, 2)` and the labels of its axes.
        columns: what to colour by, `n` rows. Of more than eight classes the seven most frequent get a
            colour, the others share one; what is missing is grey.
        path: of the PNG.
    """
    names = list(map(str, columns))
    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(3.9 * across, 3.9 * down * len(places)), facecolor="white", layout="constrained")
    for layout_number, (layout, (where, labels)) in enumerate(places.items()):
        for number, name in enumerate(names):
            axes = figure.add_subplot(down * len(places), across, layout_number * down * across + number + 1)
            _scatter(figure, axes, where, columns[name])
            axes.locator_params(nbins=6)
            tidy(axes, f"{layout}, by {name}", *labels)
    return save_figure(figure, path)


def _scatter(figure: Figure, axes: Axes, where: Array, values: pd.Series[Any]) -> None:
    size = float(np.clip(3000 / len(where), 6, 26))
    known = values.notna().to_numpy()
    style: dict[str, Any] = {"s": size, "alpha": 0.8, "linewidths": 0.3, "edgecolors": "white"}
    if not known.all():
        x, y = where[~known].T
        axes.scatter(x, y, **style, color=MISSING, marker=".", label=f"missing ({(~known).sum()})")
    if is_measurement(values):
        numbers = values[known].to_numpy(dtype=float)
        low, high = np.percentile(numbers, [2, 98])
        x, y = where[known].T
        points = axes.scatter(x, y, **style, c=numbers, cmap="viridis", vmin=low, vmax=max(high, low + 1e-12))
        bar = figure.colorbar(points, ax=axes, shrink=0.8, pad=0.02, aspect=28, extend="both")
        bar.ax.tick_params(labelsize=7, colors=MUTED)
        bar.outline.set_visible(False)
        return
    texts = values.map(_plain, na_action="ignore")
    counts = texts[known].value_counts()
    shown = _classes_shown(counts)
    for color, marker, kind in zip(COLORS, MARKERS, shown, strict=False):
        mask = (texts == kind).to_numpy(dtype=bool)
        x, y = where[mask].T
        axes.scatter(x, y, **style, color=color, marker=marker, label=f"{kind} ({mask.sum()})")
    if rest := len(counts) - len(shown):
        mask = known & ~texts.isin(shown).to_numpy()
        x, y = where[mask].T
        axes.scatter(x, y, **style, color=COLORS[-1], marker=MARKERS[-1], label=f"{rest} others ({mask.sum()})")
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
        handletextpad=0.2, columnspacing=0.8,
    )  # fmt: skip


def _classes_shown(counts: pd.Series[int]) -> Sequence[str]:
    """Classes with a colour of their own: all, or of too many the most frequent."""
    return sorted(counts.index[: MAX_CLASSES - 1 if len(counts) > MAX_CLASSES else MAX_CLASSES])


def point_colors(values: pd.Series[Any]) -> tuple[list[str], list[tuple[str, str]]]:
    """A colour for every row as `map_of_columns` has them, and the legend: names and colours."""
    known = values.notna().to_numpy()
    if is_measurement(values):
        numbers = values.to_numpy(dtype=float)
        low, high = np.percentile(numbers[known], [2, 98])
        scale = colormaps["viridis"]
        colors = [
            to_hex(scale((number - low) / max(high - low, 1e-12))) if there else MISSING
            for number, there in zip(numbers, known, strict=True)
        ]
        return colors, [(f"{low:.4g} or less", to_hex(scale(0.0))), (f"{high:.4g} or more", to_hex(scale(1.0)))]
    texts = values.map(_plain, na_action="ignore")
    of_class = dict(zip(_classes_shown(texts[known].value_counts()), COLORS, strict=False))
    colors = [of_class.get(text, COLORS[-1]) if there else MISSING for text, there in zip(texts, known, strict=True)]
    legend = list(of_class.items())
    legend += [("others", COLORS[-1])] if texts[known].nunique() > len(of_class) else []
    return colors, legend + ([("missing", MISSING)] if not known.all() else [])


def _plain(value: object) -> str:
    """Whole numbers without a decimal point, long texts cut."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text if len(text) <= 22 else f"{text[:21]}…"
