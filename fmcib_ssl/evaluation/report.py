"""One page that says what was learned: a self-contained HTML file.

What it says of a run's folder is here, of evaluations in `report_results`, of features in `report_features`.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import fmcib_ssl
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.figures import Palette, SheetLesion, lesion_sheet, read_metrics, training_curves
from fmcib_ssl.evaluation.report_features import FeatureOptions, feature_sections
from fmcib_ssl.evaluation.report_results import (
    RESULTS_FILE,
    ReportFigure,
    Section,
    answer,
    is_own_file,
    read_results,
    result_sections,
)
from fmcib_ssl.io import Identifiers, identifier, parse_json, read_yaml, without_names, write_atomically

logger = logging.getLogger(__name__)

#: Curves of long runs are smaller as a PNG.
_MAX_SVG_BYTES = 400_000
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
#: Settings that are shown; `config.yaml` has them all. Those of pretraining are not used by a fine-tuning.
_PRETRAINING = ("method", "loss", "head")
_SHOWN = (
    "name", "seed", *_PRETRAINING, "encoder", "finetune", "augment", "optimizer", "schedule", "hardware", "trainer",
    "data",
)  # fmt: skip


def write_report(path: Path | str, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one HTML page that holds all it shows: it opens offline and can be mailed. A long one begins with contents.

    Args:
        path: NAME.html; its folder is made.
        title: at the top, and of the browser's tab.
        sections: from top to bottom.
        subtitle: under the title, such as the run's name and date.

    Raises:
        FileNotFoundError: a figure is missing.
        ValueError: a figure is a link or no PNG.
    """
    environment = Environment(
        loader=PackageLoader("fmcib_ssl.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cells": _cells, "data_address": _data_address}
    environment.policies["json.dumps_kwargs"] = {}  # in the order given: the label's colours first
    page = environment.get_template("report.html").render(title=title, subtitle=subtitle, sections=sections)
    write_atomically(Path(path), page)
    return Path(path)


def _cells(table: pd.DataFrame) -> list[list[str]]:
    """Texts row by row: floats with three digits after the point, everything else as its `str`."""
    rows = table.itertuples(index=False, name=None)
    return [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row] for row in rows]


def _data_address(png: Path) -> str:
    if png.is_symlink():
        raise ValueError(f"{png} is a link, which is not followed: put the picture itself in its place")
    content, kind = png.read_bytes(), "png"
    if not content.startswith(b"\x89PNG"):
        raise ValueError(f"{png} is no PNG")
    svg = png.with_suffix(".svg")
    if is_own_file(svg) and svg.stat().st_size <= _MAX_SVG_BYTES:
        content, kind = svg.read_bytes(), "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def results_table(table: pd.DataFrame) -> str:
    """Lay a table out for the terminal: columns aligned, a rule under the head, no trailing blanks."""
    cells = [list(map(str, table)), *_cells(table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def write_lesion_page(
    picture: Path,
    title: str,
    subtitle: str,
    *,
    lesions: Sequence[SheetLesion],
    num_lesions: int,
    spacing_mm: float,
    rejected: pd.DataFrame,
    identifiers: Identifiers,
) -> Path:
    """Draw lesions with their points, and put them on a page beside it with the rows that are rejected.

    Args:
        picture: the PNG; the page is called the same, `.html`.
        title: at the top, and of the browser's tab.
        subtitle: under the title.
        lesions: on the picture, at least one.
        num_lesions: how many the table has.
        spacing_mm: edge of their voxels.
        rejected: row, image_path, value, reason, remedy of each row; the first 100 are shown.
        identifiers: whether paths are shown; values, reasons and remedies may name files, too.
    """
    figure = ReportFigure(lesion_sheet(lesions, picture, spacing_mm), "Planes through the annotated points", wide=True)
    note, shown = f"{len(rejected)} rows; all are in rejected.csv, the first 100 here.", rejected.head(100)
    if identifiers == "hash":
        note = f"{len(rejected)} rows; the reasons, which name files, are in rejected.csv. The first 100:"
        shown = shown[["row"]].assign(image_path=[identifier(path, identifiers) for path in shown["image_path"]])
    text = (
        f"{len(lesions)} of {num_lesions} lesions, spread over the table. A lesion that is not under the cross was "
        "annotated in another frame (coordinates=ras?) or in another scan."
    )
    points = Section("Are the points where they should be?", text, figures=[figure])
    return write_report(picture.with_suffix(".html"), title, [points, Section("Rejected rows", note, shown)], subtitle)


def report_all(
    out: Path | str,
    *,
    run: Path | str | None = None,
    features: Sequence[Path | str] = (),
    results: Sequence[Path | str] = (),
    title: str | None = None,
    introduction: str = "",
    options: FeatureOptions | None = None,
) -> Path:
    """Write one self-contained page, and its pictures as PNGs into a folder beside it.

    Args:
        out: `NAME.html`; pictures go to `NAME_pictures/`.
        run: folder of a training run, pretraining or fine-tuning.
        features: tables that `fmcib-ssl embed` wrote.
        results: folders that `fmcib-ssl evaluate` or a fine-tuning wrote; that of `run` need not be named.
        title: by default the run's name.
        introduction: first words on the page; paragraphs parted by blank lines.
        options: columns, numbers of lesions, window, and whether names are shown.

    Raises:
        ValueError: nothing to report on, or a table that cannot be drawn.
        FileNotFoundError: no such run, table or results.
    """
    out, options = Path(out), options or FeatureOptions()
    pictures, folders = out.with_name(f"{out.stem}_pictures"), [Path(folder) for folder in results]
    name, before, after, whose = "Report", [Section("About", introduction)] if introduction else [], [], ""
    if run is not None:
        run = Path(run)
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such run folder")
        if is_own_file(run / RESULTS_FILE) and run not in folders:
            folders.insert(0, run)
        after = _run_sections(run, pictures, options.identifiers)
        name = f"Report of {_read_config(run).get('name') or run.name}"
        whose = f"{run.name if options.identifiers == 'hash' else run}, "
    evaluations = [read_results(folder) for folder in folders]
    sections = [*before, *_learned(run, [answer(evaluation) for evaluation in evaluations])]
    palette = Palette()
    for folder, evaluation in zip(folders, evaluations, strict=True):
        logger.info("results of %s", folder)
        sections += result_sections(evaluation, folder, pictures / folder.name, palette, options.identifiers)
    labels = [evaluation.get("provenance", {}).get("arguments", {}).get("label") for evaluation in evaluations]
    for file in features:
        table = FeatureTable.read(file)
        logger.info("features %s: maps, neighbours, saliency", table.name)
        evaluated = next((label for label in labels if label in table.lesions), None)
        own = replace(options, label=options.label or evaluated)
        # Two tables may have one name.
        sections += feature_sections(table, own, pictures / f"features_{len(sections)}")
    sections += after
    if not sections:
        raise ValueError(
            "nothing to report on: give run=FOLDER with metrics.csv, features=TABLE.parquet or results=FOLDER"
        )
    subtitle = f"{whose}fmcib_ssl {fmcib_ssl.__version__}, {datetime.now():%Y-%m-%d %H:%M}"
    return write_report(out, title or name, sections, subtitle)


def _read_config(run: Path) -> dict[str, Any]:
    """The run's settings; empty where there are none."""
    file = run / "config.yaml"
    config = read_yaml(file) if is_own_file(file) else None
    return config if isinstance(config, dict) else {}


def _learned(run: Path | None, answers: Sequence[str]) -> list[Section]:
    """The answers of the evaluations, then what the callbacks saw: warnings, and the online probe before and after."""
    text = [answer for answer in answers if answer]
    rows: list[dict[str, Any]] = []
    if run is not None and is_own_file(run / "metrics.csv"):
        metrics = read_metrics(run / "metrics.csv")
        watched = [column for column in _SIGNALS if column in metrics]
        fired = [column for column in watched if (metrics[column] == 1).any()]
        for column in fired:
            first = int(metrics["step"][metrics[column] == 1].iloc[0])
            text.append(f"{_SIGNALS[column]} (first at step {first}). docs/while_training.md says what to try.")
        if watched and not fired:
            text.append("No sign of a collapse, and the negatives were not solved.")
        for column, name in _LEARNING.items():
            values = metrics[column].dropna() if column in metrics else pd.Series(dtype=float)
            if len(values) > 1:
                few = max(1, len(values) // 20) if column.startswith("train/") else 1
                rows.append({"": name, "first": float(values[:few].mean()), "last": float(values[-few:].mean())})
        if any(row[""].startswith("AUC") for row in rows):
            text.append("Probes here are of held-out lesions during training, to compare the run with itself.")
    return [Section("Did it learn?", "\n\n".join(text), pd.DataFrame(rows))] if text or rows else []


def _run_sections(run: Path, pictures: Path, identifiers: Identifiers) -> list[Section]:
    """Curves over all restarts, of a fine-tuning those of each fold; what went into the encoder; how it was made."""
    caption, figures, sections = "By step; strong lines are running means.", [], []
    for file in filter(is_own_file, (run / "metrics.csv", *sorted(run.glob("*/metrics.csv")))):
        own = file.parent == run
        picture = training_curves(file, pictures / ("curves.png" if own else f"curves_{file.parent.name}.png"))
        text = f"{caption} docs/training.md says what is good and bad." if own else f"{file.parent.name}. {caption}"
        figures.append(ReportFigure(picture, text, wide=own))
    if figures:
        sections.append(Section("Training", figures=figures))
    sheet, title = run / "contact_sheet.png", "What the encoder saw"
    if sheet.is_symlink():
        sections.append(Section(title, f"{sheet.name} is a link, which is not followed."))
    elif sheet.is_file() and identifiers == "hash":
        sections.append(Section(title, f"{sheet.name} of the run is not shown: the names of scans stand on it."))
    elif sheet.is_file():
        caption = "Lesions, their two views, and those of the negatives mined for them, before the first step"
        sections.append(Section(title, figures=[ReportFigure(sheet, caption, wide=True)]))
    if values := _provenance(run, identifiers):
        sections.append(Section("How it was made", table=pd.DataFrame(values.items(), columns=["", "value"])))
    return sections


def _provenance(run: Path, identifiers: Identifiers) -> dict[str, str]:
    """Settings, versions and machine, enough to do it again; without names also without the command and paths."""
    config = _read_config(run)
    if identifiers == "hash":
        config = without_names(config)
    unused = _PRETRAINING if config.get("finetune") else ()
    values = {name: config[name] for name in _SHOWN if config.get(name) is not None and name not in unused}
    one_line: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "width": 10**6}
    values = {name: yaml.safe_dump(value, **one_line).removesuffix("...\n").strip() for name, value in values.items()}
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
    return values
