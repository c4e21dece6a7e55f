"""Pictures and tables of docs/does_it_learn.md, from what benchmarks/lidc.py wrote.

    python benchmarks/lidc_figures.py

A table of the page is replaced where `<!-- NAME -->` stands above it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from pydantic import Field

from fmcib_ssl.evaluation import Estimate
from fmcib_ssl.io import Command, parse_command

REPO = Path(__file__).resolve().parents[1]
GRADED = ("texture", "margin", "spiculation", "malignancy")
SIZES = {
    "malignancy_within_size": "mean of the thirds", "malignancy_small": "smallest third",
    "malignancy_medium": "middle third", "malignancy_large": "largest third",
}  # fmt: skip
#: Of Okabe and Ito, which the colour-blind can tell apart, with markers of their own.
LOOKS = {
    "recipe": ("#D55E00", "o"),
    "recipe+hu_statistics": ("#CC79A7", "D"),
    "hu_statistics": ("#0072B2", "s"),
    "concentric": ("#000000", "P"),
    "point_features": ("#56B4E9", "^"),
    "raw_voxels": ("#999999", "v"),
}
PLAIN, READER, CEILING = ("#555555", "o"), "#E69F00", "#009E73"
#: Task, target, metric, and share of the labels: what a column or a panel shows.
Key = tuple[str, str, str, float]
MEAN: dict[str, Key] = {task: (task, "mean", "spearman", 1.0) for task in GRADED}
MAJORITY: dict[str, Key] = {task: (task, "majority", "auc", 1.0) for task in (*GRADED, "calcification")}
FEW_LABELS: dict[str, Key] = {
    f"{task}, {share:.0%}": (task, "mean", "spearman", share)
    for task in ("texture", "margin")
    for share in (1.0, 0.5, 0.2, 0.1)
}
WITHIN_SIZE: dict[str, Key] = {title: (task, "mean", "spearman", 1.0) for task, title in SIZES.items()}
WITHIN_SIZE_AUC: dict[str, Key] = {title: (task, "majority", "auc", 1.0) for task, title in SIZES.items()}
PUBLISHED: dict[str, Key] = {"AUC": ("malignancy", "published", "auc", 1.0)}


class LidcFigures(Command):
    """Draw the pictures of docs/does_it_learn.md, and write its tables."""

    results: Path = Field(REPO / "benchmarks" / "results" / "lidc.json", description="what benchmarks/lidc.py wrote")
    page: Path = Field(REPO / "docs" / "does_it_learn.md", description="whose tables are replaced; pictures: in img/")


class Results:
    """What benchmarks/lidc.py wrote, by method and key."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.rows = {(row["method"], _key(row)): row for row in values["rows"]}
        self.differences = {(d["method"], d["against"], _key(d)): d for d in values["differences"]}
        self.targets = {(t["task"], t["target"]): t for t in values["targets"] if "fraction" not in t}

    def ranked(self, key: Key) -> list[str]:
        """Methods that have a row, the best first; not the reader."""
        own = [row for (method, its), row in self.rows.items() if its == key and method != "one_reader"]
        return [row["method"] for row in sorted(own, key=lambda row: -row["value"])]

    def ceiling(self, key: Key) -> float | None:
        """What a perfect score could reach; None where that was not estimated."""
        task, target, metric, _ = key
        ceiling = self.targets.get((task, target), {}).get("ceiling", {}).get(metric)
        return None if ceiling is None or task in SIZES else float(ceiling)


def _key(row: Mapping[str, Any]) -> Key:
    return row["task"], row["target"], row["metric"], row.get("fraction", 1.0)


def forest(results: Results, panels: Mapping[str, Key], path: Path) -> None:
    """Value and interval of every contender, a panel a task, in the order of the first; the reader and the ceiling.

    Full markers are against all readers, as the ceiling is. Open ones are against the readers that the one reader is
    compared with, so they and the band are answers to one question.
    """
    methods = results.ranked(next(iter(panels.values())))[::-1]
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 0.25 * len(methods) + 1.5), sharey=True)
    for axis, (title, key) in zip(axes, panels.items(), strict=True):
        reader, ceiling = results.rows.get(("one_reader", key)), results.ceiling(key)
        if reader:
            axis.axvspan(reader["low"], reader["high"], color=READER, alpha=0.25, linewidth=0, label="one reader")
            axis.axvline(reader["value"], color=READER, linewidth=1.5)
        if ceiling is not None:
            axis.axvline(ceiling, color=CEILING, linewidth=1.5, linestyle="--", label="ceiling")
        for place, method in enumerate(methods):
            row, (color, marker) = results.rows.get((method, key)), LOOKS.get(method, PLAIN)
            if row is None:
                continue
            error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            axis.errorbar(row["value"], place, xerr=error, fmt=marker, color=color, markersize=5, linewidth=1.2)
            ahead = results.differences.get((method, "one_reader", key))
            if reader and ahead:
                against_others = reader["value"] + ahead["value"]
                axis.plot(against_others, place, marker, color=color, markersize=5, markerfacecolor="white")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel({"auc": "AUC", "spearman": "Spearman"}[key[2]], fontsize=9)
        axis.set_yticks(range(len(methods)), [name.replace("_", " ") for name in methods])
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.3)
    axes[0].plot([], [], "o", color=PLAIN[0], label="against all readers")
    axes[0].plot([], [], "o", color=PLAIN[0], markerfacecolor="white", label="against the same others as the reader")
    _save(figure, path, axes[0])


def few_labels(results: Results, path: Path) -> None:
    """Spearman's correlation over the share of the training patients whose labels are used."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, task in zip(axes, ("texture", "margin"), strict=True):
        keys = [key for key in FEW_LABELS.values() if key[0] == task]
        for method, (color, marker) in LOOKS.items():
            points = [
                (100 * key[3], results.rows[method, key]["value"]) for key in keys if (method, key) in results.rows
            ]
            if points:
                axis.plot(*zip(*points, strict=True), f"{marker}-", color=color, label=method.replace("_", " "))
        axis.set_xscale("log")
        axis.set_xticks([10, 20, 50, 100], ["10 %", "20 %", "50 %", "100 %"])
        axis.minorticks_off()
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("labelled training patients", fontsize=9)
        axis.grid(linewidth=0.3)
    axes[0].set_ylabel("Spearman", fontsize=9)
    _save(figure, path, axes[0])


def _save(figure: Any, path: Path, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), fontsize=8, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


def tables(results: Results) -> dict[str, str]:
    """The tables of the page, in Markdown, by name."""
    columns = {"mean": MEAN, "majority": MAJORITY, "sizes": WITHIN_SIZE_AUC, "published": PUBLISHED}
    return {name: table(results, own) for name, own in columns.items()} | {"differences": differences(results)}


def table(results: Results, columns: Mapping[str, Key]) -> str:
    """One row a contender, the best in the first column first; the reader, the ceiling, and how many nodules."""
    first, lines = next(iter(columns.values())), []
    for method in ["one_reader", *results.ranked(first)]:
        own = [results.rows.get((method, key)) for key in columns.values()]
        if any(own):
            lines.append(
                [_name(method), *(_cell(row, ".3f") for row in own), str(own[0]["seeds"] or "") if own[0] else ""]
            )
    if any(ceilings := [results.ceiling(key) for key in columns.values()]):
        lines.append(["ceiling", *("" if value is None else f"{value:.3f}" for value in ceilings), ""])
    about = [results.targets[key[:2]] for key in columns.values()]
    kept = [", ".join(str(one[name]) for name in ("lesions", "positives") if name in one) for one in about]
    lines.append(["nodules, positive" if "positives" in about[0] else "nodules", *kept, ""])
    return _markdown(("features", *columns, "seeds"), lines)


def differences(results: Results) -> str:
    """How far the recipe, alone and with others, is ahead of all, and statistics of the reader, in the mean rating."""
    pairs = dict.fromkeys((a, b) for a, b, key in results.differences if key in MEAN.values())
    shown = [
        (a, b) for a, b in pairs if a.startswith(("recipe", "concentric")) or (a, b) == ("hu_statistics", "one_reader")
    ]
    cells = [[_cell(results.differences.get((a, b, key)), "+.3f") for key in MEAN.values()] for a, b in shown]
    lines = [[_name(a), _name(b), *own] for (a, b), own in zip(shown, cells, strict=True)]
    return _markdown(("features", "ahead of", *MEAN), lines)


def _name(method: str) -> str:
    return "one reader, against the others" if method == "one_reader" else f"`{method}`"


def _cell(row: dict[str, Any] | None, spec: str) -> str:
    return format(Estimate(row["value"], row["low"], row["high"]), spec) if row else ""


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def main(arguments: Sequence[str]) -> None:
    """Draw everything, and write the tables that the page has a place for."""
    command = parse_command(LidcFigures, arguments)
    mpl.use("agg")
    results = Results(json.loads(command.results.read_text(encoding="utf-8")))
    folder = command.page.parent / "img"
    folder.mkdir(parents=True, exist_ok=True)
    forest(results, MEAN, folder / "lidc_rho.png")
    forest(results, {task: MAJORITY[task] for task in GRADED}, folder / "lidc_auc.png")
    forest(results, WITHIN_SIZE, folder / "lidc_sizes.png")
    few_labels(results, folder / "lidc_labels.png")
    text = command.page.read_text(encoding="utf-8")
    for name, written in tables(results).items():
        text = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=\n\n)", written, text, flags=re.DOTALL)
    command.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
