"""Pictures of what probes found: intervals side by side, calibration, and what fewer labels cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from fmcib_ssl.evaluation.figures import COLORS, INK, MUTED, Palette, save_figure, tidy
from fmcib_ssl.evaluation.metrics import Calibration

Array = npt.NDArray[Any]


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
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    most = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(1.6 + 3.1 * across, down * (0.9 + 0.32 * most)), facecolor="white", layout="constrained")
    for place, (title, rows) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        if zero:
            axes.axvline(0, color=MUTED, lw=0.8, ls=":")
        series = rows["features" if "features" in rows else "name"]
        numbers = rows[["value", "low", "high"]].to_numpy(float)
        for line, (name, (value, low, high)) in enumerate(zip(series, numbers, strict=True)):
            color = palette[name][0]
            axes.plot([low, high], [line, line], color=color, lw=2.2, alpha=0.55, solid_capstyle="butt")
            axes.plot(value, line, "o", color=color, ms=5.5)
        tidy(axes, title, unit, "")
        axes.set(ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axes.set_yticklabels(rows["name"], fontsize=8, color=INK)
        axes.margins(x=0.08)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return save_figure(figure, path, svg=True)


def mean_roc(labels: Array, scores: Array, folds: Array) -> tuple[Array, Array]:
    """The ROC curve of each fold, averaged at equal false positive rates.

    Scores of two folds come from two models and share no scale, so they are not put into one curve.

    Args:
        labels: 0 or 1, `(n,)`.
        scores: higher meaning class 1, `(n,)`.
        folds: of every row; folds without one of the classes have no curve.

    Returns:
        False and true positive rates.

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
    """Draw curves of `mean_roc`.

    Args:
        curves: under the name for the legend; at most eight.
        path: of the PNG.
        palette: colours of the series.
        title: above the picture.
    """
    figure = Figure(figsize=(4.6, 4.4), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    for name, (false_positives, true_positives) in curves.items():
        axes.plot(false_positives, true_positives, color=palette[name][0], lw=1.6, label=name)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    tidy(axes, title, "false positive rate", "true positive rate")
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left", ncols=2)
    return save_figure(figure, path, svg=True)


def calibration_curves(found: Mapping[str, Calibration], path: Path | str, palette: Palette, title: str = "") -> Path:
    """Draw observed against predicted with intervals; on the diagonal probabilities can be taken at their word.

    Args:
        found: under the name for the legend; at most eight.
        path: of the PNG.
        palette: colours of the series.
        title: above the picture.
    """
    figure = Figure(figsize=(4.6, 4.2), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    for name, one in found.items():
        color, marker = palette[name]
        errors = (one.observed - one.low, one.high - one.observed)
        axes.errorbar(one.predicted, one.observed, errors, color=color, lw=0.9, alpha=0.4, fmt="none")
        label = f"{name} (error {one.error:.2f}, Brier {one.brier:.2f})"
        axes.plot(one.predicted, one.observed, color=color, marker=marker, ms=5, lw=1.6, label=label)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    tidy(axes, title, "predicted probability", "observed share")
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left")
    return save_figure(figure, path, svg=True)


def label_fractions(rows: pd.DataFrame, path: Path | str, palette: Palette, unit: str) -> Path:
    """Draw what a probe reaches with a part of the labels.

    Args:
        rows: `name`, `fraction` of the labels, `value`, `low`, `high`.
        path: of the PNG.
        palette: colours of the series.
        unit: the metric's name.
    """
    figure = Figure(figsize=(5.4, 4.0), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    drawn: Any = rows.sort_values("fraction").groupby("name", sort=False)
    for name, part in drawn:
        color, marker = palette[str(name)]
        axes.fill_between(100 * part["fraction"], part["low"], part["high"], color=color, alpha=0.12, lw=0)
        axes.plot(100 * part["fraction"], part["value"], color=color, marker=marker, ms=5, lw=1.6, label=str(name))
    ticks = sorted(100 * rows["fraction"].unique())
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    tidy(axes, "Fewer labels", "labels of the training set", unit)
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left", ncols=2)
    return save_figure(figure, path, svg=True)


def survival_curves(halves: Sequence[Mapping[str, Any]], path: Path | str, title: str = "") -> Path:
    """Draw Kaplan-Meier curves.

    Args:
        halves: each `name`, `num`, `num_events`, and `times` and `survival`, which holds from its time on.
        path: of the PNG.
        title: above the picture.
    """
    figure = Figure(figsize=(4.6, 3.9), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for color, half in zip(COLORS, halves, strict=False):
        label = f"{half['name']} (n = {half['num']}, {half['num_events']} events)"
        axes.step(half["times"], half["survival"], where="post", color=color, lw=1.6, label=label)
    axes.set(ylim=(0, 1.03))
    axes.set_xlim(left=0)
    tidy(axes, title, "time", "share without the event")
    figure.legend(frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left")
    return save_figure(figure, path, svg=True)
