"""Pictures of docs/does_it_learn.md: `python benchmarks/lidc_figures.py [results=FILE.json] [folder=docs/img]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from pydantic import Field

from fmcib_ssl.io import Command, parse_command

REPO = Path(__file__).resolve().parents[1]
TASKS = ("texture", "margin", "malignancy")
#: Who is in the picture of the labels.
COLORS = {
    "recipe": "#d62728",
    "hu_statistics": "#9467bd",
    "random_concentric": "#7f7f7f",
    "lightly_simclr": "#2ca02c",
    "raw_voxels": "#1f77b4",
}


class LidcFigures(Command):
    """Draw the pictures of docs/does_it_learn.md."""

    results: Path = Field(REPO / "benchmarks" / "results" / "lidc.json", description="what benchmarks/lidc.py wrote")
    folder: Path = Field(REPO / "docs" / "img", description="where the pictures go")


def forest(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """AUC and interval of every contender, a panel a task, in the order of texture."""
    found = {(row["method"], row["task"]): row for row in rows}
    methods = [row["method"] for row in sorted(rows, key=lambda row: row["auc"]) if row["task"] == "texture"]
    figure, panels = plt.subplots(1, len(TASKS), figsize=(9, 0.28 * len(methods) + 1.1), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        for place, method in enumerate(methods):
            row = found[method, task]
            error = [[row["auc"] - row["low"]], [row["high"] - row["auc"]]]
            color = COLORS["recipe"] if method == "recipe" else "#444444"
            panel.errorbar(row["auc"], place, xerr=error, fmt="o", color=color, markersize=4, linewidth=1)
        panel.axvline(found["recipe", task]["auc"], color=COLORS["recipe"], linewidth=0.5)
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("AUC", fontsize=9)
        panel.set_yticks(range(len(methods)), [name.replace("_", " ") for name in methods])
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", linewidth=0.3)
    _save(figure, path)


def labels(results: dict[str, Any], path: Path) -> None:
    """AUC over the share of the training patients whose labels are used."""
    rows = [*results["fractions"], *({**row, "fraction": 1.0} for row in results["rows"])]
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for panel, task in zip(panels, TASKS, strict=False):
        for method, color in COLORS.items():
            own = sorted(
                (row for row in rows if row["method"] == method and row["task"] == task), key=lambda r: r["fraction"]
            )
            shares = [100 * row["fraction"] for row in own]
            panel.plot(shares, [row["auc"] for row in own], "o-", color=color, label=method.replace("_", " "))
        panel.set_xscale("log")
        panel.set_xticks([10, 20, 50, 100], ["10 %", "20 %", "50 %", "100 %"])
        panel.minorticks_off()
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("labelled training patients", fontsize=9)
        panel.grid(linewidth=0.3)
    panels[0].set_ylabel("AUC", fontsize=9)
    panels[0].legend(fontsize=7, loc="lower right")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main(arguments: Sequence[str]) -> None:
    """Draw both."""
    command = parse_command(LidcFigures, arguments)
    mpl.use("agg")
    results = json.loads(command.results.read_text(encoding="utf-8"))
    command.folder.mkdir(parents=True, exist_ok=True)
    forest(results["rows"], command.folder / "lidc_auc.png")
    labels(results, command.folder / "lidc_labels.png")


if __name__ == "__main__":
    main(sys.argv[1:])
