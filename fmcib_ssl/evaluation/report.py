"""One page that says what was learned: a self-contained HTML file, and its tables for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

Table = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class ReportFigure:
    """A picture on the page.

    Attributes:
        path: of a PNG; its bytes go into the page.
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
    """

    title: str
    text: str = ""
    table: Table = ()
    figures: Sequence[ReportFigure] = ()


def write_report(path: Path | str, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one HTML page that holds all it shows: it opens offline and can be mailed. A long one begins with contents.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        sections: from top to bottom.
        subtitle: under the title, such as the run's name and date.

    Raises:
        FileNotFoundError: a figure is not there.
        ValueError: the rows of a table have different columns.
    """
    environment = Environment(
        loader=PackageLoader("fmcib_ssl.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [
        {
            "title": section.title,
            "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
            "columns": _columns(section.table),
            "rows": [[_cell(value) for value in row.values()] for row in section.table],
            "figures": [
                {
                    "caption": figure.caption,
                    "wide": figure.wide,
                    "png": base64.b64encode(figure.path.read_bytes()).decode(),
                }
                for figure in section.figures
            ],
        }
        for section in sections
    ]
    page = environment.get_template("report.html").render(title=title, subtitle=subtitle, sections=parts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


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
