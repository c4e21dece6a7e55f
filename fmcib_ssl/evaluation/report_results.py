"""What the report says of an evaluation, from the folder that `scripts/evaluate.py` wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from fmcib_ssl.evaluation.figures import COLORS, Palette
from fmcib_ssl.evaluation.metrics import Estimate, calibration
from fmcib_ssl.evaluation.probe_figures import (
    calibration_curves,
    interval_plot,
    label_fractions,
    mean_roc,
    mean_roc_curves,
    survival_curves,
)
from fmcib_ssl.evaluation.report import ReportFigure, Section, is_own_file
from fmcib_ssl.io import Identifiers

#: What `scripts/evaluate.py` and a fine-tuning leave in their folders.
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.parquet"


def read_results(folder: Path) -> dict[str, Any]:
    """What an evaluation of frozen features found, or a fine-tuning, whose rows are given the names of the others.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged, or lack a column.
    """
    file = folder / RESULTS_FILE
    if not is_own_file(file):
        raise FileNotFoundError(f"{folder} has no {RESULTS_FILE}: scripts/evaluate.py output={folder} makes it")
    try:
        found = json.loads(file.read_text())
        rows = found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if "train" in found:
        about = {"features": _start(found), "probe": f"fine-tuned, {found['train']}", "task": found["label"]}
        found["rows"] = rows = [{**about, **row} for row in rows]
    needed = {"features", "task", "probe", "metric", "value", "low", "high"}
    if not rows or (missing := needed.difference(*rows)):
        raise ValueError(f"{file}: its rows have no {', '.join(sorted(missing))}" if rows else f"{file} has no rows")
    return dict(found)


def _start(found: dict[str, Any]) -> str:
    """What a fine-tuning began with."""
    return "random weights" if found.get("weights") is None else "pretrained weights"


def answer(found: dict[str, Any]) -> str:
    """Whether pretraining helped, in a sentence; empty where nothing was compared with random weights."""
    provenances = found.get("provenance", {}).get("features") or {}
    untrained = {name for name, provenance in provenances.items() if (provenance or {}).get("kind") == "random_weights"}
    sentences = []
    differences = _complete(pd.DataFrame(found.get("differences") or []))
    if not len(differences):
        return ""
    first = differences["metric"] == found["rows"][0]["metric"]
    whole = differences["fraction"] == differences["fraction"].max()
    for row in differences[first & whole].to_dict("records"):
        if row["against"] in untrained or str(row["against"]).startswith("random weights"):
            by = f"{row['value']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
            if row["low"] > 0:
                verdict = f"Pretraining helped: {by}"
            elif row["high"] < 0:
                verdict = f"Pretraining did harm: {by}"
            else:
                verdict = f"No difference from random weights can be shown: {by}"
            where = f", {row['split']}" if differences["split"].nunique() > 1 else ""
            sentences.append(f"{verdict} {row['metric']} for {row['task']} ({row['features']}, {row['probe']}{where}).")
    return " ".join(sentences)


def result_sections(folder: Path, pictures: Path, palette: Palette, identifiers: Identifiers = "show") -> list[Section]:
    """Tables with intervals, differences, ROC and calibration curves.

    Args:
        folder: of an evaluation, or of a fine-tuning.
        pictures: folder for PNGs.
        palette: colours of the features.
        identifiers: whether messages are shown that may name patients, lesions and files.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: the results are damaged or lack a column.
    """
    found = read_results(folder)
    rows = pd.DataFrame(found["rows"])
    rows, differences = (_complete(table) for table in (rows, pd.DataFrame(found.get("differences") or [])))
    sections: list[Section] = []
    for (task, split), part in rows.groupby(["task", "split"], sort=False):
        title = f"Results: {task}" + (f", {split}" if rows["split"].nunique() > 1 else "")
        own = differences[(differences["task"] == task) & (differences["split"] == split)] if len(differences) else None
        stem = f"{folder.name}_{len(sections)}"
        sections.append(_task(part, own, title, stem=stem, pictures=pictures, palette=palette))
    file = folder / PREDICTIONS_FILE
    if is_own_file(file):
        predictions = pd.read_parquet(file)
        if "train" in found:  # the validation lesions chose when to stop
            predictions = predictions[predictions["split"] == "test"].drop(columns="split")
            predictions = predictions.assign(features=_start(found), probe=f"fine-tuned, {found['train']}")
        sections += _curves(predictions, folder.name, pictures, palette)
    sections += _survival(found.get("survival") or [], folder.name, pictures)
    if not sections:
        raise ValueError(f"{folder / RESULTS_FILE}: no row has a value")
    named = identifiers == "show"
    if reasons := [item["features"] + (f": {item['reason']}" if named else "") for item in found.get("missing") or []]:
        sections[0] = replace(sections[0], text=sections[0].text + "\n\nNot computed: " + "; ".join(reasons))
    fired = [finding for finding in found.get("leakage") or [] if finding.get("found", True)]
    if problems := [finding["message" if named else "check"] for finding in fired]:
        text = "Checks that fired; what they name may make results optimistic.\n\n" + "\n\n".join(problems)
        sections.append(Section(f"Leakage checks, {folder.name}", text))
    return sections


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a value, with the columns that older or other tools leave out."""
    if not len(table):
        return table
    absent: dict[str, Any] = {"fraction": 1.0, "split": ""}
    table = table.assign(**{column: value for column, value in absent.items() if column not in table})
    return table.dropna(subset=["value", "low", "high"])


def _task(
    rows: pd.DataFrame, differences: pd.DataFrame | None, title: str, *, stem: str, pictures: Path, palette: Palette
) -> Section:
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
    picture = interval_plot(panels, pictures / f"{_safe(stem)}_intervals.png", palette, first)
    figures = [ReportFigure(picture, f"{first} with 95 % intervals, bootstrap over patients")]
    if differences is not None:
        differences = differences[
            (differences["metric"] == first) & (differences["fraction"] == whole["fraction"].max())
        ]
    if differences is not None and len(differences):
        named = differences.assign(name=differences["features"] + " less " + differences["against"])
        unit = f"difference in {first}"
        panels = {f"{unit[0].upper()}{unit[1:]}, {probe}": part for probe, part in named.groupby("probe", sort=False)}
        file = pictures / f"{_safe(stem)}_differences.png"
        picture = interval_plot(panels, file, palette, unit, zero=True)
        caption = "Paired differences on the same resamples; an interval right of zero is an advantage"
        figures.append(ReportFigure(picture, caption))
    if rows["fraction"].nunique() > 1:
        probe = rows["probe"].iloc[0]
        one = rows[(rows["metric"] == first) & (rows["probe"] == probe)].rename(columns={"features": "name"})
        picture = label_fractions(one, pictures / f"{_safe(stem)}_fractions.png", palette, first)
        figures.append(ReportFigure(picture, f"{first} with a part of the labels, {probe}"))
    split = f" Split: {rows['split'].iloc[0]}." if rows["split"].iloc[0] else ""
    what = "Fine-tuned networks" if str(rows["probe"].iloc[0]).startswith("fine-tuned") else "Probes on frozen features"
    text = f"{what}, tested on patients that were held out. In brackets 95 % intervals, bootstrap over patients.{split}"
    return Section(title, text, table, figures)


def _curves(predictions: pd.DataFrame, name: str, pictures: Path, palette: Palette) -> list[Section]:
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
        roc = mean_roc_curves(curves, pictures / f"{stem}_roc.png", palette, f"ROC, {title}")
        figures.append(ReportFigure(roc, f"ROC curves, {title}; of several folds the mean"))
        if calibrated:
            file = pictures / f"{stem}_calibration.png"
            picture = calibration_curves(calibrated, file, palette, f"Calibration, {title}")
            caption = f"Calibration, {title}: bins of equal size with 95 % intervals; dotted: perfect"
            figures.append(ReportFigure(picture, caption))
    if not figures:
        return []
    return [Section(f"ROC and calibration: {name}", "Of lesions of patients that were held out.", figures=figures)]


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
        [Section(f"Survival: {name}", "Of lesions of patients that were held out.", figures=figures)] if figures else []
    )


def _estimate(row: dict[Any, Any]) -> Estimate:
    return Estimate(float(row["value"]), float(row["low"]), float(row["high"]))


def _whole(values: pd.Series[Any]) -> str:
    """One number, or the range over folds."""
    numbers = sorted({round(float(value)) for value in values})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
