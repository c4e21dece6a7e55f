"""One page that says what was learned: a self-contained HTML file, and its tables for the terminal."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

import fmcib_ssl
from fmcib_ssl.evaluation.charts import Palette
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.report_features import FeatureOptions, feature_sections
from fmcib_ssl.evaluation.report_sections import (
    RESULTS_FILE,
    Section,
    Table,
    answer,
    contact_section,
    is_own_file,
    learning_section,
    provenance_section,
    read_config,
    read_results,
    result_sections,
    training_section,
)
from fmcib_ssl.io import Identifiers, identifier, write_atomically

logger = logging.getLogger(__name__)

#: Curves of long runs are smaller as a PNG.
_MAX_SVG_BYTES = 400_000
#: Characters from which on a table becomes a list of its rows on a narrow screen.
_LONG_CELL = 40


def write_report(path: Path | str, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one HTML page that holds all it shows: it opens offline and can be mailed. A long one begins with contents.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        sections: from top to bottom.
        subtitle: under the title, such as the run's name and date.

    Raises:
        FileNotFoundError: a figure is missing.
        ValueError: the rows of a table have different columns, or a figure is a link or no PNG.
    """
    environment = Environment(
        loader=PackageLoader("fmcib_ssl.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # in the order given: the label's colours first
    parts = [_part(section) for section in sections]
    page = environment.get_template("report.html").render(title=title, subtitle=subtitle, sections=parts)
    write_atomically(Path(path), page)
    return Path(path)


def _part(section: Section) -> dict[str, Any]:
    """What the template takes."""
    rows = [[_cell(value) for value in row.values()] for row in section.table]
    return {
        "title": section.title,
        "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
        "columns": _columns(section.table),
        "rows": rows,
        "long": any(len(cell) >= _LONG_CELL for row in rows for cell in row),
        "points": section.points,
        "figures": [
            {"caption": figure.caption, "wide": figure.wide, "image": _data_address(figure.path)}
            for figure in section.figures
        ],
    }


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


def results_table(rows: Table) -> str:
    """Lay a table out for the terminal: columns aligned, a rule under the head, no trailing blanks.

    Floats get three digits after the point, everything else its `str`, so an `Estimate` shows its interval.

    Raises:
        ValueError: there are no rows, or they have different columns.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    cells = [_columns(rows), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _columns(rows: Table) -> list[str]:
    columns = list(rows[0]) if rows else []
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise ValueError(f"row {number} of the table has the columns {list(row)}, row 0 has {columns}")
    return columns


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def rejected_section(title: str, rejected: pd.DataFrame, identifiers: Identifiers) -> Section:
    """The first rows of a table that cannot be used; where scans are not named, without what was said of each.

    Args:
        title: of the section.
        rejected: row, image_path, value, reason, remedy.
        identifiers: whether paths are shown; values, reasons and remedies may name files, too.
    """
    text, shown = f"{len(rejected)} rows; all are in rejected.csv, the first 100 here.", rejected.head(100)
    if identifiers == "hash":
        text = f"{len(rejected)} rows; the reasons, which name files, are in rejected.csv. The first 100:"
        shown = shown[["row"]].assign(image_path=[identifier(path, identifiers) for path in shown["image_path"]])
    return Section(title, text, table=shown.to_dict("records"))  # type: ignore[arg-type]


def _learned(run: Path | None, evaluations: Sequence[Mapping[str, Any]]) -> Section | None:
    """The answer of the evaluations, then what the run saw."""
    section = None if run is None else learning_section(run)
    if answers := "\n\n".join(filter(None, map(answer, evaluations))):
        section = section or Section("Did it learn?")
        section = replace(section, text=f"{answers}\n\n{section.text}")
    return section


def report_all(
    out: Path | str,
    *,
    run: Path | str | None = None,
    features: Sequence[Path | str | FeatureTable] = (),
    results: Sequence[Path | str] = (),
    title: str | None = None,
    introduction: str = "",
    options: FeatureOptions | None = None,
) -> Path:
    """Write one self-contained page, and its pictures as PNGs into a folder beside it.

    Args:
        out: of the page, `NAME.html`; pictures go to `NAME_pictures/`.
        run: folder of a training run, pretraining or fine-tuning.
        features: tables that `scripts/embed.py` wrote, or as they are in memory.
        results: folders that `scripts/evaluate.py` or a fine-tuning wrote; that of `run` need not be named.
        title: of the page; by default the run's name.
        introduction: first words on the page; paragraphs parted by blank lines.
        options: what is shown of the features.

    Raises:
        ValueError: nothing to report on, or a table that cannot be drawn.
        FileNotFoundError: no such run, table or results.
    """
    out = Path(out)
    pictures = out.with_name(f"{out.stem}_pictures")
    folder = None if run is None else Path(run)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such run folder")
    options, palette = options or FeatureOptions(), Palette()
    folders = [Path(place) for place in results]
    if folder is not None and is_own_file(folder / RESULTS_FILE) and folder not in folders:
        folders.insert(0, folder)
    evaluations = [read_results(place) for place in folders]
    sections: list[Section | None] = [Section("About", introduction)] if introduction else []
    sections.append(_learned(folder, evaluations))
    for place, evaluation in zip(folders, evaluations, strict=True):
        logger.info("results of %s", place)
        sections += result_sections(evaluation, place, pictures / place.name, palette, options.identifiers)
    labels = [results.get("provenance", {}).get("arguments", {}).get("label") for results in evaluations]
    for given in features:
        table = given if isinstance(given, FeatureTable) else FeatureTable.read(given)
        logger.info("features %s: maps, neighbours, saliency", table.provenance.get("name"))
        evaluated = next((label for label in labels if label in table.lesions), None)
        own = replace(options, label=options.label or evaluated)
        # Two tables may have one name.
        sections += feature_sections(table, own, pictures / f"features_{len(sections)}")
    if folder is not None:
        sections += [
            training_section(folder, pictures),
            contact_section(folder, options.identifiers),
            provenance_section(folder, options.identifiers),
        ]
    shown = [section for section in sections if section is not None]
    if not shown:
        raise ValueError(
            "nothing to report on: give run=FOLDER with metrics.csv, features=TABLE.parquet or results=FOLDER"
        )
    name, whose = "Report", ""
    if folder is not None:
        name = f"Report of {read_config(folder).get('name') or folder.name}"
        whose = f"{folder.name if options.identifiers == 'hash' else folder}, "
    subtitle = f"{whose}fmcib_ssl {fmcib_ssl.__version__}, {datetime.now():%Y-%m-%d %H:%M}"
    return write_report(out, title or name, shown, subtitle)
