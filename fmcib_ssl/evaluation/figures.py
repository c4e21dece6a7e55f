"""Pictures of what a run does and has learned, one function a picture.

Figures are made with matplotlib's objects, never `pyplot`: nothing global is touched, no display is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from fmcib_ssl.io import atomic_write
from fmcib_ssl.types import Preprocessing

LUNG_WINDOW_HU = (-1350.0, 150.0)
INK, MUTED = "#1f2933", "#7b8794"
COLORS = ("#2f6fb3", "#d9622b", "#3c8d5a", "#8a5fbf", "#b3892f", "#c2456b", "#3a9ea5", "#5f6b7a")
#: One for each colour, so that classes can be told apart without them.
MARKERS = "osD^vPX*"


class Palette(dict[str, tuple[str, str]]):
    """Colour and marker of a series by its name: those that it was first drawn with, in all figures of a page."""

    def __missing__(self, name: str) -> tuple[str, str]:
        self[name] = COLORS[len(self) % len(COLORS)], MARKERS[len(self) % len(MARKERS)]
        return self[name]


@dataclass(frozen=True)
class ContactRow:
    """A lesion on the contact sheet: its patch, and the four views that the encoder is given.

    Attributes:
        title: names the lesion, such as its file and row.
        patch_hu: the lesion's patch before augmentation, HU, `(1, z, y, x)`.
        positive: its two views, as the encoder sees them.
        negative: the two views of the patch mined for it; None where none is mined.
    """

    title: str
    patch_hu: Float[Tensor, "1 z y x"]
    positive: tuple[Float[Tensor, "1 z y x"], Float[Tensor, "1 z y x"]]
    negative: tuple[Float[Tensor, "1 z y x"], Float[Tensor, "1 z y x"]] | None


def contact_sheet(rows: Sequence[ContactRow], path: Path | str, preprocessing: Preprocessing | None = None) -> Path:
    """Draw what goes into the encoder, a row a lesion, all in the lung window.

    The patch is shown in three planes through its centre, where a cross marks the annotated point: a lesion that
    is not under the cross was annotated in another frame. Views are shown in their axial centre plane. The
    patient's right is on the left, the head is up.

    Args:
        rows: at least one; a dozen still fits a page.
        path: of the PNG.
        preprocessing: how the views were normalised, for the window.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one lesion")
    pre = preprocessing or Preprocessing()
    shown = LUNG_WINDOW_HU
    window = ((shown[0] + pre.hu_offset) / pre.hu_scale, (shown[1] + pre.hu_offset) / pre.hu_scale)
    columns = ("axial", "coronal", "sagittal", "view 0", "view 1", "view 0", "view 1")
    figure = Figure(figsize=(11.4, 1.4 + 1.62 * len(rows)), facecolor="white")
    top = 1 - 0.75 / figure.get_figheight()
    grid = figure.add_gridspec(
        len(rows), 9, width_ratios=(1, 1, 1, 0.12, 1, 1, 0.12, 1, 1), left=0.015, right=0.985,
        top=top, bottom=0.55 / figure.get_figheight(), wspace=0.05, hspace=0.22,
    )  # fmt: skip
    places = (0, 1, 2, 4, 5, 7, 8)
    for number, row in enumerate(rows):
        planes = _planes(row.patch_hu)
        views = [_planes(view)[0] for view in (*row.positive, *(row.negative or ()))]
        for column, (place, image) in enumerate(zip(places, planes + views, strict=False)):
            axes = figure.add_subplot(grid[number, place])
            limits = shown if column < 3 else window
            axes.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axes.set_axis_off()
            if column < 3:
                mark_center(axes, image.shape, head_up=column > 0)
            if number == 0:
                axes.set_title(columns[column], fontsize=8, color=MUTED, pad=3)
            if column == 0:
                axes.text(0, -0.04, row.title, transform=axes.transAxes, va="top", fontsize=7.5, color=INK)
    heads = ((0, 2, "lesion, as read"), (4, 5, "anchor: two views"), (7, 8, "mined negative: two views"))
    for first, last, text in heads:
        left, right = grid[0, first].get_position(figure).x0, grid[0, last].get_position(figure).x1
        figure.text(
            (left + right) / 2,
            top + 0.36 / figure.get_figheight(),
            text,
            ha="center",
            weight="bold",
            fontsize=9,
            color=INK,
        )
    size = " x ".join(str(n) for n in rows[0].patch_hu.shape[1:])
    note = (
        f"Patches of {size} voxels (z, y, x), {pre.spacing_mm:g} mm. Lung window, {shown[0]:.0f} to {shown[1]:.0f} HU. "
        "Cross: the annotated point. Views: axial plane through the middle."
    )
    figure.text(0.015, 0.14 / figure.get_figheight(), note, fontsize=7.5, color=MUTED)
    return save_figure(figure, path, dpi=130)


#: Panels of the training curves: title, unit of the vertical axis, and the columns drawn with their labels.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "loss", {"train/loss": "training", "val/loss": "validation"}),
    ("Validation", "score", {"val/score": "validation"}),
    (
        "Cosine similarity",
        "mean cosine",
        {
            "train/positive_cosine": "two views of a lesion",
            "train/negative_cosine": "lesion and mined negative",
            "train/lesion_cosine": "two lesions",
        },
    ),
    (
        "Held-out lesions, online",
        "AUC",
        {"online/linear_auc": "linear probe", "online/knn_auc": "nearest neighbours"},
    ),
    (
        "What is left to learn",
        "share of the softmax",
        {"train/mined_share": "on mined negatives", "train/lesion_share": "on other lesions"},
    ),
    ("Effective rank", "directions", {"train/rank": "embeddings", "online/rank": "features, held out"}),
    ("Alignment", "mean squared distance", {"train/alignment": "two views of a lesion"}),
    ("Uniformity", "log mean potential", {"train/uniformity": "lesions"}),
    ("Learning rate", "learning rate", {"lr": "rate"}),
    ("Gradient norm", "norm", {"train/grad_norm": "all parameters"}),
    ("Speed", "samples / s", {"perf/samples_per_s": "lesions"}),
    ("Waiting for data", "share of time", {"perf/data_wait_share": "waiting"}),
)


def read_metrics(metrics_csv: Path | str) -> pd.DataFrame:
    """The table of a run's figures, by step.

    Raises:
        ValueError: it has no column `step`.
    """
    table = pd.read_csv(metrics_csv)
    if "step" not in table:
        raise ValueError(f"{metrics_csv} has no column 'step'; it has {', '.join(table.columns)}")
    return table.sort_values("step", kind="stable")


def training_curves(metrics_csv: Path | str, path: Path | str) -> Path:
    """Draw how a run went, from its table of figures; panels without data are left out.

    Faint: each step. Strong: the running mean over a twentieth of the run.

    Args:
        metrics_csv: a column `step` and any of those in `PANELS`; empty cells are skipped.
        path: of the PNG.

    Raises:
        ValueError: the table has no column `step`, or none of the columns holds a number.
    """
    table = read_metrics(metrics_csv)
    filled = {name for name in table.select_dtypes("number") if table[name].notna().any()}
    panels = [panel for panel in PANELS if filled & panel[2].keys()]
    if not panels:
        wanted = ", ".join(name for _, _, columns in PANELS for name in columns)
        raise ValueError(f"{metrics_csv} holds no numbers to draw; wanted any of {wanted}")
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(3.7 * num_columns, 2.6 * num_rows + 0.2), facecolor="white", layout="constrained")
    for place, (title, unit, columns) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        for color, (name, label) in zip(COLORS, columns.items(), strict=False):
            if name not in filled:
                continue
            series = table.dropna(subset=[name]).groupby("step")[name].mean()
            window = max(1, len(series) // 20)
            marker = "o" if len(series) < 10 else None
            axes.plot(series.index, series, color=color, alpha=0.25 if window > 1 else 1, lw=1, marker=marker, ms=3)
            smooth = series.rolling(window, min_periods=1, center=True).mean()
            axes.plot(series.index, smooth, color=color, lw=1.6, label=label)
        tidy(axes, title, "step", unit)
        if len(filled & columns.keys()) > 1:
            axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)
    return save_figure(figure, path, svg=True)


def _planes(patch: Tensor) -> list[npt.NDArray[np.float32]]:
    """Axial, coronal and sagittal plane through the centre voxel; the head is up."""
    volume = patch.detach().float().cpu().numpy()[0]
    z, y, x = (n // 2 for n in volume.shape)
    return [volume[z], volume[::-1, y], volume[::-1, :, x]]


def mark_center(axes: Axes, shape: tuple[int, ...], *, head_up: bool) -> None:
    """Four short lines that point at the centre voxel and leave it free."""
    row, column = shape[0] // 2, shape[1] // 2
    if head_up:
        row = shape[0] - 1 - row
    gap, reach = 0.08, 0.17  # of the picture
    for horizontal in (True, False):
        center, extent = (column, shape[1]) if horizontal else (row, shape[0])
        for sign in (-1, 1):
            along = [center + sign * gap * extent, center + sign * reach * extent]
            line = (along, [row, row]) if horizontal else ([column, column], along)
            axes.plot(*line, color="#ffd23f", lw=1.1, solid_capstyle="butt")


def tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and quiet axes, alike in all pictures."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, weight="bold")
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(labelsize=7.5, colors=MUTED)
    axes.grid(color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")


def save_figure(figure: Figure, path: Path | str, dpi: int = 150, *, svg: bool = False) -> Path:
    """Write a PNG, whole or not at all; the folder is made.

    Texts are drawn as they are: names of columns and lesions may hold `$`, which would be a formula to matplotlib.

    Args:
        figure: what is drawn.
        path: of the PNG.
        dpi: of the PNG.
        svg: write `NAME.svg` beside it, too.
    """
    path = Path(path)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=dpi, format="png")
    if svg:
        with atomic_write(path.with_suffix(".svg")) as file, rc_context({"svg.hashsalt": "fmcib_ssl"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
    return path
