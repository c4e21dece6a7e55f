"""A picture of lesions as they lie in their scans, to see whether the points are where they are meant to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int16
from matplotlib.figure import Figure

from fmcib_ssl.evaluation.figures import INK, LUNG_WINDOW_HU, MUTED, mark_center, save_figure
from fmcib_ssl.evaluation.report import Section
from fmcib_ssl.io import Identifiers, identifier

SOFT_TISSUE_WINDOW_HU = (-160.0, 240.0)
_PANELS = (
    ("axial, lung", LUNG_WINDOW_HU),
    ("axial, soft tissue", SOFT_TISSUE_WINDOW_HU),
    ("coronal", LUNG_WINDOW_HU),
    ("sagittal", LUNG_WINDOW_HU),
)


@dataclass(frozen=True)
class SheetLesion:
    """A lesion on the sheet.

    Attributes:
        title: names it, such as its scan and row.
        patch_hu: canonical LPS, the annotated point in voxel `size // 2` of each axis.
    """

    title: str
    patch_hu: Int16[np.ndarray, "z y x"]


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
        paths = [identifier(path, identifiers) for path in shown["image_path"]]
        shown = shown[["row"]].assign(image_path=paths)
    return Section(title, text, table=shown.to_dict("records"))  # type: ignore[arg-type]


def lesion_sheet(lesions: Sequence[SheetLesion], path: Path | str, spacing_mm: float) -> Path:
    """Draw the three planes through each point, two lesions a line, a cross on the point.

    The patient's right is on the left, the head is up.

    Args:
        lesions: at least one.
        path: of the PNG.
        spacing_mm: edge of the voxels.

    Raises:
        ValueError: there are no lesions.
    """
    if not lesions:
        raise ValueError("a sheet needs at least one lesion")
    num_lines = -(-len(lesions) // 2)
    height = 0.75 + 1.55 * num_lines
    figure = Figure(figsize=(11.4, height), facecolor="white")
    grid = figure.add_gridspec(
        num_lines, 9, width_ratios=(1, 1, 1, 1, 0.15, 1, 1, 1, 1), left=0.015, right=0.985,
        top=1 - 0.3 / height, bottom=0.42 / height, wspace=0.05, hspace=0.2,
    )  # fmt: skip
    for number, lesion in enumerate(lesions):
        z, y, x = (n // 2 for n in lesion.patch_hu.shape)
        planes = (lesion.patch_hu[z], lesion.patch_hu[z], lesion.patch_hu[::-1, y], lesion.patch_hu[::-1, :, x])
        for column, ((name, (low, high)), plane) in enumerate(zip(_PANELS, planes, strict=True)):
            axes = figure.add_subplot(grid[number // 2, column + 5 * (number % 2)])
            axes.imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axes.set_axis_off()
            mark_center(axes, plane.shape, head_up=column > 1)
            if number < 2:
                axes.set_title(name, fontsize=7.5, color=MUTED, pad=3)
            if column == 0:
                axes.text(0, -0.04, lesion.title, transform=axes.transAxes, va="top", fontsize=7, color=INK)
    edge_mm = lesions[0].patch_hu.shape[-1] * spacing_mm
    windows = " and ".join(f"{low:.0f} to {high:.0f}" for low, high in (LUNG_WINDOW_HU, SOFT_TISSUE_WINDOW_HU))
    note = (
        f"Planes through the annotated point (cross), {edge_mm:g} mm wide; windows {windows} HU. Right is on the left."
    )
    figure.text(0.015, 0.12 / height, note, fontsize=7.5, color=MUTED)
    return save_figure(figure, path, dpi=130)
