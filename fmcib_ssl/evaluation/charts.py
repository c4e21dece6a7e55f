"""Curves and maps: how a run went, what probes found, and how features lie; one function a picture."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

from fmcib_ssl.evaluation.figures import INK, LINE, MUTED, save_figure
from fmcib_ssl.evaluation.metrics import Calibration
from fmcib_ssl.types import Array

COLORS = ("#2f6fb3", "#d9622b", "#3c8d5a", "#8a5fbf", "#b3892f", "#c2456b", "#3a9ea5", "#5f6b7a")
#: One for each colour, so that classes can be told apart without them.
_MARKERS = "osD^vPX*"
_MISSING = "#d5dae0"
#: Lesions on a map; of more, a random choice is shown.
MAX_POINTS = 4000
#: Fewer lesions than this have no neighbourhoods that UMAP could lay out.
MIN_UMAP = 15
#: Columns that say where a lesion is or what it is called, not what it is.
_NAMES = ("lesion_id", "scan_id", "row", "features")
_PLACES = ("center_", "coord", "table_")
_ID = re.compile(r"(^|_)(id|uid|number)$|(ID|UID|uid)$|path$")

#: Panels of the training curves: title, unit of the vertical axis, and the columns drawn with their labels.
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "loss", {"train/loss": "training", "val/loss": "validation"}),
    ("Validation", "score", {"val/score": "validation"}),
    ("Cosine similarity", "mean cosine", {
        "train/positive_cosine": "two views of a lesion", "train/negative_cosine": "lesion and mined negative",
        "train/lesion_cosine": "two lesions",
    }),
    ("Held-out lesions, online", "AUC", {"online/linear_auc": "linear probe", "online/knn_auc": "nearest neighbours"}),
    ("What is left to learn", "share of the softmax", {
        "train/mined_share": "on mined negatives", "train/lesion_share": "on other lesions",
    }),
    ("Effective rank", "directions", {"train/rank": "embeddings", "online/rank": "features, held out"}),
    ("Alignment", "mean squared distance", {"train/alignment": "two views of a lesion"}),
    ("Uniformity", "log mean potential", {"train/uniformity": "lesions"}),
    ("Learning rate", "learning rate", {"lr": "rate"}),
    ("Gradient norm", "norm", {"train/grad_norm": "all parameters"}),
    ("Speed", "samples / s", {"perf/samples_per_s": "lesions"}),
    ("Waiting for data", "share of time", {"perf/data_wait_share": "waiting"}),
)  # fmt: skip


class Palette(dict[str, tuple[str, str]]):
    """Colour and marker of a series by its name: those that it was first drawn with, in all figures of a page."""

    def __missing__(self, name: str) -> tuple[str, str]:
        self[name] = COLORS[len(self) % len(COLORS)], _MARKERS[len(self) % len(_MARKERS)]
        return self[name]


def read_metrics(metrics_csv: Path | str) -> pd.DataFrame:
    """The table of a run's figures, by step.

    Raises:
        ValueError: it has no column `step`.
    """
    table = pd.read_csv(metrics_csv)
    if "step" not in table:
        raise ValueError(f"{metrics_csv} has no column 'step'; it has {', '.join(table.columns)}")
    return table.sort_values("step", kind="stable")


def training_curves(metrics_csv: Path | str, path: Path | str) -> Path:
    """Draw how a run went, from its table of figures; panels without data are left out.

    Faint: each step. Strong: the running mean over a twentieth of the run.

    Args:
        metrics_csv: a column `step` and any of those of the panels; empty cells are skipped.
        path: of the PNG.

    Raises:
        ValueError: the table has no column `step`, or none of the columns holds a number.
    """
    table = read_metrics(metrics_csv)
    filled = {name for name in table.select_dtypes("number") if table[name].notna().any()}
    panels = [panel for panel in _PANELS if filled & panel[2].keys()]
    if not panels:
        drawn = ", ".join(name for _, _, columns in _PANELS for name in columns)
        raise ValueError(f"{metrics_csv} holds no numbers to draw; it should have any of {drawn}")
    figure, all_axes = _panels(len(panels), 3, (3.7, 2.6))
    for axes, (title, unit, columns) in zip(all_axes, panels, strict=True):
        for color, (name, label) in zip(COLORS, columns.items(), strict=False):
            if name not in filled:
                continue
            series = table.dropna(subset=[name]).groupby("step")[name].mean()
            window = max(1, len(series) // 20)
            marker = "o" if len(series) < 10 else None
            axes.plot(series.index, series, color=color, alpha=0.25 if window > 1 else 1, lw=1, marker=marker, ms=3)
            smooth = series.rolling(window, min_periods=1, center=True).mean()
            axes.plot(series.index, smooth, color=color, lw=1.6, label=label)
        _tidy(axes, title, "step", unit)
        if len(filled & columns.keys()) > 1:
            axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)
    return save_figure(figure, path, svg=True)


def _tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and quiet axes, alike in all pictures."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, weight="bold")
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(labelsize=7.5, colors=MUTED)
    axes.grid(color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def _panels(num: int, max_across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, row by row, each of a size in inches."""
    across = min(num, max_across)
    down = -(-num // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), facecolor="white", layout="constrained")
    return figure, [figure.add_subplot(down, across, number) for number in range(1, num + 1)]


def _diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def _save_chart(figure: Figure, path: Path | str, columns: int = 1) -> Path:
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left", ncols=columns)
    return save_figure(figure, path, svg=True)


def interval_plot(
    panels: Mapping[str, pd.DataFrame], path: Path | str, palette: Palette, unit: str, *, zero: bool = False
) -> Path:
    """Draw values with their intervals, a panel a task, a line a row.

    Args:
        panels: under the panel's title, rows with `name`, `value`, `low`, `high`, in the order to be drawn in; a
            column `features`, if there is one, names the series whose colour a row has, else `name` does.
        path: of the PNG.
        palette: colours of the series.
        unit: of the horizontal axis, such as the metric.
        zero: draw a line at zero, for differences.
    """
    max_rows = max(len(rows) for rows in panels.values())
    figure, all_axes = _panels(len(panels), 3, (4.0, 0.9 + 0.32 * max_rows))
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        if zero:
            axes.axvline(0, color=MUTED, lw=0.8, ls=":")
        series = rows["features" if "features" in rows else "name"]
        numbers = rows[["value", "low", "high"]].to_numpy(float)
        for line, (name, (value, low, high)) in enumerate(zip(series, numbers, strict=True)):
            color = palette[name][0]
            axes.plot([low, high], [line, line], color=color, lw=2.2, alpha=0.55, solid_capstyle="butt")
            axes.plot(value, line, "o", color=color, ms=5.5)
        _tidy(axes, title, unit, "")
        axes.set(ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axes.set_yticklabels(rows["name"], fontsize=8, color=INK)
        axes.margins(x=0.08)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return save_figure(figure, path, svg=True)


def mean_roc(labels: Array, scores: Array, folds: Array) -> tuple[Array, Array]:
    """False and true positive rates: the ROC curve of each fold, averaged at equal false positive rates.

    Scores of two folds come from two models and share no scale, so they are not put into one curve.

    Args:
        labels: 0 or 1, `(n,)`.
        scores: higher meaning class 1, `(n,)`.
        folds: of every row; folds without one of the classes have no curve.

    Raises:
        ValueError: no fold holds both classes.
    """
    grid = np.linspace(0, 1, 201)
    curves = []
    for fold in np.unique(folds):
        own = folds == fold
        if len(np.unique(labels[own])) == 2:
            false_positives, true_positives, _ = roc_curve(labels[own], scores[own])
            curves.append(np.interp(grid, false_positives, true_positives))
    if not curves:
        raise ValueError("no fold holds both classes")
    return np.r_[0, grid], np.r_[0, np.mean(curves, axis=0)]


def mean_roc_curves(
    curves: Mapping[str, tuple[Array, Array]], path: Path | str, palette: Palette, title: str = ""
) -> Path:
    """Draw curves of `mean_roc`, at most eight, each under its name in the legend."""
    figure, (axes,) = _panels(1, 1, (4.6, 4.4))
    _diagonal(axes)
    for name, (false_positives, true_positives) in curves.items():
        axes.plot(false_positives, true_positives, color=palette[name][0], lw=1.6, label=name)
    _tidy(axes, title, "false positive rate", "true positive rate")
    return _save_chart(figure, path, 2)


def calibration_curves(series: Mapping[str, Calibration], path: Path | str, palette: Palette, title: str = "") -> Path:
    """Draw observed against predicted with intervals; on the diagonal probabilities can be taken at their word."""
    figure, (axes,) = _panels(1, 1, (4.6, 4.2))
    _diagonal(axes)
    for name, one in series.items():
        color, marker = palette[name]
        errors = (one.observed - one.low, one.high - one.observed)
        axes.errorbar(one.predicted, one.observed, errors, color=color, lw=0.9, alpha=0.4, fmt="none")
        label = f"{name} (error {one.error:.2f}, Brier {one.brier:.2f})"
        axes.plot(one.predicted, one.observed, color=color, marker=marker, ms=5, lw=1.6, label=label)
    _tidy(axes, title, "predicted probability", "observed share")
    return _save_chart(figure, path)


def label_fractions(rows: pd.DataFrame, path: Path | str, palette: Palette, unit: str) -> Path:
    """Draw what a probe reaches with a part of the labels: `name`, `fraction` of them, `value`, `low`, `high`."""
    figure, (axes,) = _panels(1, 1, (5.4, 4.0))
    by_name: Any = rows.sort_values("fraction").groupby("name", sort=False)
    for name, part in by_name:
        color, marker = palette[str(name)]
        axes.fill_between(100 * part["fraction"], part["low"], part["high"], color=color, alpha=0.12, lw=0)
        axes.plot(100 * part["fraction"], part["value"], color=color, marker=marker, ms=5, lw=1.6, label=str(name))
    ticks = sorted(100 * rows["fraction"].unique())
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    _tidy(axes, "Fewer labels", "labels of the training set", unit)
    return _save_chart(figure, path, 2)


def survival_curves(halves: Sequence[Mapping[str, Any]], path: Path | str, title: str = "") -> Path:
    """Draw Kaplan-Meier curves, `halves` of `metrics.risk_halves`."""
    figure, (axes,) = _panels(1, 1, (4.6, 3.9))
    for color, half in zip(COLORS, halves, strict=False):
        label = f"{half['name']} (n = {half['num']}, {half['num_events']} events)"
        axes.step(half["times"], half["survival"], where="post", color=color, lw=1.6, label=label)
    axes.set(ylim=(0, 1.03))
    axes.set_xlim(left=0)
    _tidy(axes, title, "time", "share without the event")
    return _save_chart(figure, path)


def principal_components(features: Array) -> tuple[Array, Array]:
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


def umap_layout(features: Array, seed: int = 0) -> Array:
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


def map_of_columns(
    layouts: Mapping[str, tuple[Array, tuple[str, str]]], columns: pd.DataFrame, path: Path | str
) -> Path:
    """Draw layouts of the same lesions, a panel a layout and column.

    Args:
        layouts: under the layout's name, points `(n, 2)` and the labels of its axes.
        columns: what to colour by, `n` rows.
        path: of the PNG.
    """
    names = list(map(str, columns))
    figure, panels = _panels(len(names) * len(layouts), min(len(names), 4), (3.9, 3.9))
    each = itertools.product(layouts.items(), names)
    for axes, ((layout, (points, labels)), name) in zip(panels, each, strict=True):
        colors, legend = point_colors(columns[name])
        size = float(np.clip(3000 / len(points), 6, 26))
        axes.scatter(points[:, 0], points[:, 1], size, colors, alpha=0.8, linewidths=0.3, edgecolors="white")
        axes.locator_params(nbins=6)
        _tidy(axes, f"{layout}, by {name}", *labels)
        axes.legend(
            handles=[Line2D([], [], color=color, marker="o", ls="", label=text) for text, color in legend.items()],
            frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
            handletextpad=0.2, columnspacing=0.8,
        )  # fmt: skip
    return save_figure(figure, path)


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
        texts = values.map(_plain, na_action="ignore")
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


def _plain(value: object) -> str:
    """Whole numbers without a decimal point, long texts cut."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text if len(text) <= 22 else f"{text[:21]}…"
