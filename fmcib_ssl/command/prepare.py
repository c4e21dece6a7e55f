"""Bring the scans of a table of lesions into a store, from which patches are read in a millisecond.

`fmcib-ssl prepare --help` shows what can be set; docs/prepare.md says more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command, Identifiers, identifier

if TYPE_CHECKING:
    from fmcib_ssl.data import Summary

#: Width of what the contact sheet shows of each lesion.
SHEET_MM = 64


class Prepare(Command):
    """Bring the scans of a table of lesions into a store: one grid, compressed, with an index.

    fmcib-ssl prepare annotations=lesions.csv store=/data/store image_root=/data/ct

    Stopped or killed, the same command resumes where it was. For job arrays give shard=1/8 to 8/8, then merge=true.
    verify=/data/store, alone, reads all of a store and names the files that are damaged; prepare makes them anew.
    """

    annotations: Path | None = Field(
        default=None, description="CSV with image_path, coordX, coordY, coordZ; one row a lesion"
    )
    store: Path | None = Field(default=None, description="folder of the store; made if it is not there")
    verify: Path | None = Field(default=None, description="folder of a store to look through, alone")
    image_root: Path | None = Field(default=None, description="folder of relative paths; null: the table's own")
    path_prefix: str | None = Field(default=None, description="beginning of the paths that image_root replaces")
    coordinates: Literal["lps", "ras", "voxel"] = Field(default="lps", description="frame of the points")
    spacing_mm: PositiveFloat = Field(default=1.0, description="edge of the store's cubic voxels")
    interpolation: Literal["linear", "nearest", "bspline"] = Field(
        default="linear", description="between the scan's voxels: linear, nearest, or bspline (10 times as slow)"
    )
    num_workers: NonNegativeInt | None = Field(default=None, description="processes; null: as many as cores")
    shard: str | None = Field(default=None, pattern=r"^\d+/\d+$", description="part of the scans, such as 1/8")
    merge: bool = Field(default=False, description="true: make the index after all shards have run")
    on_bad_row: Literal["skip", "refuse"] = Field(
        default="skip", description="rows that cannot be used: skip lists them, refuse stops before reading scans"
    )
    sheet_lesions: NonNegativeInt = Field(default=24, description="lesions on the contact sheet; 0: no sheet")
    identifiers: Identifiers = Field(default="show", description="names of scans on the page: show, or hash them")

    @model_validator(mode="after")
    def _what_goes_together(self) -> Prepare:
        if self.verify is not None and self.model_fields_set != {"verify"}:
            raise ValueError("verify=DIR stands alone: it reads a store, and needs nothing else")
        if missing := [name for name in ("annotations", "store") if self.verify is None and not getattr(self, name)]:
            raise ValueError("\n".join(f"{name} is missing" for name in missing))
        if self.shard and self.merge:
            raise ValueError("shard and merge: run all shards first, then once merge=true without shard")
        return self


def run(command: Prepare) -> None:
    """Prepare, print a summary, draw the contact sheet."""
    from fmcib_ssl.data import StoreSettings, prepare_store, read_annotations  # noqa: PLC0415  (the help is quick)

    if command.verify is not None:
        check_store(command.verify)
        return
    assert command.annotations is not None and command.store is not None
    root = command.image_root
    table = read_annotations(command.annotations, root, command.coordinates, command.path_prefix)
    number, _, total = (command.shard or "").partition("/")
    summary = prepare_store(
        table,
        command.store,
        StoreSettings(command.spacing_mm, command.interpolation),
        image_root=root,
        num_workers=command.num_workers,
        shard=(int(number), int(total)) if command.shard else None,
        merge=command.merge,
        on_bad_row=command.on_bad_row,
    )
    print(summary)
    if summary.num_lesions is not None and command.sheet_lesions:
        print(f"look at   {write_page(summary, command.sheet_lesions, command.identifiers)}")


def check_store(store: Path) -> None:
    """Read all of a store, and name its damaged files; exits with 1 if there are any."""
    from fmcib_ssl.data import verify  # noqa: PLC0415

    num_scans, damaged = verify(store)
    print(f"store     {store}\nscans     {num_scans} read")
    for name, problem in damaged.items():
        print(f"damaged   {name}: {problem}")
    if damaged:
        print("next      the command that made the store, again: it makes these anew")
        sys.exit(1)
    print("whole     every file is as it was written")


def write_page(summary: Summary, num_lesions: int, identifiers: Identifiers) -> Path:
    """Draw a sample of the lesions, spread over the table, and put it on a page with what was rejected."""
    import numpy as np  # noqa: PLC0415  # and torch, which the workers would import with this file

    from fmcib_ssl.data import Store, patch_start  # noqa: PLC0415
    from fmcib_ssl.evaluation import SheetLesion, write_lesion_page  # noqa: PLC0415

    store = Store(summary.store)
    spacing_mm = store.settings.spacing_mm
    size = (max(2, round(SHEET_MM / spacing_mm)),) * 3
    places = np.unique(np.linspace(0, len(store.lesions) - 1, num_lesions).round().astype(int))
    rows = store.lesions.iloc[places].to_dict("records")
    starts = [patch_start((row["center_z"], row["center_y"], row["center_x"]), size) for row in rows]
    lesions = [
        SheetLesion(
            f"{identifier(row['scan_id'], identifiers)}, row {row['row']}",
            store.read_patch(row["scan_id"], start, size),
        )
        for row, start in zip(rows, starts, strict=True)
    ]
    return write_lesion_page(
        summary.store / "contact_sheet.png",
        f"Lesions of {summary.store.name}",
        f"{len(store.scans)} scans, {len(store.lesions)} lesions, {spacing_mm:g} mm",
        lesions=lesions,
        num_lesions=len(store.lesions),
        spacing_mm=spacing_mm,
        rejected=summary.rejected,
        identifiers=identifiers,
    )


main = partial(run_command, Prepare, run)
