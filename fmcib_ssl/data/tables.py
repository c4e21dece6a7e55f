"""Read CSV tables, and report what is wrong with them by row and column.

Rows are numbered as in the file, 1 being the first below the header.
"""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.io import nearest
from fmcib_ssl.types import UserError

_logger = logging.getLogger(__name__)

OnBadRow = Literal["refuse", "skip"]

REJECTED_COLUMNS = ("row", "image_path", "value", "reason", "remedy")
#: Rows that an error message shows; the file has them all.
_NUM_ROWS_SHOWN = 20
_NUM_COLUMNS_SHOWN = 200
#: How programs write numbers; anything else is an id.
_PLAIN_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+|\.\d+[eE][+-]?\d{1,3}|[eE][+-]\d{1,3})?")
_WHOLE_NUMBER = re.compile(r"-?\d+")
_TRUTHS = {"True", "TRUE", "true", "False", "FALSE", "false"}


class AnnotationsError(UserError, ValueError):
    """A table as a whole cannot be used."""


class BadRowsError(AnnotationsError):
    """Rows that cannot be used; all are in `rejected`: row, image_path, value, reason, remedy."""

    def __init__(self, message: str, rejected: pd.DataFrame | None = None) -> None:
        super().__init__(message)
        self.rejected = rejected


def selected(rows: pd.DataFrame, select: Mapping[str, Any] | None, *, key: str, where: object) -> npt.NDArray[np.bool_]:
    """Which rows have the values that `select` asks for, such as `{"split": ["val", "test"]}`; with none, all.

    Args:
        rows: a table.
        select: for each column a value, or a list of accepted values.
        key: name of the option, for the message.
        where: the file or store that the rows are from, for the message.

    Raises:
        AnnotationsError: there is no such column.
    """
    keep = np.ones(len(rows), dtype=bool)
    for column, value in (select or {}).items():
        if column not in rows:
            raise AnnotationsError(f"{key} names the column {column!r}; {where} has {', '.join(map(str, rows))}")
        values = pd.Series(value if isinstance(value, list | tuple) else [value], dtype=object).astype(str)
        cells = rows[column]
        if pd.api.types.is_bool_dtype(cells):
            keep &= cells.astype(str).str.lower().isin(values.str.lower()).to_numpy(bool)
        elif pd.api.types.is_numeric_dtype(cells):
            keep &= cells.isin(pd.to_numeric(values, errors="coerce").dropna()).to_numpy(bool)
        else:
            keep &= text_of(cells).isin(values).to_numpy(bool)
    return keep


def text_of(column: pd.Series[Any]) -> pd.Series[Any]:
    """Ids as they stand in their file, for comparing and joining: 12 is "12" in a column of floats too; empty stays.

    Tables of earlier versions hold ids as numbers, and pandas makes floats of whole numbers beside an empty cell.
    """
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(object).where(column.notna(), None).map(str, na_action="ignore")


def read_table(path: Path | str, text: Collection[str] = ()) -> pd.DataFrame:
    """Read a CSV file in UTF-8, separated by commas, semicolons or tabs, or by what Excel's line `sep=` says.

    A byte-order mark and blanks round column names are dropped. The index is the row number in the file; blank lines
    count, so that row + 1 is the line in an editor.

    A column is numeric only where nothing is lost by that: `007`, `1E2` and numbers of more than 15 digits are ids, and
    a column that has one of them is text; whole numbers beside an empty cell are `Int64`.

    Args:
        path: the file.
        text: columns to read as text, whatever they look like.

    Raises:
        AnnotationsError: no file, no text, rows of unequal length, a duplicate column.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header_line = file.readline()
            excel = re.fullmatch(r'"?sep=(.)"?\s*', header_line, re.IGNORECASE)
            if excel is not None:
                header_line = file.readline()
            separator = excel[1] if excel is not None else max(",;\t", key=header_line.count)
            names = next(csv.reader([header_line], delimiter=separator), [])
            header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(names)]
            lengths = [len(row) for row in csv.reader(file, delimiter=separator)]
    except OSError as error:
        raise AnnotationsError(f"{path}: cannot be opened: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationsError(f"{path}: is not a CSV file in UTF-8 ({error}); save it as one") from error
    if duplicates := sorted(name for name, count in Counter(header).items() if count > 1):
        raise AnnotationsError(f"{path}: has duplicate columns: {', '.join(map(repr, duplicates))}")
    for row, length in enumerate(lengths, start=1):
        if length not in (0, len(header)):
            raise AnnotationsError(
                f"{path}: row {row} (row 1 is the first below the header) has {length} fields, the header has "
                f"{len(header)}; put values that hold a {separator!r} in double quotes"
            )
    if not header:
        return pd.DataFrame()
    cells = pd.read_csv(
        path, sep=separator, encoding="utf-8-sig", header=0, names=header, index_col=False, dtype=str,
        skip_blank_lines=False, skiprows=int(excel is not None),
    )  # fmt: skip
    rows = pd.DataFrame({name: _typed(cells[name], as_text=name in text) for name in header})
    rows.index = pd.RangeIndex(1, len(rows) + 1, name="row")
    return rows.dropna(how="all")


def _typed(cells: pd.Series[str], *, as_text: bool) -> pd.Series[Any]:
    """A column as numbers or booleans if the conversion is lossless, else as text."""
    cells = cells.str.strip()
    values = set(cells.dropna())
    if values and (as_text or not (values <= _TRUTHS or _are_numbers(values))):
        return cells
    if values and values <= _TRUTHS:
        return cells.str.lower().map({"true": True, "false": False})
    numbers = cells.astype(float)  # exact for whole numbers too: they have at most 15 digits
    if not values or not all(map(_WHOLE_NUMBER.fullmatch, values)):
        return numbers
    return numbers.astype("Int64" if cells.hasnans else "int64")


def _are_numbers(values: set[str]) -> bool:
    if not all(map(_PLAIN_NUMBER.fullmatch, values)) or len({float(value) for value in values}) < len(values):
        return False  # one number written in two ways is two ids
    decimals = {value.partition(".")[2] for value in values}
    ends_in_zero = any(part.endswith("0") and part != "0" for part in decimals)
    return not (ends_in_zero and len(set(map(len, decimals))) > 1)  # 1.10 beside 1.2


def require_columns(path: Path | str, rows: pd.DataFrame, required: Collection[str], hint: str = "") -> None:
    """Refuse a table that lacks a column, or has no rows.

    Args:
        path: the file, for the message.
        rows: what `read_table` gave.
        required: columns that must be there.
        hint: ends the message.

    Raises:
        AnnotationsError: names what is missing, and the columns that were perhaps meant.
    """
    names = list(rows)[:_NUM_COLUMNS_SHOWN]
    by_lower = {str(name).lower(): name for name in names}
    missing = []
    for name in required:
        if name not in rows:
            close = nearest(name.lower(), by_lower)
            missing.append(f"{name!r} (rename {by_lower[close]!r}?)" if close else repr(name))
    if missing:
        more = ", ..." if len(names) < rows.shape[1] else ""
        listing = ", ".join(map(repr, names)) + more
        raise AnnotationsError(f"{path}: lacks the columns {', '.join(missing)}; it has {listing}{hint}")
    if rows.empty:
        raise AnnotationsError(f"{path}: has a header and no rows")


def refuse_or_skip(
    rejected: pd.DataFrame,
    source: Path | str,
    num_rows: int,
    on_bad_row: OnBadRow,
    rejected_csv: Path | str | None = None,
) -> None:
    """Report the rows that cannot be used, if there are any, and stop or continue without them.

    Args:
        rejected: `REJECTED_COLUMNS`, a row for each row that cannot be used.
        source: the table's file, for the message.
        num_rows: rows that were looked at.
        on_bad_row: "refuse" stops; "skip" logs them and returns.
        rejected_csv: where to write them.

    Raises:
        BadRowsError: bad rows and `on_bad_row="refuse"`, or no row that can be used.
    """
    if rejected.empty:
        return
    if rejected_csv is not None:
        rejected.to_csv(rejected_csv, index=False)
    lines = [f"{source}: {len(rejected)} of {num_rows} rows cannot be used (row 1 is the first below the header)"]
    for row, image_path, value, reason, _ in rejected.head(_NUM_ROWS_SHOWN).astype(str).to_numpy().tolist():
        shown_value = f"{value}: " if value not in ("", image_path) else ""
        lines.append(f"  row {row}: {image_path}: {shown_value}{reason}")
    if (num_more := len(rejected) - _NUM_ROWS_SHOWN) > 0:
        listed_in = f"; all are in {rejected_csv}" if rejected_csv is not None else ""
        lines.append(f"  ... and {num_more} more{listed_in}")
    lines += ["What to do:", *(f"  {remedy} ({n} rows)" for remedy, n in rejected["remedy"].value_counts().items())]
    message = "\n".join(lines)
    if on_bad_row == "refuse":
        raise BadRowsError(f"{message}\nOr continue without these rows: on_bad_row=skip.", rejected)
    if len(rejected) == num_rows:
        raise BadRowsError(f"{message}\nNo row is left.", rejected)
    _logger.warning("%s\nContinuing with the other %d rows.", message, num_rows - len(rejected))
