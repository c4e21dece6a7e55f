"""Write a table of lesions in the form that this package reads, from a published table or from masks.

`python scripts/import_annotations.py --help` shows what can be set.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat

from fmcib_ssl.io import Command, parse_command


class ImportAnnotations(Command):
    """Write a table of lesions (image_path, coordX, coordY, coordZ in LPS mm, and more) for train.py and prepare.py.

    python scripts/import_annotations.py source=deeplesion table=DL_info.csv output=lesions.csv
    python scripts/import_annotations.py source=masks table=masks.csv output=lesions.csv image_root=/data/ct names=GTV.*

    docs/importers.md says what each source is and what its points mean.
    """

    source: Literal[
        "deeplesion", "luna16", "lung1", "lidc_crops", "dlcs", "luna25", "c4kc_kits", "colorectal_liver",
        "nsclc_radiogenomics", "masks",
    ] = Field(description="whose table; luna16: also of its malignancy task; masks: with mask_path")  # fmt: skip
    table: Path = Field(description="the published table; of masks, a CSV with image_path, mask_path")
    output: Path = Field(description="the CSV to write; must not exist")
    image_root: Path | None = Field(
        default=None, description="luna16, masks: the folder that relative paths start from"
    )
    path_prefix: str | None = Field(default=None, description="masks: beginning of the paths, to be replaced")
    names: str | None = Field(default=None, description="masks: regular expression for the labels, segments or ROIs")
    min_volume_mm3: NonNegativeFloat = Field(default=0.0, description="masks: smaller pieces are left out")
    mask_grid: Literal["scan", "own"] = Field(
        default="scan", description="masks: scan refuses a mask on another grid, own trusts its header"
    )
    on_bad_row: Literal["refuse", "skip"] = Field(default="refuse", description="masks: what to do with rows that fail")


def main(arguments: list[str]) -> None:
    """Read the source, write the table, say what is in it."""
    command = parse_command(ImportAnnotations, arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from fmcib_ssl.data import AnnotationsError, importers  # noqa: PLC0415  (the help waits for no library)

    if command.output.exists():
        sys.exit(f"{command.output} exists; take another name")
    try:
        if command.source == "masks":
            from fmcib_ssl.data import lesions_from_masks  # noqa: PLC0415

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
            rows = importers.luna16(command.table, command.image_root)
        else:
            rows = importers.IMPORTERS[command.source](command.table)
    except (AnnotationsError, ImportError) as error:
        sys.exit(str(error))
    command.output.parent.mkdir(parents=True, exist_ok=True)
    rows = rows.round(dict.fromkeys(("coordX", "coordY", "coordZ", "volume_mm3", "diameter_mm"), 4))
    rows.to_csv(command.output, index=False)
    print(f"{command.output}: {len(rows)} lesions in {rows['image_path'].nunique()} scans, points in LPS mm")
    print("Its paths are relative to the folder of the scans: give that as image_root when you use it.")


if __name__ == "__main__":
    main(sys.argv[1:])
