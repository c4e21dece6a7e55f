"""One page that says what was learned: a self-contained HTML file, and its tables for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fmcib_ssl.io import write_atomically

Table = Sequence[Mapping[str, object]]
#: Curves of long runs are smaller as a PNG.
_MAX_SVG_BYTES = 400_000
#: Characters from which on a table becomes a list of its rows on a narrow screen.
_LONG_CELL = 40


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
class PointMap:
    """Lesions as points that show their patch when they are pointed at.

    Attributes:
        layouts: places of the points, `[[x, y], ...]`, under the layout's name.
        columns: under each column's name: `values` and `colors` of the points, and `legend`, names with colours.
        tiles: a JPEG with the patches side by side, `num_across` in a row; empty where they cannot be read.
        tile_of: place of each point's patch among the tiles, -1 for none.
        num_across: tiles in a row.
        tile_edge: of a tile, pixels.
    """

    layouts: Mapping[str, Sequence[Sequence[float]]]
    columns: Mapping[str, Mapping[str, object]]
    tiles: bytes
    tile_of: Sequence[int]
    num_across: int
    tile_edge: int

    def plain(self) -> dict[str, object]:
        """For the page's script."""
        return asdict(self) | {"tiles": base64.b64encode(self.tiles).decode()}


@dataclass(frozen=True)
class Section:
    """A part of the page; what is empty is left out.

    Attributes:
        title: its heading.
        text: paragraphs, parted by blank lines; plain text.
        table: rows, all with the same columns.
        figures: below the table.
        points: a map, above the figures.
    """

    title: str
    text: str = ""
    table: Table = ()
    figures: Sequence[ReportFigure] = ()
    points: PointMap | None = None


def write_report(path: Path | str, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Write one HTML page that holds all it shows: it opens offline and can be mailed. A long one begins with contents.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        sections: from top to bottom.
        subtitle: under the title, such as the run's name and date.

    Raises:
        FileNotFoundError: a figure is not there.
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
    parts = [
        {
            "title": section.title,
            "paragraphs": [part.strip() for part in section.text.split("\n\n") if part.strip()],
            "columns": _columns(section.table),
            "long": any(len(_cell(value)) >= _LONG_CELL for row in section.table for value in row.values()),
            "points": section.points and section.points.plain(),
            "rows": [[_cell(value) for value in row.values()] for row in section.table],
            "figures": [
                {
                    "caption": figure.caption,
                    "wide": figure.wide,
                    "image": _data_address(figure.path),
                }
                for figure in section.figures
            ],
        }
        for section in sections
    ]
    page = environment.get_template("report.html").render(title=title, subtitle=subtitle, sections=parts)
    path = Path(path)
    write_atomically(path, page)
    return path


def is_own_file(path: Path) -> bool:
    """Whether a file is there and no link: a folder that came from elsewhere may link to any file of this machine."""
    return path.is_file() and not path.is_symlink()


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
