"""What is kept of a step that went wrong: enough to take it again, and the names of its lesions.

```
faults/step-00000012/lesions.csv    the lesions of the step's batches, all ranks
faults/step-00000012/rank-0.pt      a rank's batch, weights and random state, plain data
```
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmcib_ssl.io import atomic_write, write_atomically
from fmcib_ssl.models.export import read_archive
from fmcib_ssl.types import UserError

FOLDER = "faults"
LESIONS_FILE = "lesions.csv"
FAULT_FORMAT = 1


class TrainingFaultError(UserError, RuntimeError):
    """Training cannot go on; the message says what happened and what to do."""


def write_fault(folder: Path, rank: int, fault: Mapping[str, Any]) -> Path:
    """Write a rank's part of a fault, whole or not at all.

    Args:
        folder: of this fault; it is made.
        rank: of this process.
        fault: plain values and tensors.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f"rank-{rank}.pt"
    try:
        with atomic_write(path) as file:
            torch.save({"format": FAULT_FORMAT, **on_cpu(dict(fault))}, file)
    except RuntimeError as error:  # torch's writer turns what the disk says into one
        raise OSError(str(error)) from error
    return path


def read_faults(folder: Path) -> list[dict[str, Any]]:
    """What `write_fault` wrote, one for each rank; nothing in a file is ever run.

    Raises:
        ValueError: no such folder, or a file that is damaged.
    """
    faults = []
    for path in sorted(folder.glob("rank-*.pt"), key=lambda file: int("0" + file.stem.partition("-")[2])):
        try:
            fault = read_archive(path)
            if fault["format"] != FAULT_FORMAT:
                raise ValueError(f"format {fault['format']}")
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} cannot be read ({error}); copy it again, or replay another step") from error
        faults.append(fault)
    if not faults:
        raise ValueError(f"{folder} holds no rank-*.pt: there is nothing to replay")
    return faults


def write_lesions(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table of a fault's lesions; other ranks' rows are gathered by the caller."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["rank"])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / LESIONS_FILE, text.getvalue())


def lesions_of(batch: Any, patches: Any, rank: int) -> list[dict[str, Any]]:
    """The lesions of a batch: one row each, with the name that people know it by.

    Args:
        batch: of views, with `lesion`, row numbers; any other gives no rows.
        patches: the dataset they come from, or None; `title(lesion)` and the column `lesion_id` of `lesions` are read.
        rank: that the batch was on.
    """
    lesions = batch.get("lesion") if isinstance(batch, Mapping) else None
    if not isinstance(lesions, Tensor):
        return []
    table: Any = getattr(patches, "lesions", None)
    rows = []
    for place, lesion in enumerate(lesions.tolist()):
        known = table is not None and "lesion_id" in table
        rows.append({
            "rank": rank,
            "place": place,
            "lesion": lesion,
            "lesion_id": str(table["lesion_id"].iloc[lesion]) if known else "",
            "title": patches.title(lesion) if hasattr(patches, "title") else "",
            "views_are_finite": not bad_views(batch, place),
        })  # fmt: skip
    return rows


def bad_views(batch: Mapping[str, Any], place: int) -> list[str]:
    """Names of the views of one lesion that hold NaN or infinity, such as `positive[0]`."""
    found = []
    for key in ("positive", "negative"):
        views = batch.get(key, ())
        views = (views,) if isinstance(views, Tensor) else views
        for number, view in enumerate(views):
            if place < len(view) and not bool(torch.isfinite(view[place]).all()):
                found.append(f"{key}[{number}]")
    return found


def name_lesions(rows: list[dict[str, Any]], most: int = 12) -> str:
    """Lesions in words, those with bad views first."""
    rows = sorted(rows, key=lambda row: row["views_are_finite"])
    names = [
        (f"{row['lesion_id']} ({row['title']})" if row["lesion_id"] else row["title"] or f"row {row['lesion']}")
        + ("" if row["views_are_finite"] else ", whose views are not finite themselves")
        for row in rows[:most]
    ]
    return "; ".join(names) + (f"; and {len(rows) - most} more" if len(rows) > most else "")


def gathered(rows: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Rows of all ranks, in order; to be called on all."""
    if world_size == 1:
        return rows
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def on_cpu(values: Any) -> Any:
    """A copy of nested values with every tensor detached, on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", copy=True)
    if isinstance(values, Mapping):
        return {key: on_cpu(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(on_cpu(value) for value in values) if type(values) in (list, tuple) else values
    if hasattr(values, "__array__"):  # seeds of views
        return torch.as_tensor(values)
    return values


def newest_fault(run: Path) -> Path | None:
    """The folder of a run's last fault."""
    folders = sorted((run / FOLDER).glob("step-*")) if (run / FOLDER).is_dir() else []
    return folders[-1] if folders else None


def fault_folder(folder: Path | str | os.PathLike[str], step: int) -> Path:
    """Where the fault of a step is kept."""
    return Path(folder) / f"step-{step:08d}"
