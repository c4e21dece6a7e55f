"""Maps of features on the page: where lesions lie by PCA and UMAP, coloured by their columns, with their patches."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.figures import COLORS, INK, panels_of, save_figure, tidy
from fmcib_ssl.evaluation.report_results import ReportFigure, Section
from fmcib_ssl.types import Array

#: Lesions on a map; of more, a random choice is shown.
MAX_POINTS = 4000
#: Fewer lesions than this have no neighbourhoods that UMAP could lay out.
_MIN_UMAP = 15
#: Patches that the map can show, of lesions spread over the table, about 1 KB each.
_MAX_TILES = 600
_TILE_EDGE, _TILES_ACROSS = 64, 30
_MISSING = "#d5dae0"
#: Columns that say where a lesion is or what it is called, not what it is.
_NAMES = ("lesion_id", "scan_id", "row", "features")
_PLACES = ("center_", "coord", "table_")
_ID = re.compile(r"(^|_)(id|uid|number)$|(ID|UID|uid)$|path$")


def map_section(
    table: FeatureTable,
    columns: list[str],
    picture: Path,
    read: Callable[[int], Tensor] | None,
    window_hu: tuple[float, float],
) -> Section:
    """The lesions by PCA and UMAP, as a picture, and as points that show their patch.

    Args:
        table: whose lesions are drawn.
        columns: to colour by, a panel each; of none all lesions have one colour.
        picture: NAME.png.
        read: gives the patch of a row; None where patches cannot be read.
        window_hu: darkest and brightest value of patches.
    """
    rows, note = np.arange(len(table)), ""
    if len(rows) > MAX_POINTS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MAX_POINTS])
        note = f" {len(rows)} of {len(table)} lesions, drawn at random."
    features, lesions = table.features[rows], table.lesions.iloc[rows]
    points, shares = _principal_components(features)
    first, second = (f"component {k + 1} ({100 * share:.0f} % of variance)" for k, share in enumerate(shares))
    layouts = {"PCA": (points, (first, second))}
    if len(rows) < _MIN_UMAP:
        note = f" Fewer than {_MIN_UMAP} lesions have no neighbourhoods that UMAP could lay out.{note}"
    elif has_umap():
        layouts["UMAP"] = (_umap(features), ("UMAP 1", "UMAP 2"))
    else:
        note = f" For a UMAP beside it: pip install 'fmcib_ssl[report]'.{note}"
    shown = lesions[columns] if columns else pd.DataFrame({"all lesions": [""] * len(rows)})
    colored: dict[str, dict[str, Any]] = {}
    for column in map(str, shown):
        colors, legend = point_colors(shown[column])
        values = [shortened(value) for value in shown[column]]
        colored[column] = {"values": values, "colors": colors, "legend": list(legend.items())}
    figure, panels = panels_of(len(colored) * len(layouts), min(len(colored), 4), (3.9, 3.9))
    each = itertools.product(layouts.items(), colored.items())
    for axes, ((layout, (points, labels)), (column, own)) in zip(panels, each, strict=True):
        size = float(np.clip(3000 / len(points), 6, 26))
        x, y = points.T
        axes.scatter(x, y, s=size, c=own["colors"], alpha=0.8, linewidths=0.3, edgecolors="white")
        axes.locator_params(nbins=6)
        tidy(axes, f"{layout}, by {column}", *labels)
        axes.legend(
            handles=[Line2D([], [], color=color, marker="o", ls="", label=text) for text, color in own["legend"]],
            frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
            handletextpad=0.2, columnspacing=0.8,
        )  # fmt: skip
    caption = (
        "Each point a lesion. PCA of standardised features shows what varies most; UMAP, who is near whom by cosine."
    )
    text = f"{len(table)} lesions, {features.shape[1]} features, nothing fitted to any label.{note}"
    positions = {layout: np.asarray(points, float).round(3).tolist() for layout, (points, _) in layouts.items()}
    data = {"layouts": positions, "columns": colored, **_tiles(rows, read, window_hu)}
    pictures = [ReportFigure(save_figure(figure, picture), caption, wide=True)]
    return Section(f"Map: {table.name}", text, figures=pictures, points=data)


def _tiles(rows: Array, read: Callable[[int], Tensor] | None, window_hu: tuple[float, float]) -> dict[str, Any]:
    """The axial plane through the middle of lesions spread over the table, as one JPEG, and where each is in it."""
    tile_of, tiles, file = np.full(len(rows), -1), "", BytesIO()
    if read is not None:
        chosen = spread(np.arange(len(rows)), _MAX_TILES)
        tile_of[chosen] = np.arange(len(chosen))
        sheet = Image.new("L", (_TILES_ACROSS * _TILE_EDGE, -(-len(chosen) // _TILES_ACROSS) * _TILE_EDGE))
        low, high = window_hu
        for k, index in enumerate(chosen):
            patch = read(int(rows[index]))[0].float().numpy()
            grey = np.clip(255 * (patch[len(patch) // 2] - low) / (high - low), 0, 255).astype(np.uint8)
            tile = Image.fromarray(grey).resize((_TILE_EDGE, _TILE_EDGE))
            sheet.paste(tile, (k % _TILES_ACROSS * _TILE_EDGE, k // _TILES_ACROSS * _TILE_EDGE))
        sheet.save(file, "JPEG", quality=80)
        tiles = base64.b64encode(file.getvalue()).decode()
    return {"tiles": tiles, "tile_of": tile_of.tolist(), "num_across": _TILES_ACROSS, "tile_edge": _TILE_EDGE}


def spread(rows: Array, number: int) -> Array:
    """At most so many of the rows, evenly spread."""
    return np.asarray(rows[np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)])


def shortened(value: object) -> str:
    """Whole numbers without a decimal point, long texts cut."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text if len(text) <= 20 else f"{text[:19]}…"


def _principal_components(features: Array) -> tuple[Array, Array]:
    """Features on the first two principal components of the standardised features.

    Args:
        features: `(n, dim)`; with one row or one column there is no second component, and it is 0.

    Returns:
        Points `(n, 2)`, and each component's share of the variance, `(2,)`.
    """
    scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-12)
    solver = "full" if min(features.shape) < 1000 else "randomized"
    pca = PCA(min(2, *features.shape), svd_solver=solver, random_state=0).fit(scaled)
    points, shares = np.zeros((len(features), 2)), np.zeros(2)
    points[:, : pca.n_components_], shares[: pca.n_components_] = pca.transform(scaled), pca.explained_variance_ratio_
    return points, np.nan_to_num(shares)


def has_umap() -> bool:
    """Whether umap-learn is installed: `pip install 'fmcib_ssl[report]'`."""
    return importlib.util.find_spec("umap") is not None


def _umap(features: Array, seed: int = 0) -> Array:
    """Features laid out by UMAP with cosine distance, `(n, 2)`; near points are alike, distances mean little.

    Source: McInnes, Healy, Melville, "UMAP: Uniform Manifold Approximation and Projection", 2018.

    Raises:
        ImportError: umap-learn is not installed.
    """
    make = importlib.import_module("umap").UMAP  # heavy, and an optional extra
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value")  # a seed means one thread: said each time
        neighbors = max(2, min(15, len(features) - 1))
        points: Array = make(n_neighbors=neighbors, metric="cosine", random_state=seed).fit_transform(features)
    return points


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
        if is_measurement(values):
            measurements.append(column)
        elif 2 <= values.dropna().map(str).nunique() <= len(COLORS):
            classes.append(column)
    return (classes + measurements)[:limit]


def is_name(column: str) -> bool:
    """Whether a column names lesions, scans, patients or files."""
    return column in _NAMES or _ID.search(column) is not None


def is_measurement(values: pd.Series[Any]) -> bool:
    """Whether a column is drawn with a colour bar: numbers, and more of them than can be told apart as classes."""
    types = pd.api.types
    return bool(types.is_numeric_dtype(values) and not types.is_bool_dtype(values) and values.nunique() > len(COLORS))


def point_colors(values: pd.Series[Any]) -> tuple[list[str], dict[str, str]]:
    """A colour for every row, and the legend: colours by name.

    Of more than eight classes the seven most frequent get a colour, the others share one; measurements have a scale
    from their 2nd to their 98th percentile; what is missing is grey.
    """
    known, legend = values.notna().to_numpy(), {}
    colors = np.full(len(values), _MISSING, dtype=object)
    if is_measurement(values):
        numbers, scale = values[known].to_numpy(float), colormaps["viridis"]
        low, high = np.percentile(numbers, [2, 98])
        colors[known] = [to_hex(scale(share)) for share in (numbers - low) / max(high - low, 1e-12)]
        steps = {f"{low:.4g} or less": 0.0, f"{(low + high) / 2:.4g}": 0.5, f"{high:.4g} or more": 1.0}
        legend = {name: to_hex(scale(share)) for name, share in steps.items()}
    else:
        texts = values.map(shortened, na_action="ignore")
        counts = texts.value_counts()
        num_own = len(COLORS) - (len(counts) > len(COLORS))
        others = counts.index[num_own:]
        for kind, color in zip(sorted(counts.index[:num_own]), COLORS, strict=False):
            colors[(texts == kind).to_numpy(bool)] = legend[f"{kind} ({counts[kind]})"] = color
        if len(others):
            colors[texts.isin(others)] = legend[f"{len(others)} others ({counts[others].sum()})"] = COLORS[-1]
    if not known.all():
        legend[f"missing ({(~known).sum()})"] = _MISSING
    return colors.tolist(), legend
