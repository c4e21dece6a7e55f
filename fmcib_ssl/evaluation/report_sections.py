"""What the report says of a run and of an evaluation, from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fmcib_ssl.evaluation import charts
from fmcib_ssl.evaluation.charts import Palette
from fmcib_ssl.evaluation.metrics import Estimate, calibration
from fmcib_ssl.io import Identifiers, parse_json, read_yaml, without_names

Table = Sequence[Mapping[str, object]]

#: What `scripts/evaluate.py` and a fine-tuning leave in their folders.
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.parquet"
#: What `fmcib_ssl.training.collapse_monitor` logs, and what is to be said of it.
_SIGNALS = {
    "signals/collapsed": "The embeddings collapsed",
    "signals/negatives_solved": "The negatives were solved: the loss had next to nothing left to teach",
}
_LEARNING = {
    "online/linear_auc": "AUC of the linear probe",
    "online/knn_auc": "AUC of the nearest neighbours' vote",
    "online/rank": "effective rank of the features",
    "train/rank": "effective rank of the embeddings",
    "train/lesion_cosine": "cosine of two random lesions",
    "train/negative_share": "share of the softmax on negatives",
    "train/loss": "loss",
}
#: Settings that are shown; `config.yaml` has them all.
_SHOWN = (
    "method", "loss", "encoder", "head", "finetune", "augment", "optimizer", "schedule", "hardware", "trainer", "data",
)  # fmt: skip
#: Settings of pretraining, which every configuration has, and a fine-tuning does not use.
_PRETRAINING = ("method", "loss", "head")


@dataclass(frozen=True)
class ReportFigure:
    """A picture on the page.

    Attributes:
        path: of a PNG; its bytes go into the page, or those of an SVG beside it that is not large.
        caption: what it shows; also read out where the picture cannot be seen.
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
        table: rows, all with the same columns.
        figures: below the table.
        points: for `map.js`: lesions as points that show their patch when they are pointed at; above the figures.
    """

    title: str
    text: str = ""
    table: Table = ()
    figures: Sequence[ReportFigure] = ()
    points: Mapping[str, Any] | None = None


def is_own_file(path: Path) -> bool:
    """Whether a file exists and is no link: a folder that came from elsewhere may link to any file of this machine."""
    return path.is_file() and not path.is_symlink()


def safe_name(name: str) -> str:
    """Part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def read_config(run: Path) -> dict[str, Any]:
    """The run's settings; empty where there are none."""
    file = run / "config.yaml"
    config = read_yaml(file) if is_own_file(file) else None
    return config if isinstance(config, dict) else {}


def learning_section(run: Path) -> Section | None:
    """What the callbacks saw during the run: warnings, and the online probe before and after."""
    file = run / "metrics.csv"
    if not is_own_file(file):
        return None
    metrics = charts.read_metrics(file)
    text = []
    watched = [column for column in _SIGNALS if column in metrics]
    for column in watched:
        if (fired := metrics[metrics[column] == 1]).size:
            first = int(fired["step"].iloc[0])
            text.append(f"{_SIGNALS[column]} (first at step {first}). docs/while_training.md says what to try.")
    if watched and not text:
        text.append("No sign of a collapse, and the negatives were not solved.")
    rows: list[dict[str, Any]] = []
    for column, name in _LEARNING.items():
        values = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
        if len(values) > 1:
            few = max(1, len(values) // 20) if column.startswith("train/") else 1
            rows.append({"": name, "at first": float(values[:few].mean()), "at last": float(values[-few:].mean())})
    if not text and not rows:
        return None
    if any(row[""].startswith("AUC") for row in rows):
        text.append("Probes here are of held-out lesions during training, to compare the run with itself.")
    return Section("Did it learn?", "\n\n".join(text), rows)


def training_section(run: Path, pictures: Path) -> Section | None:
    """The curves, over all restarts; of a fine-tuning those of each fold."""
    caption, figures = "By step; strong lines are running means.", []
    for file in filter(is_own_file, (run / "metrics.csv", *sorted(run.glob("*/metrics.csv")))):
        own = file.parent == run
        picture = charts.training_curves(file, pictures / ("curves.png" if own else f"curves_{file.parent.name}.png"))
        text = f"{caption} docs/training.md says what is good and bad." if own else f"{file.parent.name}. {caption}"
        figures.append(ReportFigure(picture, text, wide=own))
    return Section("Training", figures=figures) if figures else None


def contact_section(run: Path, identifiers: Identifiers = "show") -> Section | None:
    """What went into the encoder; the picture names scans."""
    sheet, title = run / "contact_sheet.png", "What the encoder saw"
    if sheet.is_symlink():
        return Section(title, f"{sheet.name} is a link, which is not followed.")
    if not sheet.is_file():
        return None
    if identifiers == "hash":
        return Section(title, f"{sheet.name} of the run is not shown: the names of scans stand on it.")
    caption = "Lesions, their two views, and those of the negatives mined for them, before the first step"
    return Section(title, figures=[ReportFigure(sheet, caption, wide=True)])


def provenance_section(run: Path, identifiers: Identifiers = "show") -> Section | None:
    """Settings, versions and machine, enough to do it again; without names also without the command and paths."""
    config = read_config(run)
    if identifiers == "hash":
        config = without_names(config)
    unused = _PRETRAINING if config.get("finetune") else ()
    values = {
        name: _one_line(config[name])
        for name in ("name", "seed", *_SHOWN)
        if config.get(name) is not None and name not in unused
    }
    file = run / "environment.json"
    if is_own_file(file):
        try:
            environment = parse_json(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        git = environment.get("git") or {}
        packages = {"python": environment.get("python"), **(environment.get("packages") or {})}
        if identifiers != "hash":
            values["command"] = " ".join(map(str, environment.get("command") or []))
        values["commit"] = f"{git.get('commit') or 'unknown'}{' with changes' if git.get('uncommitted') else ''}"
        values["versions"] = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        values["machine"] = ", ".join([str(environment.get("platform")), *(environment.get("gpus") or [])])
    rows = [{"": name, "value": value} for name, value in values.items()]
    return Section("How it was made", table=rows) if rows else None


def _one_line(value: object) -> str:
    if isinstance(value, list):
        return " ".join(f"({_one_line(item)})" if isinstance(item, list | Mapping) else str(item) for item in value)
    if not isinstance(value, Mapping):
        return str(value)
    target = str(value.get("_target_", "")).rpartition(".")[2]
    shown = ", ".join(
        f"{key} ({_one_line(v)})" if isinstance(v, Mapping) else f"{key} {_one_line(v)}"
        for key, v in value.items()
        if key != "_target_" and v not in (None, [], {})
    )
    return ": ".join(part for part in (target, shown) if part)


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
    differences = _complete(pd.DataFrame(results.get("differences") or []))
    if not len(differences):
        return ""
    sentences = []
    first = differences["metric"] == results["rows"][0]["metric"]
    whole = differences["fraction"] == differences["fraction"].max()
    for row in differences[first & whole].to_dict("records"):
        if row["against"] not in untrained and not str(row["against"]).startswith("random weights"):
            continue
        verdict = "No difference from random weights can be shown"
        if row["low"] > 0 or row["high"] < 0:
            verdict = "Pretraining helped" if row["low"] > 0 else "Pretraining did harm"
        where = f", {row['split']}" if differences["split"].nunique() > 1 else ""
        sentences.append(
            f"{verdict}: {row['value']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}) {row['metric']} for "
            f"{row['task']} ({row['features']}, {row['probe']}{where})."
        )
    return " ".join(sentences)


def result_sections(
    results: Mapping[str, Any], folder: Path, pictures: Path, palette: Palette, identifiers: Identifiers = "show"
) -> list[Section]:
    """Tables with intervals, differences, ROC and calibration curves.

    Args:
        results: what `read_results` gives of the folder.
        folder: of an evaluation, or of a fine-tuning.
        pictures: folder for PNGs.
        palette: colours of the features.
        identifiers: whether messages are shown that may name patients, lesions and files.

    Raises:
        ValueError: no row has a value.
    """
    rows, differences = (_complete(pd.DataFrame(results.get(name) or [])) for name in ("rows", "differences"))
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


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that have a value, with the columns that older or other tools leave out."""
    if not len(table):
        return table
    absent: dict[str, Any] = {"fraction": 1.0, "split": ""}
    table = table.assign(**{column: value for column, value in absent.items() if column not in table})
    return table.dropna(subset=["value", "low", "high"])


def _task(rows: pd.DataFrame, differences: pd.DataFrame, title: str, stem: Path, palette: Palette) -> Section:
    """A table and pictures of one task; those are called `STEM_....png`."""
    largest = rows["fraction"].max()
    whole = rows[rows["fraction"] == largest]
    metrics = list(whole["metric"].unique())
    first, probes = metrics[0], whole["probe"].unique()
    table: list[dict[str, object]] = []
    for (features, probe), part in whole.groupby(["features", "probe"], sort=False):
        estimates = {row["metric"]: Estimate(row["value"], row["low"], row["high"]) for row in part.to_dict("records")}
        line = {"features": features, "probe": probe, **dict.fromkeys(metrics, "-"), **estimates}
        if {"num_train", "num_test"} <= set(part):
            line["trained / tested on"] = f"{_range(part['num_train'])} / {_range(part['num_test'])}"
        table.append(line)
    own = whole[whole["metric"] == first].assign(name=lambda table: table["features"])
    panels = {f"{first}, {probe}": own[own["probe"] == probe] for probe in probes}
    picture = charts.interval_plot(panels, stem.with_name(f"{stem.name}_intervals.png"), palette, first)
    figures = [ReportFigure(picture, f"{first} with 95 % intervals, bootstrap over patients")]
    if len(differences):
        differences = differences[(differences["metric"] == first) & (differences["fraction"] == largest)]
        named = differences.assign(name=differences["features"] + " less " + differences["against"])
        panels = {f"Difference in {first}, {probe}": part for probe, part in named.groupby("probe", sort=False)}
        if panels:
            file = stem.with_name(f"{stem.name}_differences.png")
            picture = charts.interval_plot(panels, file, palette, f"difference in {first}", zero=True)
            caption = "Paired differences on the same resamples; an interval right of zero is an advantage"
            figures.append(ReportFigure(picture, caption))
    if rows["fraction"].nunique() > 1:
        one = rows[(rows["metric"] == first) & (rows["probe"] == probes[0])].rename(columns={"features": "name"})
        picture = charts.label_fractions(one, stem.with_name(f"{stem.name}_fractions.png"), palette, first)
        figures.append(ReportFigure(picture, f"{first} with a part of the labels, {probes[0]}"))
    split = f" Split: {rows['split'].iloc[0]}." if rows["split"].iloc[0] else ""
    what = "Fine-tuned networks" if str(probes[0]).startswith("fine-tuned") else "Probes on frozen features"
    text = f"{what}, tested on patients that were held out. In brackets 95 % intervals, bootstrap over patients.{split}"
    return Section(title, text, table, figures)


def _range(values: pd.Series[Any]) -> str:
    """One number, or the range over folds."""
    low, high = round(float(values.min())), round(float(values.max()))
    return str(low) if low == high else f"{low} to {high}"


def _curves(predictions: pd.DataFrame, name: str, pictures: Path, palette: Palette) -> list[Section]:
    """ROC and calibration of every probe on a label of two classes."""
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
        curves, calibrated = {}, {}
        for features, one in list(judged.groupby("features", sort=False))[: len(charts.COLORS)]:
            labels, scores = (one["label"] == classes[1]).to_numpy(int), one["score"].to_numpy(float)
            curves[str(features)] = charts.mean_roc(labels, scores, one["fold"].to_numpy())
            if scores.min() >= 0 and scores.max() <= 1:
                calibrated[str(features)] = calibration(labels, scores)
        title, stem = ", ".join(map(str, key)), safe_name(f"{name}_{len(figures)}")
        roc = charts.mean_roc_curves(curves, pictures / f"{stem}_roc.png", palette, f"ROC, {title}")
        figures.append(ReportFigure(roc, f"ROC curves, {title}; of several folds the mean"))
        if calibrated:
            file = pictures / f"{stem}_calibration.png"
            picture = charts.calibration_curves(calibrated, file, palette, f"Calibration, {title}")
            caption = f"Calibration, {title}: bins of equal size with 95 % intervals; dotted: perfect"
            figures.append(ReportFigure(picture, caption))
    text = "Of lesions of patients that were held out."
    return [Section(f"ROC and calibration: {name}", text, figures=figures)] if figures else []


def _survival(halves: list[dict[str, Any]], name: str, pictures: Path) -> list[Section]:
    """Kaplan-Meier curves of the halves by predicted risk."""
    figures = []
    largest = max((item.get("fraction", 1.0) for item in halves), default=1.0)
    for number, item in enumerate(item for item in halves if item.get("fraction", 1.0) == largest):
        title, p = f"{item['features']}, {item['probe']}", item["log_rank_p"]
        picture = charts.survival_curves(item["halves"], pictures / f"{safe_name(name)}_survival_{number}.png", title)
        test = "log-rank test without a value" if p is None else f"log-rank p = {p:.2g}"
        figures.append(ReportFigure(picture, f"Kaplan-Meier curves above and below the median risk, {title}; {test}"))
    text = "Of lesions of patients that were held out."
    return [Section(f"Survival: {name}", text, figures=figures)] if figures else []
