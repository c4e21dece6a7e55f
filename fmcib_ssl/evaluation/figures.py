"""Pictures: curves of a training and what all charts share, then sheets of patches.

On sheets the patient's right is on the left, the head is up. Figures are made with matplotlib's objects, never
`pyplot`: nothing global is touched, no display is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int16
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter
from pandas.api.types import is_integer_dtype
from torch import Tensor

from fmcib_ssl.evaluation.probes import Neighbors
from fmcib_ssl.io import atomic_write
from fmcib_ssl.types import Array, Preprocessing

WINDOWS_HU = {"lung": (-1350.0, 150.0), "soft_tissue": (-160.0, 240.0)}
INK, MUTED, LINE = "#1f2933", "#7b8794", "#cbd2d9"
COLORS = ("#2f6fb3", "#d9622b", "#3c8d5a", "#8a5fbf", "#b3892f", "#c2456b", "#3a9ea5", "#5f6b7a")
#: One for each colour, so that classes can be told apart without them.
_MARKERS = "osD^vPX*"

#: Panels of the training curves: title, unit of the vertical axis, and the columns drawn with their labels.
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "loss", {"train/loss": "training", "val/loss": "validation"}),
    ("Validation", "score", {"val/score": "validation"}),
    ("Cosine similarity", "mean cosine", {
        "train/positive_cosine": "two views of a lesion", "train/negative_cosine": "lesion and mined negative",
        "train/lesion_cosine": "two lesions",
    }),
    ("Held-out lesions, online", "AUC", {"online/linear_auc": "linear probe", "online/knn_auc": "nearest neighbours"}),
    ("What is left to learn", "share of the softmax", {
        "train/mined_share": "on mined negatives", "train/lesion_share": "on other lesions",
    }),
    ("Effective rank", "directions", {"train/rank": "embeddings", "online/rank": "features, held out"}),
    ("Alignment", "mean squared distance", {"train/alignment": "two views of a lesion"}),
    ("Uniformity", "log mean potential", {"train/uniformity": "lesions"}),
    ("Learning rate", "learning rate", {"lr": "rate"}),
    ("Gradient norm", "norm", {"train/grad_norm": "all parameters"}),
    ("Speed", "samples / s", {"perf/samples_per_s": "lesions"}),
    ("Waiting for data", "share of time", {"perf/data_wait_share": "waiting"}),
)  # fmt: skip


def save_figure(figure: Figure, path: Path | str, dpi: int = 150, *, svg: bool = False) -> Path:
    """Write a PNG, whole or not at all; the folder is made.

    Texts are drawn as they are: names of columns and lesions may hold `$`, which would be a formula to matplotlib.

    Args:
        figure: to draw.
        path: NAME.png.
        dpi: dots an inch in the PNG.
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


class Palette(dict[str, tuple[str, str]]):
    """Colour and marker of a series by its name: those that it was first drawn with, in all figures of a page."""

    def __missing__(self, name: str) -> tuple[str, str]:
        self[name] = COLORS[len(self) % len(COLORS)], _MARKERS[len(self) % len(_MARKERS)]
        return self[name]


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
        metrics_csv: a column `step` and any of those of the panels; empty cells are skipped.
        path: NAME.png.

    Raises:
        ValueError: the table has no column `step`, or none of the columns holds a number.
    """
    table = read_metrics(metrics_csv)
    filled = {name for name in table.select_dtypes("number") if table[name].notna().any()}
    panels = [panel for panel in _PANELS if filled & panel[2].keys()]
    if not panels:
        drawn = ", ".join(name for _, _, columns in _PANELS for name in columns)
        raise ValueError(f"{metrics_csv} holds no numbers to draw; it should have any of {drawn}")
    figure, all_axes = panels_of(len(panels), 3, (3.7, 2.6))
    for axes, (title, unit, columns) in zip(all_axes, panels, strict=True):
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
    return save_chart(figure, path)


def compare_curves(runs: Mapping[str, Path], path: Path | str) -> Path:
    """Draw the running means of several runs, a panel a figure that at least one of them has.

    Args:
        runs: their `metrics.csv` by the name in the legend.
        path: NAME.png.

    Raises:
        FileNotFoundError: a run has no metrics.
        ValueError: there is nothing to draw.
    """
    tables, palette = {name: read_metrics(file) for name, file in runs.items()}, Palette()
    panels = [
        (label if title == unit else f"{title}\n{label}", unit, column)
        for title, unit, columns in _PANELS
        for column, label in columns.items()
        if any(column in table and table[column].notna().any() for table in tables.values())
    ]
    if not panels:
        raise ValueError(f"{', '.join(map(str, runs.values()))}: no numbers to draw")
    figure, all_axes = panels_of(len(panels), 3, (3.7, 2.6))
    for number, (axes, (title, unit, column)) in enumerate(zip(all_axes, panels, strict=True)):
        for name, table in tables.items():
            series = (
                table.dropna(subset=[column]).groupby("step")[column].mean()
                if column in table
                else pd.Series(dtype=float)
            )
            smooth = series.rolling(max(1, len(series) // 20), min_periods=1, center=True).mean()
            axes.plot(smooth.index, smooth, color=palette[name][0], lw=1.6, label=name if number == 0 else None)
        tidy(axes, title, "step", unit)
    return save_chart(figure, path, legend_columns=1)


def sweep_chart(
    trials: pd.DataFrame, keys: Sequence[str], logarithmic: Sequence[str], metric: str, path: Path | str, *,
    ascending: bool,
) -> Path:  # fmt: skip
    """Draw the values of a sweep's trials in their order, with the best so far, and by each setting.

    Args:
        trials: columns `trial`, `value`, and one for each key.
        keys: settings that were searched.
        logarithmic: those with a logarithmic axis.
        metric: what the values are.
        path: NAME.png.
        ascending: whether the lowest value is the best.
    """
    figure, all_axes = panels_of(1 + len(keys), 3, (3.7, 2.6))
    value = trials["value"]
    best = value.cummin() if ascending else value.cummax()
    all_axes[0].plot(trials["trial"], best, color=COLORS[1], lw=1.6, drawstyle="steps-post", label="best so far")
    all_axes[0].legend(frameon=False, fontsize=7.5, labelcolor=INK)
    for axes, key in zip(all_axes, ["trial", *keys], strict=True):
        axes.scatter(trials[key], value, c=trials["trial"], cmap="Blues", vmin=-len(trials) / 2, s=14, zorder=3)
        if key in logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(LogFormatter())  # plain text: `save_figure` draws no formulas
            axes.xaxis.set_minor_formatter(LogFormatter())
        elif is_integer_dtype(trials[key]):
            axes.locator_params(axis="x", integer=True)
        tidy(axes, f"By {key}", key, metric)
    return save_chart(figure, path)


def tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title, labels and quiet axes, alike in all pictures."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, weight="bold")
    axes.set_xlabel(x_label, fontsize=8, color=INK)
    axes.set_ylabel(y_label, fontsize=8, color=INK)
    axes.tick_params(labelsize=7.5, colors=MUTED)
    axes.grid(color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def panels_of(num: int, max_across: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, row by row, each of a size in inches."""
    across = min(num, max_across)
    down = -(-num // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), facecolor="white", layout="constrained")
    return figure, [figure.add_subplot(down, across, number) for number in range(1, num + 1)]


def save_chart(figure: Figure, path: Path | str, *, legend_columns: int = 0) -> Path:
    """Write a PNG, and an SVG beside it; with so many columns a legend of all series below the panels."""
    if legend_columns:
        figure.legend(
            frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left", ncols=legend_columns
        )  # fmt: skip
    return save_figure(figure, path, svg=True)


class _Sheet:
    """Lines of pictures: titles above the first line, captions below the first picture of each, a note at the foot.

    Args:
        num_lines: at least one.
        widths: of the columns, 1 for a picture; the narrow ones are gaps.
        size: width of the sheet and height of a line, inches.
        head: room above the pictures, inches.
        foot: room below them, inches.
    """

    def __init__(
        self, num_lines: int, widths: Sequence[float], size: tuple[float, float], head: float = 0.3, foot: float = 0.45
    ) -> None:
        if not num_lines:
            raise ValueError("a sheet needs at least one lesion")
        height = head + foot + size[1] * num_lines
        self.height = height
        self.figure = Figure(figsize=(size[0], height), facecolor="white")
        self.grid = self.figure.add_gridspec(
            num_lines, len(widths), width_ratios=widths, left=0.015, right=0.985,
            top=1 - head / height, bottom=foot / height, wspace=0.05, hspace=0.24,
        )  # fmt: skip

    def draw(
        self, cell: tuple[int, int], image: Array, window: tuple[float, float], title: str = "", caption: str = ""
    ) -> Axes:
        axes = self.figure.add_subplot(self.grid[cell])
        axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if cell[0] == 0 and title:
            axes.set_title(title, fontsize=8, color=MUTED, pad=3)
        if caption:
            axes.text(0, -0.04, caption, transform=axes.transAxes, va="top", fontsize=7.5, color=INK)
        return axes

    def save(self, path: Path | str, note: str) -> Path:
        self.figure.text(0.015, 0.1 / self.height, note, fontsize=7.5, color=MUTED)
        return save_figure(self.figure, path, dpi=130)


def _planes(volume: Array) -> tuple[Array, Array, Array]:
    """Axial, coronal and sagittal plane through the centre voxel; the head is up."""
    z, y, x = (n // 2 for n in volume.shape)
    return volume[z], volume[::-1, y], volume[::-1, :, x]


def _array(patch: Tensor) -> Array:
    return np.asarray(patch.detach().float().cpu().numpy()[0])


def _mark_center(axes: Axes, shape: tuple[int, ...], *, head_up: bool) -> None:
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


class ContactRow(NamedTuple):
    """A lesion on the contact sheet: its patch, and the four views that the encoder is given."""

    title: str  # names the lesion, such as its file and row
    patch_hu: Float[Tensor, "1 z y x"]  # before augmentation
    positive: tuple[Float[Tensor, "1 z y x"], Float[Tensor, "1 z y x"]]  # as the encoder sees them
    negative: tuple[Float[Tensor, "1 z y x"], Float[Tensor, "1 z y x"]] | None  # None where none is mined


def contact_sheet(rows: Sequence[ContactRow], path: Path | str, preprocessing: Preprocessing | None = None) -> Path:
    """Draw what goes into the encoder, a row a lesion, all in the lung window.

    The patch is shown in three planes through its centre, where a cross marks the annotated point: a lesion that
    is not under the cross was annotated in another frame. Views are shown in their axial centre plane.

    Args:
        rows: at least one; a dozen still fits a page.
        path: NAME.png.
        preprocessing: says how the views were normalised, so that they are shown in the lung window too.

    Raises:
        ValueError: there are no rows.
    """
    pre, shown = preprocessing or Preprocessing(), WINDOWS_HU["lung"]
    low, high = ((hu + pre.hu_offset) / pre.hu_scale for hu in shown)
    sheet = _Sheet(len(rows), (1, 1, 1, 0.12, 1, 1, 0.12, 1, 1), (11.4, 1.62), head=0.75, foot=0.6)
    for line, row in enumerate(rows):
        planes = zip((0, 1, 2), ("axial", "coronal", "sagittal"), _planes(_array(row.patch_hu)), strict=True)
        for column, name, plane in planes:
            axes = sheet.draw((line, column), plane, shown, name, row.title if column == 0 else "")
            _mark_center(axes, plane.shape, head_up=column > 0)
        views = (*row.positive, *(row.negative or ()))
        for number, (column, view) in enumerate(zip((4, 5, 7, 8), views, strict=False)):
            sheet.draw((line, column), _planes(_array(view))[0], (low, high), f"view {number % 2}")
    heads = ((0, 2, "lesion, as read"), (4, 5, "anchor: two views"), (7, 8, "mined negative: two views"))
    for first, last, text in heads:
        begin, end = (sheet.grid[0, column].get_position(sheet.figure) for column in (first, last))
        middle, top = (begin.x0 + end.x1) / 2, begin.y1 + 0.36 / sheet.height
        sheet.figure.text(middle, top, text, ha="center", weight="bold", fontsize=9, color=INK)
    size = " x ".join(str(n) for n in rows[0].patch_hu.shape[1:])
    return sheet.save(
        path,
        f"Patches of {size} voxels (z, y, x), {pre.spacing_mm:g} mm. Lung window, {shown[0]:.0f} to {shown[1]:.0f} HU. "
        "Cross: the annotated point. Views: axial plane through the middle.",
    )


class SheetLesion(NamedTuple):
    """A lesion on the sheet of lesions in their scans."""

    title: str  # names it, such as its scan and row
    patch_hu: Int16[np.ndarray, "z y x"]  # canonical LPS, the annotated point in voxel `size // 2` of each axis


def lesion_sheet(lesions: Sequence[SheetLesion], path: Path | str, spacing_mm: float) -> Path:
    """Draw the three planes through each point, two lesions a line, a cross on the point.

    Args:
        lesions: at least one.
        path: NAME.png.
        spacing_mm: edge of the voxels.

    Raises:
        ValueError: there are no lesions.
    """
    lung, soft_tissue = WINDOWS_HU.values()
    sheet = _Sheet(-(-len(lesions) // 2), (1, 1, 1, 1, 0.15, 1, 1, 1, 1), (11.4, 1.55))
    for number, lesion in enumerate(lesions):
        axial, coronal, sagittal = _planes(lesion.patch_hu)
        panels = (
            ("axial, lung", axial, lung),
            ("axial, soft tissue", axial, soft_tissue),
            ("coronal", coronal, lung),
            ("sagittal", sagittal, lung),
        )
        for column, (name, plane, window) in enumerate(panels):
            cell = number // 2, column + 5 * (number % 2)
            axes = sheet.draw(cell, plane, window, name, "" if column else lesion.title)
            _mark_center(axes, plane.shape, head_up=column > 1)
    edge_mm = lesions[0].patch_hu.shape[-1] * spacing_mm
    windows = " and ".join(f"{low:.0f} to {high:.0f}" for low, high in (lung, soft_tissue))
    return sheet.save(
        path,
        f"Planes through the annotated point (cross), {edge_mm:g} mm wide; windows {windows} HU. Right is on the left.",
    )


def retrieval_sheet(
    queries: Sequence[int],
    neighbors: Neighbors,
    read_patch: Callable[[int], Tensor],
    caption: Callable[[int], str],
    path: Path | str,
    *,
    window_hu: tuple[float, float] = WINDOWS_HU["lung"],
) -> Path:
    """Draw each query and its neighbours, the axial plane through the middle of each patch.

    Args:
        queries: rows of the features.
        neighbors: a row a query.
        read_patch: gives a row's patch, HU, `(1, z, y, x)`.
        caption: a short text under a row's patch.
        path: NAME.png.
        window_hu: darkest and brightest value shown.
    """
    across = neighbors.rows.shape[1]
    sheet = _Sheet(len(queries), (1, 0.08, *[1] * across), (1.72 * (across + 1) + 0.3, 1.95), foot=0.6)
    for line, query in enumerate(queries):
        near = zip(range(2, across + 2), neighbors.rows[line], neighbors.cosines[line], strict=True)
        for column, row, cosine in ((0, query, None), *near):
            if row < 0:
                continue
            axes = sheet.draw((line, column), _planes(_array(read_patch(int(row))))[0], window_hu)
            axes.spines[:].set(
                visible=True, color="#d9622b" if cosine is None else LINE, linewidth=2.4 if cosine is None else 0.8
            )
            below = caption(int(row)) if cosine is None else f"{caption(int(row))}\ncosine {cosine:.3f}"
            axes.text(0.5, -0.04, below, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, color=INK)
            if line == 0 and column in (0, 2):
                title = "query" if column == 0 else "nearest lesions of other patients"
                axes.set_title(title, fontsize=9, color=INK, weight="bold", pad=5, loc="left")
    low, high = window_hu
    note = "Axial plane through the middle of each patch, {:.0f} to {:.0f} HU. The patient's right is on the left."
    return sheet.save(path, note.format(low, high))


class SalientLesion(NamedTuple):
    """A lesion on the saliency sheet."""

    title: str  # what it is and what the probe said
    patch_hu: Int16[Tensor, "1 z y x"]
    falls: Float[np.ndarray, "z y x"]  # of `saliency.occlusion`


def saliency_sheet(
    lesions: Sequence[SalientLesion], path: Path | str, *, window_hu: tuple[float, float] = WINDOWS_HU["lung"]
) -> Path:
    """Draw patches, axial and coronal through the middle, plain and with what blurring each place does.

    Args:
        lesions: at least one.
        path: NAME.png.
        window_hu: darkest and brightest value shown.
    """
    sheet = _Sheet(len(lesions), (1, 1, 1, 1, 0.06, 0.4), (8.8, 2.15), head=0.35)
    for line, lesion in enumerate(lesions):
        limit = max(float(np.abs(lesion.falls).max()), 1e-12)
        pairs = zip(("axial", "coronal"), _planes(_array(lesion.patch_hu)), _planes(lesion.falls), strict=False)
        for column, (name, plane, falls) in zip((0, 2), pairs, strict=True):
            sheet.draw((line, column), plane, window_hu, name, "" if column else lesion.title)
            axes = sheet.draw((line, column + 1), plane, window_hu, f"{name}, saliency")
            axes.imshow(falls, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.7 * np.abs(falls) / limit)
        scale = sheet.figure.add_subplot(sheet.grid[line, 4])
        sheet.figure.colorbar(ScalarMappable(Normalize(-limit, limit), "RdBu_r"), cax=scale)
        scale.tick_params(labelsize=7, colors=MUTED)
        if line == 0:
            scale.set_title("log-odds", fontsize=7, color=MUTED, pad=5)
    return sheet.save(
        path,
        "Red: blurring this region lowers the log-odds. Blue: blurring it raises them. "
        "Patient's right on the left, head up.",
    )
