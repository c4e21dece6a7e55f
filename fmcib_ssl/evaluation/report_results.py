"""What the report says of an evaluation of frozen features, or of a fine-tuning, from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from fmcib_ssl.evaluation.figures import COLORS, INK, MUTED, Palette, panels_of, save_chart, tidy
from fmcib_ssl.evaluation.metrics import Estimate, calibration
from fmcib_ssl.io import Identifiers, parse_json
from fmcib_ssl.types import Array

#: What `fmcib-ssl evaluate` and a fine-tuning leave in their folders.
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.parquet"
_HELD_OUT = "Lesions of held-out patients."


@dataclass(frozen=True)
class ReportFigure:
    """A picture on the page.

    Attributes:
        path: NAME.png; its bytes go into the page, or those of an SVG beside it that is not large.
        caption: below it; also read out where the picture cannot be seen.
        wide: on a narrow screen it is scrolled, not shrunk until nothing can be read.
    """

    path: Path
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out.

    Attributes:
        title: its heading.
        text: paragraphs, parted by blank lines; plain text.
        table: below the text.
        figures: below the table.
        points: for `map.js`: lesions as points that show their patch when they are pointed at; above the figures.
    """

    title: str
    text: str = ""
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    figures: Sequence[ReportFigure] = ()
    points: Mapping[str, Any] | None = None


def is_own_file(path: Path) -> bool:
    """Whether a file exists and is no link: a folder that came from elsewhere may link to any file of this machine."""
    return path.is_file() and not path.is_symlink()


def safe_name(name: str) -> str:
    """Part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def read_results(folder: Path) -> dict[str, Any]:
    """What an evaluation of frozen features found, or a fine-tuning, whose rows are given the names of the others.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged, or lack a column.
    """
    file = folder / RESULTS_FILE
    if not is_own_file(file):
        raise FileNotFoundError(f"{folder} has no {RESULTS_FILE}: fmcib-ssl evaluate output={folder} makes it")
    try:
        results = parse_json(file.read_bytes())
        rows = results["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if "train" in results:
        results["rows"] = rows = [{**_fine_tuned(results), "task": results["label"], **row} for row in rows]
    needed = {"features", "task", "probe", "metric", "value", "low", "high"}
    if not rows or (missing := needed.difference(*rows)):
        raise ValueError(f"{file}: its rows have no {', '.join(sorted(missing))}" if rows else f"{file} has no rows")
    return dict(results)


def _fine_tuned(results: Mapping[str, Any]) -> dict[str, str]:
    """What a fine-tuning began with, and what it trained."""
    start = "random weights" if results.get("weights") is None else "pretrained weights"
    return {"features": start, "probe": f"fine-tuned, {results['train']}"}


def answer(results: Mapping[str, Any]) -> str:
    """Whether pretraining helped, in a sentence; empty where nothing was compared with random weights."""
    provenances = results.get("provenance", {}).get("features") or {}
    untrained = {name for name, value in provenances.items() if (value or {}).get("kind") == "random_weights"}
    differences = _complete(results.get("differences"))
    sentences = []
    for row in differences.to_dict("records"):
        if row["metric"] != results["rows"][0]["metric"] or row["fraction"] != differences["fraction"].max():
            continue
        if row["against"] not in untrained and not str(row["against"]).startswith("random weights"):
            continue
        verdict = "No difference from random weights can be shown"
        if row["low"] > 0 or row["high"] < 0:
            verdict = "Pretraining helped" if row["low"] > 0 else "Pretraining did harm"
        split = f", {row['split']}" if differences["split"].nunique() > 1 else ""
        sentences.append(
            f"{verdict}: {Estimate(row['value'], row['low'], row['high']):+.2f} {row['metric']} for {row['task']} "
            f"({row['features']}, {row['probe']}{split})."
        )
    return " ".join(sentences)


def result_sections(
    results: Mapping[str, Any], folder: Path, pictures: Path, palette: Palette, identifiers: Identifiers = "show"
) -> list[Section]:
    """Tables with intervals, differences, ROC and calibration curves.

    Args:
        results: from `read_results`.
        folder: of an evaluation or a fine-tuning; its predictions are read.
        pictures: folder for PNGs.
        palette: gives each set of features one colour on the whole page.
        identifiers: whether messages are shown that may name patients, lesions and files.

    Raises:
        ValueError: no row has a value.
    """
    rows, differences = _complete(results["rows"]), _complete(results.get("differences"))
    sections: list[Section] = []
    for (task, split), part in rows.groupby(["task", "split"], sort=False):
        title = f"Results: {task}" + (f", {split}" if rows["split"].nunique() > 1 else "")
        own = differences
        if len(differences):
            own = differences[(differences["task"] == task) & (differences["split"] == split)]
        sections.append(_task(part, own, title, pictures / safe_name(f"{folder.name}_{len(sections)}"), palette))
    if is_own_file(file := folder / PREDICTIONS_FILE):
        predictions = pd.read_parquet(file)
        if "train" in results:  # the validation lesions chose when to stop
            predictions = (
                predictions[predictions["split"] == "test"].drop(columns="split").assign(**_fine_tuned(results))
            )
        sections += _curves(predictions, folder.name, pictures, palette)
    sections += _survival(results.get("survival") or [], folder.name, pictures)
    if not sections:
        raise ValueError(f"{folder / RESULTS_FILE}: no row has a value")
    named = identifiers == "show"
    if reasons := [
        item["features"] + (f": {item['reason']}" if named else "") for item in results.get("missing") or []
    ]:
        sections[0] = replace(sections[0], text=sections[0].text + "\n\nNot computed: " + "; ".join(reasons))
    fired = [finding for finding in results.get("leakage") or [] if finding.get("found", True)]
    if problems := [finding["message" if named else "check"] for finding in fired]:
        text = "Checks that fired; what they name may make results optimistic.\n\n" + "\n\n".join(problems)
        sections.append(Section(f"Leakage checks, {folder.name}", text))
    return sections


def _complete(rows: Sequence[Mapping[str, Any]] | None) -> pd.DataFrame:
    """Rows that have a value, with the columns that older or other tools leave out."""
    table = pd.DataFrame({"fraction": 1.0, "split": "", **row} for row in rows or ())
    return table.dropna(subset=["value", "low", "high"]) if len(table) else table


def results_lines(rows: pd.DataFrame, names: Sequence[str], digits: int) -> pd.DataFrame:
    """A line for each combination of these columns, and in it a column for each metric, with its interval."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows.to_dict("records"):
        key = tuple(row[name] for name in names)
        line = lines.setdefault(key, dict(zip(names, key, strict=True)) | dict.fromkeys(rows["metric"].unique(), "-"))
        if not pd.isna(row["value"]):
            line[row["metric"]] = f"{Estimate(row['value'], row['low'], row['high']):.{digits}f}"
    return pd.DataFrame(lines.values())


def _task(rows: pd.DataFrame, differences: pd.DataFrame, title: str, stem: Path, palette: Palette) -> Section:
    """A table and pictures of one task; those are called `STEM_....png`."""
    whole = rows[rows["fraction"] == rows["fraction"].max()]
    first, probes = whole["metric"].iloc[0], whole["probe"].unique()
    table = results_lines(whole, ["features", "probe"], 2)
    if {"num_train", "num_test"} <= set(whole):
        sizes = whole.groupby(["features", "probe"], sort=False)[["num_train", "num_test"]].agg(_range)
        table["trained / tested on"] = (sizes["num_train"] + " / " + sizes["num_test"]).to_list()
    own = whole[whole["metric"] == first].assign(name=lambda table: table["features"])
    panels = {f"{first}, {probe}": own[own["probe"] == probe] for probe in probes}
    figures = [interval_chart(panels, stem, palette, first)]
    if len(differences):
        named = differences.assign(name=differences["features"] + " minus " + differences["against"])
        named = named[(named["metric"] == first) & (named["fraction"] == whole["fraction"].iloc[0])]
        panels = {f"Difference in {first}, {probe}": part for probe, part in named.groupby("probe", sort=False)}
        if panels:
            figures.append(interval_chart(panels, stem, palette, first, differences=True))
    if rows["fraction"].nunique() > 1:
        figures.append(_fewer_labels(rows[(rows["metric"] == first) & (rows["probe"] == probes[0])], stem, palette))
    split = f" Split: {rows['split'].iloc[0]}." if rows["split"].iloc[0] else ""
    what = "Fine-tuned networks" if str(probes[0]).startswith("fine-tuned") else "Probes on frozen features"
    text = f"{what}, tested on held-out patients; in parentheses 95 % intervals, bootstrap over patients.{split}"
    return Section(title, text, table, figures)


def interval_chart(
    panels: Mapping[str, pd.DataFrame], stem: Path, palette: Palette, metric: str, *, differences: bool = False
) -> ReportFigure:
    """Values with their intervals, a panel a probe, a line a row, the first at the top."""
    max_rows = max(len(rows) for rows in panels.values())
    longest = max(len(name) for rows in panels.values() for name in rows["name"])
    # Names stand left of the axes, which have to stay wide enough for their title.
    width = max(4.0, 2.8 + 0.06 * longest)
    figure, all_axes = panels_of(len(panels), 3, (width, 0.9 + 0.32 * max_rows))
    kind, unit, caption = "intervals", metric, f"{metric} with 95 % intervals, bootstrap over patients"
    if differences:
        kind, unit = "differences", f"difference in {metric}"
        caption = "Paired differences on the same resamples; an interval right of zero is an advantage"
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        if differences:
            axes.axvline(0, color=MUTED, lw=0.8, ls=":")
        numbers = rows[["value", "low", "high"]].to_numpy(float)
        for line, (features, (value, low, high)) in enumerate(zip(rows["features"], numbers, strict=True)):
            color = palette[features][0]
            axes.plot([low, high], [line, line], color=color, lw=2.2, alpha=0.55, solid_capstyle="butt")
            axes.plot(value, line, "o", color=color, ms=5.5)
        tidy(axes, title, unit, "")
        axes.set(ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axes.set_yticklabels(rows["name"], fontsize=8, color=INK)
        axes.margins(x=0.08)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return ReportFigure(save_chart(figure, stem.with_name(f"{stem.name}_{kind}.png")), caption)


def _fewer_labels(rows: pd.DataFrame, stem: Path, palette: Palette) -> ReportFigure:
    """What a probe reaches with a part of the labels."""
    metric, probe = rows[["metric", "probe"]].iloc[0]
    figure, (axes,) = panels_of(1, 1, (5.4, 4.0))
    for features, part in rows.sort_values("fraction").groupby("features", sort=False):
        color, marker = palette[str(features)]
        axes.fill_between(100 * part["fraction"], part["low"], part["high"], color=color, alpha=0.12, lw=0)
        axes.plot(100 * part["fraction"], part["value"], color=color, marker=marker, ms=5, lw=1.6, label=str(features))
    ticks = sorted(100 * rows["fraction"].unique())
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    tidy(axes, "Fewer labels", "labels of the training set", metric)
    picture = save_chart(figure, stem.with_name(f"{stem.name}_fractions.png"), legend_columns=2)
    return ReportFigure(picture, f"{metric} with a part of the labels, {probe}")


def _range(values: pd.Series[Any]) -> str:
    """One number, or the range over folds."""
    low, high = round(float(values.min())), round(float(values.max()))
    return str(low) if low == high else f"{low} to {high}"


def _curves(predictions: pd.DataFrame, name: str, pictures: Path, palette: Palette) -> list[Section]:
    """ROC and calibration of every probe on a label of two classes, of at most eight tables of features."""
    if "score" not in predictions or "event" in predictions:
        return []
    if "fraction" in predictions:
        predictions = predictions[predictions["fraction"] == predictions["fraction"].max()]
    figures: list[ReportFigure] = []
    several_splits = "split" in predictions and predictions["split"].nunique() > 1
    for key, part in predictions.groupby(["split", "probe"] if several_splits else ["probe"], sort=False):
        judged = part.dropna(subset=["label", "score"])
        classes = sorted(judged["label"].unique())
        if len(classes) != 2:
            continue
        (roc, (roc_axes,)), (calibrated, (axes,)) = (panels_of(1, 1, (4.6, height)) for height in (4.4, 4.2))
        for square in (roc_axes, axes):
            square.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
            square.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        are_probabilities = judged["score"].between(0, 1).all()
        for features, one in list(judged.groupby("features", sort=False))[: len(COLORS)]:
            labels, scores = (one["label"] == classes[1]).to_numpy(int), one["score"].to_numpy(float)
            color, marker = palette[str(features)]
            roc_axes.plot(*_mean_roc(labels, scores, one["fold"].to_numpy()), color=color, lw=1.6, label=str(features))
            if are_probabilities:
                found = calibration(labels, scores)
                errors = (found.observed - found.low, found.high - found.observed)
                axes.errorbar(found.predicted, found.observed, errors, color=color, lw=0.9, alpha=0.4, fmt="none")
                label = f"{features} (error {found.error:.2f}, Brier {found.brier:.2f})"
                axes.plot(found.predicted, found.observed, color=color, marker=marker, ms=5, lw=1.6, label=label)
        title, stem = ", ".join(map(str, key)), safe_name(f"{name}_{len(figures)}")
        tidy(roc_axes, f"ROC, {title}", "false positive rate", "true positive rate")
        picture = save_chart(roc, pictures / f"{stem}_roc.png", legend_columns=2)
        figures.append(ReportFigure(picture, f"ROC curves, {title}; of several folds the mean"))
        if are_probabilities:
            tidy(axes, f"Calibration, {title}", "predicted probability", "observed share")
            picture = save_chart(calibrated, pictures / f"{stem}_calibration.png", legend_columns=1)
            caption = f"Calibration, {title}: bins of equal size with 95 % intervals; dotted: perfect"
            figures.append(ReportFigure(picture, caption))
    return [Section(f"ROC and calibration: {name}", _HELD_OUT, figures=figures)] if figures else []


def _mean_roc(labels: Array, scores: Array, folds: Array) -> tuple[Array, Array]:
    """False and true positive rates: the ROC curve of each fold, averaged at equal false positive rates.

    Scores of two folds come from two models and share no scale, so they are not put into one curve. Folds without one
    of the classes have no curve.
    """
    grid, curves = np.linspace(0, 1, 201), []
    for fold in np.unique(folds):
        own = folds == fold
        if len(np.unique(labels[own])) == 2:
            false_positives, true_positives, _ = roc_curve(labels[own], scores[own])
            curves.append(np.interp(grid, false_positives, true_positives))
    if not curves:
        raise ValueError("no fold holds both classes: there is no ROC curve")
    return np.r_[0, grid], np.r_[0, np.mean(curves, axis=0)]


def _survival(curves: Sequence[Mapping[str, Any]], name: str, pictures: Path) -> list[Section]:
    """Kaplan-Meier curves of the halves by predicted risk."""
    figures = []
    largest = max((item.get("fraction", 1.0) for item in curves), default=1.0)
    for number, item in enumerate(item for item in curves if item.get("fraction", 1.0) == largest):
        figure, (axes,) = panels_of(1, 1, (4.6, 3.9))
        for color, half in zip(COLORS, item["halves"], strict=False):
            label = f"{half['name']} (n = {half['num']}, {half['num_events']} events)"
            axes.step(half["times"], half["survival"], where="post", color=color, lw=1.6, label=label)
        axes.set(ylim=(0, 1.03))
        axes.set_xlim(left=0)
        title, p = f"{item['features']}, {item['probe']}", item["log_rank_p"]
        tidy(axes, title, "time", "share without the event")
        picture = save_chart(figure, pictures / f"{safe_name(name)}_survival_{number}.png", legend_columns=1)
        test = "log-rank test without a value" if p is None else f"log-rank p = {p:.2g}"
        figures.append(ReportFigure(picture, f"Kaplan-Meier curves above and below the median risk, {title}; {test}"))
    return [Section(f"Survival: {name}", _HELD_OUT, figures=figures)] if figures else []
