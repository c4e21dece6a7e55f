"""Write a table of lesions in the form that this package reads, from a published table or from masks.

`fmcib-ssl import-annotations --help` shows what can be set.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command
from fmcib_ssl.types import UserError

if TYPE_CHECKING:
    import pandas as pd


class ImportAnnotations(Command):
    """Write a table of lesions (image_path, coordX, coordY, coordZ in LPS mm, and more) for train and prepare.

    fmcib-ssl import-annotations source=deeplesion table=DL_info.csv output=lesions.csv
    fmcib-ssl import-annotations source=masks table=masks.csv output=lesions.csv image_root=/data/ct names=GTV.*
    fmcib-ssl import-annotations source=c4kc_kits table=data.csv output=lesions.csv fetch=idc image_root=/data/c4kc_kits

    docs/importers.md says what each source is and what its points mean.
    """

    source: Literal[
        "deeplesion", "luna16", "lung1", "lidc_crops", "dlcs", "luna25", "c4kc_kits", "colorectal_liver",
        "nsclc_radiogenomics", "masks",
    ] = Field(description="whose table; luna16: also of its malignancy task; masks: with mask_path")  # fmt: skip
    table: Path = Field(description="the published table; of masks, a CSV with image_path, mask_path")
    output: Path = Field(description="the CSV to write; must not exist")
    image_root: Path | None = Field(
        default=None, description="luna16, masks, fetch: the folder that relative paths start from"
    )
    fetch: Literal["idc"] | None = Field(
        default=None, description="idc: download the scans that the table names to image_root; says size and licence"
    )
    accept_licence: bool = Field(default=False, description="fetch: true once you have read it")
    max_gb: PositiveFloat = Field(default=10.0, description="fetch: more is not downloaded")
    path_prefix: str | None = Field(default=None, description="masks: beginning of the paths, to be replaced")
    names: str | None = Field(default=None, description="masks: regular expression for the labels, segments or ROIs")
    min_volume_mm3: NonNegativeFloat = Field(default=0.0, description="masks: smaller pieces are left out")
    mask_grid: Literal["scan", "own"] = Field(
        default="scan", description="masks: scan refuses a mask on another grid, own trusts its header"
    )
    on_bad_row: Literal["refuse", "skip"] = Field(default="refuse", description="masks: what to do with rows that fail")


def run(command: ImportAnnotations) -> None:
    """Read the source, write the table, say what is in it."""
    from fmcib_ssl.data import importers, lesions_from_masks  # noqa: PLC0415  (the help waits for no library)

    if command.output.exists():
        raise FileExistsError(f"{command.output} exists; take another name")
    if command.source == "masks":
        rows = lesions_from_masks(
            command.table,
            command.image_root,
            path_prefix=command.path_prefix,
            names=command.names,
            min_volume_mm3=command.min_volume_mm3,
            mask_grid=command.mask_grid,
            on_bad_row=command.on_bad_row,
            rejected_csv=command.output.with_name(f"{command.output.stem}_rejected.csv"),
        )
    elif command.source == "luna16":
        rows = importers.luna16(command.table, None if command.fetch else command.image_root)
    else:
        rows = importers.IMPORTERS[command.source](command.table)
    if command.fetch:
        _fetch(command, rows)
    command.output.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.round(dict.fromkeys(("coordX", "coordY", "coordZ", "volume_mm3", "diameter_mm"), 4))
    rows.to_csv(command.output, index=False)
    print(f"{command.output}: {len(rows)} lesions in {rows['image_path'].nunique()} scans, points in LPS mm")
    print("Its paths are relative to the folder of the scans: give that as image_root when you use it.")


def _fetch(command: ImportAnnotations, rows: pd.DataFrame) -> None:
    """Say what would be downloaded under which licence; download it if that is accepted."""
    from fmcib_ssl.data import idc  # noqa: PLC0415

    if command.image_root is None:
        raise UserError("fetch=idc needs image_root=, the folder for the scans")
    client = idc.new_client()
    series = idc.series_of(command.source, rows, client)
    new = idc.absent(series, command.image_root)
    num_gb = new["series_size_MB"].sum() / 1000
    print(f"idc       {len(series)} of {rows['image_path'].nunique()} scans; to download: {len(new)}, {num_gb:.1f} GB")
    terms = series[["collection_id", "license_short_name", "source_DOI"]].astype(str).agg(", ".join, axis=1)
    for term, number in terms.value_counts().items():
        print(f"licence   {term}: {number} scans")
    if not command.accept_licence or num_gb > command.max_gb:
        raise UserError("nothing was downloaded: confirm with accept_licence=true and max_gb= of at least that size")
    if len(new):
        idc.fetch_series(new, command.image_root, client)


main = partial(
    run_command, ImportAnnotations, run, errors=(OSError, ImportError), interrupted="stopped; no table was written"
)
