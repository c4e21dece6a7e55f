"""What the report says of an evaluation, from the folder that `scripts/evaluate.py` wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from fmcib_ssl.evaluation.bootstrap import Estimate
from fmcib_ssl.evaluation.calibration import calibration
from fmcib_ssl.evaluation.figures import COLORS
from fmcib_ssl.evaluation.probe_figures import (
    calibration_curves,
    interval_plot,
    label_fractions,
    mean_roc,
    mean_roc_curves,
    survival_curves,
)
from fmcib_ssl.evaluation.report import ReportFigure, Section

#: What `scripts/evaluate.py` leaves in its folder.
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.parquet"


def result_sections(folder: Path, pictures: Path) -> list[Section]:
    """Tables with intervals, differences, ROC and calibration curves.

    Args:
        folder: of an evaluation.
        pictures: folder for PNGs.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: the results lack a column.
    """
    file = folder / RESULTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {RESULTS_FILE}: scripts/evaluate.py output={folder} makes it")
    found = json.loads(file.read_text())
    rows = pd.DataFrame(found["rows"])
    needed = {"features", "task", "probe", "metric", "value", "low", "high"}
    if missing := needed - set(rows):
        raise ValueError(f"{file}: its rows have no {', '.join(sorted(missing))}")
    rows, differences = (_complete(table) for table in (rows, pd.DataFrame(found.get("differences") or [])))
    sections: list[Section] = []
    for (task, split), part in rows.groupby(["task", "split"], sort=False):
        title = f"Results: {task}" + (f", {split}" if rows["split"].nunique() > 1 else "")
        own = differences[(differences["task"] == task) & (differences["split"] == split)] if len(differences) else None
        sections.append(_task(part, own, title, f"{folder.name}_{len(sections)}", pictures))
    predictions = folder / PREDICTIONS_FILE
    if predictions.is_file():
        sections += _curves(pd.read_parquet(predictions), folder.name, pictures)
    sections += _survival(found.get("survival") or [], folder.name, pictures)
    if reasons := [f"{item['features']}: {item['reason']}" for item in found.get("missing") or []]:
        sections[0] = replace(sections[0], text=sections[0].text + "\n\nNot computed: " + "; ".join(reasons))
    if problems := [finding["message"] for finding in found.get("leakage") or [] if finding.get("found", True)]:
        text = "Checks that fired; what they name may make results too good.\n\n" + "\n\n".join(problems)
        sections.append(Section(f"Leakage checks, {folder.name}", text))
    return sections


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a value, with the columns that older or other tools leave out."""
    if not len(table):
        return table
    absent: dict[str, Any] = {"fraction": 1.0, "split": ""}
    table = table.assign(**{column: value for column, value in absent.items() if column not in table})
    return table.dropna(subset=["value", "low", "high"])


def _task(rows: pd.DataFrame, differences: pd.DataFrame | None, title: str, stem: str, pictures: Path) -> Section:
    whole = rows[rows["fraction"] == rows["fraction"].max()]
    metrics = list(whole["metric"].unique())
    table: list[dict[str, object]] = []
    for (features, probe), part in whole.groupby(["features", "probe"], sort=False):
        by_metric = {row["metric"]: _estimate(row) for row in part.to_dict("records")}
        line = {"features": features, "probe": probe, **{metric: by_metric.get(metric, "-") for metric in metrics}}
        if {"num_train", "num_test"} <= set(part):
            line["trained / tested on"] = f"{_whole(part['num_train'])} / {_whole(part['num_test'])}"
        table.append(line)
    first = metrics[0]
    panels = {
        f"{first}, {probe}": part.rename(columns={"features": "name"})
        for probe, part in whole[whole["metric"] == first].groupby("probe", sort=False)
    }
    picture = interval_plot(panels, pictures / f"{_safe(stem)}_intervals.png")
    figures = [ReportFigure(picture, f"{first} with 95 % intervals, bootstrap over patients")]
    if differences is not None:
        differences = differences[
            (differences["metric"] == first) & (differences["fraction"] == whole["fraction"].max())
        ]
    if differences is not None and len(differences):
        named = differences.assign(name=differences["features"] + " less " + differences["against"])
        panels = {f"{first}, {probe}": part for probe, part in named.groupby("probe", sort=False)}
        picture = interval_plot(panels, pictures / f"{_safe(stem)}_differences.png", zero=True)
        caption = "Paired differences on the same resamples; an interval right of zero is an advantage"
        figures.append(ReportFigure(picture, caption))
    if rows["fraction"].nunique() > 1:
        probe = rows["probe"].iloc[0]
        one = rows[(rows["metric"] == first) & (rows["probe"] == probe)].rename(columns={"features": "name"})
        picture = label_fractions(one, pictures / f"{_safe(stem)}_fractions.png", first)
        figures.append(ReportFigure(picture, f"{first} with a part of the labels, {probe}"))
    split = f" Split: {rows['split'].iloc[0]}." if rows["split"].iloc[0] else ""
    text = f"Probes on frozen features. In brackets 95 % intervals, bootstrap over patients.{split}"
    return Section(title, text, table, figures)


def _curves(predictions: pd.DataFrame, name: str, pictures: Path) -> list[Section]:
    """ROC and calibration of every probe on a label of two classes."""
    if "score" not in predictions or "event" in predictions:
        return []
    if "fraction" in predictions:
        predictions = predictions[predictions["fraction"] == predictions["fraction"].max()]
    figures: list[ReportFigure] = []
    keys = [
        key for key in ("split", "probe") if key in predictions and (key == "probe" or predictions[key].nunique() > 1)
    ]
    for key, part in predictions.groupby(keys, sort=False):
        judged = part.dropna(subset=["label", "score"])
        classes = sorted(judged["label"].unique())
        if len(classes) != 2:
            continue
        curves, calibrated = {}, {}
        for features, one in list(judged.groupby("features", sort=False))[: len(COLORS)]:
            labels, scores = (one["label"] == classes[1]).to_numpy(int), one["score"].to_numpy(float)
            curves[str(features)] = mean_roc(labels, scores, one["fold"].to_numpy())
            if scores.min() >= 0 and scores.max() <= 1:
                calibrated[str(features)] = calibration(labels, scores)
        title, stem = ", ".join(map(str, key)), _safe(f"{name}_{len(figures)}")
        roc = mean_roc_curves(curves, pictures / f"{stem}_roc.png", f"ROC, {title}")
        figures.append(ReportFigure(roc, f"ROC curves, {title}; of several folds the mean"))
        if calibrated:
            picture = calibration_curves(calibrated, pictures / f"{stem}_calibration.png", f"Calibration, {title}")
            caption = f"Calibration, {title}: bins of equal size with 95 % intervals; dotted: perfect"
            figures.append(ReportFigure(picture, caption))
    if not figures:
        return []
    return [Section(f"ROC and calibration: {name}", "Of lesions that the probe was not fitted on.", figures=figures)]


def _survival(halves: list[dict[str, Any]], name: str, pictures: Path) -> list[Section]:
    """Kaplan-Meier curves of the halves by predicted risk."""
    figures = []
    largest = max((item.get("fraction", 1.0) for item in halves), default=1.0)
    for number, item in enumerate(item for item in halves if item.get("fraction", 1.0) == largest):
        title = f"{item['features']}, {item['probe']}"
        p = item["log_rank_p"]
        picture = survival_curves(item["halves"], pictures / f"{_safe(name)}_survival_{number}.png", title)
        told = "log-rank test without a value" if p is None else f"log-rank p = {p:.2g}"
        figures.append(ReportFigure(picture, f"Kaplan-Meier curves above and below the median risk, {title}; {told}"))
    return (
        [Section(f"Survival: {name}", "Of lesions that the probe was not fitted on.", figures=figures)]
        if figures
        else []
    )


def _estimate(row: dict[Any, Any]) -> Estimate:
    return Estimate(float(row["value"]), float(row["low"]), float(row["high"]))


def _whole(values: pd.Series[Any]) -> str:
    """One number, or the range over folds."""
    numbers = sorted({round(float(value)) for value in values})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
