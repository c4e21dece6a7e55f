"""Look at a table of lesions and its scans before preparing them or training on them; writes no store.

`fmcib-ssl check-data --help` shows what can be set.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command, Identifiers, identifier

if TYPE_CHECKING:
    import pandas as pd

    from fmcib_ssl.data import LesionTable
    from fmcib_ssl.evaluation import SheetLesion

#: Width of what the contact sheet shows of each lesion.
SHEET_MM = 64


class CheckData(Command):
    """Show what `prepare` would make of a table: rows it would reject, where points fall, and how lesions look.

    fmcib-ssl check-data annotations=lesions.csv image_root=/data/ct output=checked
    """

    annotations: Path = Field(description="CSV with image_path, coordX, coordY, coordZ; one row a lesion")
    output: Path = Field(description="folder for tables, the contact sheet, and what is needed to resume")
    image_root: Path | None = Field(default=None, description="folder of relative paths; null: the table's own")
    path_prefix: str | None = Field(default=None, description="beginning of the paths that image_root replaces")
    coordinates: Literal["lps", "ras", "voxel"] = Field(default="lps", description="frame of the points")
    spacing_mm: PositiveFloat = Field(default=1.0, description="edge of the store's cubic voxels")
    num_workers: NonNegativeInt | None = Field(default=None, description="processes; null: as many as cores")
    check: Literal["headers", "full"] = Field(default="full", description="full decodes every scan; headers is quick")
    sheet_lesions: NonNegativeInt = Field(default=24, description="lesions on the contact sheet; 0: no sheet")
    identifiers: Identifiers = Field(default="show", description="names of scans on the page: show, or hash them")


def run(command: CheckData) -> None:
    """Check, print a summary, draw the contact sheet."""
    from fmcib_ssl.data import check_annotations, read_annotations  # noqa: PLC0415  (the help is quick)

    command.output.mkdir(parents=True, exist_ok=True)
    table = read_annotations(command.annotations, command.image_root, command.coordinates, command.path_prefix)
    usable, rejected = check_annotations(
        table,
        on_bad_row="skip",
        check=command.check,
        rejected_csv=command.output / "rejected.csv",
        num_workers=command.num_workers,
        cache=command.output / "checked_scans.jsonl",
    )
    rejected.to_csv(command.output / "rejected.csv", index=False)  # also if there is none: there may be an old one
    scans = scan_table(usable)
    scans.to_csv(command.output / "scans.csv", index=False)
    point_table(usable).to_csv(command.output / "coordinates.csv", index=False)
    print(f"rows      {len(usable)} of {len(table)} can be used, in {len(scans)} scans")
    print(f"rejected  {len(rejected)} rows: {command.output / 'rejected.csv'}")
    print(f"tables    of scans {command.output / 'scans.csv'}, of points {command.output / 'coordinates.csv'}")
    if command.sheet_lesions:
        from fmcib_ssl.evaluation import write_lesion_page  # noqa: PLC0415

        page = write_lesion_page(
            command.output / "contact_sheet.png",
            f"Lesions of {command.annotations.name}",
            f"{len(usable)} of {len(table)} rows can be used",
            lesions=sample(usable, command.sheet_lesions, command.spacing_mm, command.identifiers),
            num_lesions=len(usable),
            spacing_mm=command.spacing_mm,
            rejected=rejected,
            identifiers=command.identifiers,
        )
        print(f"look at   {page}")


def scan_table(table: LesionTable) -> pd.DataFrame:
    """A row for each scan that can be used: its grid, and the range of its values if it was decoded."""
    import pandas as pd  # noqa: PLC0415

    rows = []
    for source in dict.fromkeys(table.scans):
        report = table.reports[source]  # type: ignore[index]  # rows without a scan are not usable
        geometry, values = report.geometry, report.values  # type: ignore[union-attr]  # nor are rejected scans
        rows.append(
            {
                "path": str(source.path),  # type: ignore[union-attr]
                "series_uid": source.series_uid,  # type: ignore[union-attr]
                "size_xyz": " x ".join(map(str, geometry.size_xyz)),
                "spacing_mm_xyz": " x ".join(f"{s:.4g}" for s in geometry.spacing_mm_xyz),
                **(values._asdict() if values else {}),
            }
        )
    return pd.DataFrame(rows)


def point_table(table: LesionTable) -> pd.DataFrame:
    """Each lesion's point in LPS mm, and as a voxel of its file."""
    import numpy as np  # noqa: PLC0415
    import pandas as pd  # noqa: PLC0415

    from fmcib_ssl.data import PATH_COLUMN, rows_by_scan  # noqa: PLC0415

    points, ijk = table.centers_lps_mm, np.empty_like(table.centers_lps_mm)
    for scan, own in rows_by_scan(table.scans).items():
        ijk[own] = table.reports[scan].geometry.to_index_xyz(points[own])  # type: ignore[union-attr]
    columns = {"row": table.rows.index, PATH_COLUMN: table.rows[PATH_COLUMN].to_numpy()}
    columns |= dict(zip(("x_lps_mm", "y_lps_mm", "z_lps_mm"), points.round(3).T, strict=True))
    columns |= dict(zip(("file_i", "file_j", "file_k"), ijk.round(2).T, strict=True))
    return pd.DataFrame(columns)


def sample(table: LesionTable, num_lesions: int, spacing_mm: float, identifiers: Identifiers) -> list[SheetLesion]:
    """Lesions spread over the table, cut from their scans."""
    import numpy as np  # noqa: PLC0415

    from fmcib_ssl.data import PATH_COLUMN, crop_patch, read_scan  # noqa: PLC0415
    from fmcib_ssl.evaluation import SheetLesion  # noqa: PLC0415

    size = (max(2, round(SHEET_MM / spacing_mm)),) * 3
    lesions = []
    for i in np.unique(np.linspace(0, len(table) - 1, num_lesions).round().astype(int)):
        source = table.scan_of(i)
        patch = crop_patch(read_scan(*source), table.centers_lps_mm[i].tolist(), size, spacing_mm)
        name = source.path.name if identifiers == "show" else identifier(table.rows[PATH_COLUMN].iloc[i], identifiers)
        lesions.append(SheetLesion(f"{name}, row {table.rows.index[i]}", patch))
    return lesions


main = partial(
    run_command, CheckData, run,
    interrupted="stopped; the same command resumes: usable scans that were checked are not read again",
)  # fmt: skip
