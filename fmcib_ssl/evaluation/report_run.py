"""What the report says of a training run, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fmcib_ssl.evaluation.figures import read_metrics, training_curves
from fmcib_ssl.evaluation.report import ReportFigure, Section, is_own_file
from fmcib_ssl.io import Identifiers, read_yaml, without_names

#: What `fmcib_ssl.training.collapse_monitor` logs, and what is to be said of it.
SIGNALS = {
    "signals/collapsed": "The embeddings collapsed",
    "signals/negatives_solved": "The negatives were solved: the loss had next to nothing left to teach",
}
#: Settings that are shown; `config.yaml` has them all.
_SHOWN = (
    "method", "loss", "encoder", "head", "finetune", "augment", "optimizer", "schedule", "hardware", "trainer", "data",
)  # fmt: skip
#: Settings of pretraining, which every configuration has, and a fine-tuning does not use.
_PRETRAINING = ("method", "loss", "head")


def read_config(run: Path) -> dict[str, Any]:
    """The run's settings; empty where there are none."""
    file = run / "config.yaml"
    config = read_yaml(file) if is_own_file(file) else None
    return config if isinstance(config, dict) else {}


def learning_section(run: Path) -> Section | None:
    """What the callbacks saw while the run went on: warnings, and the online probe before and after."""
    file = run / "metrics.csv"
    if not is_own_file(file):
        return None
    metrics = read_metrics(file)
    text = []
    for column, message in SIGNALS.items():
        if column in metrics and (found := metrics[metrics[column] == 1]).size:
            text.append(
                f"{message} (first at step {int(found['step'].iloc[0])}). docs/while_training.md says what to try."
            )
    watched = [column for column in SIGNALS if column in metrics]
    if watched and not text:
        text.append("No sign of a collapse, and the negatives were not solved.")
    rows = []
    for column, name in (
        ("online/linear_auc", "AUC of the linear probe"),
        ("online/knn_auc", "AUC of the nearest neighbours' vote"),
        ("online/rank", "effective rank of the features"),
        ("train/rank", "effective rank of the embeddings"),
        ("train/lesion_cosine", "cosine of two random lesions"),
        ("train/negative_share", "share of the softmax on negatives"),
        ("train/loss", "loss"),
    ):
        values = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
        if len(values) > 1:
            few = max(1, len(values) // 20) if column.startswith("train/") else 1
            rows.append({"": name, "at first": float(values[:few].mean()), "at last": float(values[-few:].mean())})
    if not text and not rows:
        return None
    probed = any(str(row[""]).startswith("AUC") for row in rows)
    note = "Probes here are of held-out lesions during training, to compare the run with itself." if probed else ""
    return Section("Did it learn?", "\n\n".join([*text, note]), rows)


def training_section(run: Path, pictures: Path) -> Section | None:
    """The curves, over all restarts; of a fine-tuning those of each fold."""
    caption = "By step; strong lines are running means."
    files = [run / "metrics.csv", *sorted(run.glob("*/metrics.csv"))]
    figures = []
    for file in filter(is_own_file, files):
        own = file.parent == run
        picture = training_curves(file, pictures / ("curves.png" if own else f"curves_{file.parent.name}.png"))
        said = f"{caption} docs/training.md says what is good and bad." if own else f"{file.parent.name}. {caption}"
        figures.append(ReportFigure(picture, said, wide=own))
    return Section("Training", figures=figures) if figures else None


def contact_section(run: Path, identifiers: Identifiers = "show") -> Section | None:
    """What went into the encoder; the picture names scans."""
    sheet = run / "contact_sheet.png"
    if sheet.is_symlink():
        return Section("What the encoder saw", f"{sheet.name} is a link, which is not followed.")
    if not sheet.is_file():
        return None
    if identifiers == "hash":
        return Section("What the encoder saw", f"{sheet.name} of the run is not shown: the names of scans stand on it.")
    caption = "Lesions, their two views, and those of the negatives mined for them, before the first step"
    return Section("What the encoder saw", figures=[ReportFigure(sheet, caption, wide=True)])


def provenance_section(run: Path, identifiers: Identifiers = "show") -> Section | None:
    """Settings, versions and machine, enough to do it again; without names also without the command and paths."""
    config = read_config(run)
    if identifiers == "hash":
        config = without_names(config)
    unused = _PRETRAINING if config.get("finetune") else ()
    rows = [
        {"": name, "value": _one_line(config[name])}
        for name in ("name", "seed", *_SHOWN)
        if config.get(name) is not None and name not in unused
    ]
    file = run / "environment.json"
    if is_own_file(file):
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        git = found.get("git") or {}
        versions = {"python": found.get("python"), **(found.get("packages") or {})}
        rows += [
            {"": "command", "value": " ".join(map(str, found.get("command") or []))},
            {
                "": "commit",
                "value": f"{git.get('commit') or 'unknown'}{' with changes' if git.get('uncommitted') else ''}",
            },
            {"": "versions", "value": ", ".join(f"{name} {version}" for name, version in versions.items() if version)},
            {"": "machine", "value": ", ".join([str(found.get("platform")), *(found.get("gpus") or [])])},
        ]
        if identifiers == "hash":
            rows = [row for row in rows if row[""] != "command"]
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
