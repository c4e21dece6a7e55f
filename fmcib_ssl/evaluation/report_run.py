"""What the report says of a training run, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fmcib_ssl.evaluation.figures import read_metrics, training_curves
from fmcib_ssl.evaluation.report import ReportFigure, Section
from fmcib_ssl.safety import read_yaml

#: What `fmcib_ssl.training.learning_signals` logs, and what is to be said of it.
SIGNALS = {
    "signals/collapsed": "The embeddings collapsed",
    "signals/negatives_solved": "The negatives were solved: the loss had next to nothing left to teach",
}
#: Settings that are shown; `config.yaml` has them all.
_SHOWN = ("method", "loss", "encoder", "head", "augment", "optimizer", "schedule", "hardware", "trainer", "data")


def read_config(run: Path) -> dict[str, Any]:
    """The run's settings; empty where there are none."""
    file = run / "config.yaml"
    return read_yaml(file) or {} if file.is_file() else {}


def learning_section(run: Path) -> Section | None:
    """What the callbacks saw while the run went on: warnings, and the online probe before and after."""
    file = run / "metrics.csv"
    if not file.is_file():
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
    note = "Probes here are of held-out lesions during training, to compare the run with itself." if watched else ""
    return Section("Did it learn?", "\n\n".join([*text, note]), rows)


def training_section(run: Path, pictures: Path) -> Section | None:
    """The curves, over all restarts."""
    file = run / "metrics.csv"
    if not file.is_file():
        return None
    picture = training_curves(file, pictures / "curves.png")
    caption = "By step; strong lines are running means. docs/training.md says what is good and bad."
    return Section("Training", figures=[ReportFigure(picture, caption, wide=True)])


def contact_section(run: Path) -> Section | None:
    """What went into the encoder."""
    sheet = run / "contact_sheet.png"
    if not sheet.is_file():
        return None
    caption = "Lesions, their two views, and those of the negatives mined for them, before the first step"
    return Section("What the encoder saw", figures=[ReportFigure(sheet, caption, wide=True)])


def provenance_section(run: Path) -> Section | None:
    """Settings, versions and machine, enough to do it again."""
    config = read_config(run)
    rows = [
        {"": name, "value": _one_line(config[name])}
        for name in ("name", "seed", *_SHOWN)
        if config.get(name) is not None
    ]
    file = run / "environment.json"
    if file.is_file():
        found = json.loads(file.read_text())
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
    return Section("How it was made", table=rows) if rows else None


def _one_line(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    target = str(value.get("_target_", "")).rpartition(".")[2]
    shown = ", ".join(f"{key} {v}" for key, v in value.items() if key != "_target_" and v is not None)
    return ": ".join(part for part in (target, shown) if part)
