"""What the recipes of configs/augment make of a lesion: the picture of docs/augment.md.

    python benchmarks/view_pictures.py

Lesions of the phantom archive: on the left the middle slice of the patch, then that of eight views by each recipe.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from pydantic import Field, PositiveInt
from views import RECIPES, REPO, shipped

from fmcib_ssl.data import LesionPatches, StoreSettings, make_archive, store_for_table
from fmcib_ssl.io import Command, parse_command
from fmcib_ssl.types import Preprocessing

SIZE, NUM_VIEWS = 40, 8


class Pictures(Command):
    """Draw views of phantom lesions by every recipe.

    python benchmarks/view_pictures.py
    """

    lesions: PositiveInt = Field(default=2, description="how many lesions")
    output: Path = Field(default=REPO / "docs" / "images" / "views.png", description="the picture, PNG")


def main(arguments: Sequence[str]) -> None:
    """Make the archive, draw."""
    command = parse_command(Pictures, arguments)
    preprocessing = Preprocessing((SIZE,) * 3, 1.25)
    with tempfile.TemporaryDirectory() as folder:
        make_archive(Path(folder), command.lesions)
        store = store_for_table(
            Path(folder) / "annotations.csv", Path(folder), StoreSettings(1.25), num_workers=0
        ).store
        patches = LesionPatches(store, preprocessing.patch_size_zyx, negatives_per_lesion=0)
        num = min(command.lesions, len(patches))
        figure = Figure(figsize=(NUM_VIEWS + 1.3, 1.03 * num * len(RECIPES) + 0.3), facecolor="white", dpi=80)
        grid = figure.add_gridspec(
            num * len(RECIPES), NUM_VIEWS + 1, left=0.1, right=0.998, top=0.955, bottom=0.005, wspace=0.03, hspace=0.03
        )
        for lesion in range(num):
            patch = patches.positive(lesion * len(patches) // num)
            for number, recipe in enumerate(RECIPES):
                row = lesion * len(RECIPES) + number
                views = shipped(recipe, SIZE)(patch.expand(NUM_VIEWS, -1, -1, -1, -1), torch.arange(NUM_VIEWS))
                for column, image in enumerate(preprocessing.normalize(torch.stack([patch.float(), *views]))):
                    axes = figure.add_subplot(grid[row, column])
                    _show(axes, image)
                    if column == 0:
                        axes.set_ylabel(recipe.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=10)
                    if row == 0 and column < 2:
                        axes.set_title("patch" if column == 0 else "views", fontsize=10, loc="left")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgb = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    command.output.parent.mkdir(parents=True, exist_ok=True)
    rgb.quantize(64).save(command.output, optimize=True)
    print(f"{command.output}: {command.output.stat().st_size / 1024:.0f} KB")


def _show(axes: Axes, view: torch.Tensor) -> None:
    # -1000 to 400 HU, as a view holds them.
    axes.imshow(view[0, SIZE // 2], cmap="gray", vmin=24 / 3072, vmax=1424 / 3072)
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    main(sys.argv[1:])
