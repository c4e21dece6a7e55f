"""The page of a robustness measurement: tables, a chart, and one lesion under every condition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fmcib_ssl.evaluation.conditions import CLEAN, CONDITIONS
from fmcib_ssl.evaluation.embedding_sources import open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable
from fmcib_ssl.evaluation.figures import INK, MUTED, Palette, SheetLesion, lesion_sheet, panels_of, save_chart, tidy
from fmcib_ssl.evaluation.metrics import Estimate
from fmcib_ssl.evaluation.robustness import Robustness
from fmcib_ssl.io import write_atomically, write_json
from fmcib_ssl.types import Preprocessing


def write_robustness(
    result: Robustness, about: Mapping[str, Any], table: FeatureTable, lesion_id: str, folder: Path
) -> Path:
    """Write `robustness.md`, `.csv`, `.json` and `.png`, and `conditions.png`, to a folder; return the page.

    Args:
        result: what is written.
        about: further entries of the JSON: `notes`, which are also on the page, and the provenance.
        table: features of lesions whose source can be opened.
        lesion_id: the lesion that is drawn under every condition.
        folder: is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, rows = folder / "robustness.md", pd.DataFrame(result.rows)
    write_json(page.with_suffix(".json"), {**about, **vars(result)})
    write_atomically(page.with_suffix(".csv"), rows.to_csv(index=False))
    _draw_chart(rows, page.with_suffix(".png"))
    _draw_conditions(table, lesion_id, folder / "conditions.png")
    sections = ["# Robustness", *about["notes"], "![](robustness.png)"]
    sections += [f"## {metric}\n\n{_markdown(rows, metric)}" for metric in rows["metric"].unique()]
    if result.differences:
        differences = pd.DataFrame(result.differences)
        differences["features"] += " less " + differences["against"]
        differences = differences[~differences["metric"].str.endswith("less clean")]
        sections += [
            f"## {metric}, paired differences\n\n{_markdown(differences, metric)}"
            for metric in differences["metric"].unique()
        ]
    drawn = f"Lesion {lesion_id} under every condition, the first draw of each."
    text = "Intervals: 95 %, bootstrap over patients. In italics: controls, which destroy what matters."
    write_atomically(page, "\n\n".join([*sections, text, drawn, "![](conditions.png)"]) + "\n")
    return page


def _markdown(rows: pd.DataFrame, metric: str) -> str:
    """A line a condition, a column a set of features."""
    own = rows[rows["metric"] == metric]
    numbers = own[["value", "low", "high"]].to_numpy(float)
    text = [f"{value:.3f}" if np.isnan(low) else f"{Estimate(value, low, high):.3f}" for value, low, high in numbers]
    table = own.assign(text=text).pivot(index="condition", columns="features", values="text")
    table = table.loc[own["condition"].unique(), own["features"].unique()]
    lines = [["condition", *table], ["---", *["---:"] * len(table.columns)]]
    for condition, *cells in table.itertuples():
        lines.append([f"*{condition}*" if CONDITIONS[condition].is_control else condition, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _draw_chart(rows: pd.DataFrame, path: Path) -> None:
    """For each metric over the distance of the point, and beside it under the other conditions; a colour a table."""
    metrics = [m for m in rows["metric"].unique() if not m.startswith("share") and not m.endswith("less clean")]
    figure, all_axes = panels_of(2 * len(metrics), 2, (4.8, 3.3))
    rows = rows.astype({"low": float, "high": float})  # None, of an ICC, to NaN: no interval is drawn
    for number, metric in enumerate(metrics):
        _draw_metric(
            all_axes[2 * number], all_axes[2 * number + 1], rows[rows["metric"] == metric], labelled=not number
        )
    save_chart(figure, path, legend_columns=3)


def _draw_metric(moved_axes: Axes, axes: Axes, rows: pd.DataFrame, *, labelled: bool) -> None:
    palette, metric = Palette(), str(rows["metric"].iloc[0])
    distances = {condition: CONDITIONS[condition].distance_mm for condition in rows["condition"]}
    others = [condition for condition, distance in distances.items() if not distance and condition != CLEAN]
    names = rows["features"].unique()
    for number, name in enumerate(names):
        own, (color, marker) = rows[rows["features"] == name].set_index("condition"), palette[name]
        moved = own.drop(others)
        mm = moved.index.map(distances)
        moved_axes.fill_between(mm, moved["low"], moved["high"], color=color, alpha=0.12, lw=0)
        moved_axes.plot(mm, moved["value"], color=color, marker=marker, ms=5, lw=1.6, label=name if labelled else None)
        other = own.loc[others]
        lines = np.arange(len(others)) + 0.5 * ((number + 0.5) / len(names) - 0.5)
        axes.hlines(lines, other["low"], other["high"], color=color, lw=2, alpha=0.5)
        axes.plot(other["value"], lines, marker, color=color, ms=5)
    tidy(moved_axes, metric, "distance of the point, mm", metric)
    tidy(axes, metric, metric, "")
    axes.set(ylim=(len(others) - 0.4, -0.6), yticks=range(len(others)))
    for label, condition in zip(axes.set_yticklabels(others, fontsize=8, color=INK), others, strict=True):
        if CONDITIONS[condition].is_control:
            label.set(color=MUTED, style="italic")


def _draw_conditions(table: FeatureTable, lesion_id: str, path: Path) -> None:
    source, preprocessing = table.provenance["source"], Preprocessing.from_dict(table.provenance["preprocessing"])
    pictures: list[SheetLesion] = []
    for condition in CONDITIONS:
        patches = open_patches({**source, "condition": {"name": condition, "draw": 0}}, preprocessing)
        index = patches.lesions[ID_COLUMN].tolist().index(lesion_id)
        pictures.append(SheetLesion(condition, patches.read(index)[0].numpy()))
    lesion_sheet(pictures, path, preprocessing.spacing_mm)
