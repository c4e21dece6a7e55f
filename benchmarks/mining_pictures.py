"""What each mining strategy picks on real scans: the pictures of docs/mining.md.

    python benchmarks/mining_pictures.py --annotations lesions.csv --image-root DIR --output docs/images

One PNG a scan of the table, `mining_1.png` and so on: a row a strategy, with the centres of 400 negatives on two mean
projections of the scan, the lesion's patch, and six negatives.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from fmcib_ssl.data import STRATEGIES, LesionPatches, Store, prepare_store, read_annotations
from fmcib_ssl.types import SampleKey

NUM_CENTERS, NUM_NEGATIVES, SIZE = 400, 6, 50
WINDOW_HU = (-1350, 350)
LESION, NEGATIVE = "#e0482d", "#2f9be0"


def picture(store: Store, index: int, path: Path) -> None:
    """Draw one lesion's negatives under every strategy."""
    plain = LesionPatches(store)
    lesion = plain.lesions.iloc[index]
    scan_id = str(lesion["scan_id"])
    scan = sorted(set(plain.lesions["scan_id"])).index(scan_id)
    hu = store.read_patch(scan_id, (0, 0, 0), store.grid(scan_id).shape_zyx)
    shown = hu.clip(*WINDOW_HU)
    center = np.floor(lesion[["center_z", "center_y", "center_x"]].to_numpy(float) + 0.5).astype(int)

    figure = Figure(figsize=(13.5, 8.2), facecolor="white", dpi=75)
    grid = figure.add_gridspec(
        len(STRATEGIES), 3 + NUM_NEGATIVES, width_ratios=(2.1, 1.7, *[1] * (1 + NUM_NEGATIVES)),
        left=0.045, right=0.995, top=0.95, bottom=0.01, wspace=0.04, hspace=0.06,
    )  # fmt: skip
    for row, name in enumerate(STRATEGIES):
        patches = LesionPatches(store, mining=name)
        query = patches.negative_query(scan, index)
        drawn = STRATEGIES[name]().draw(query, NUM_CENTERS, np.random.default_rng(0))
        assert drawn is not None
        axial, coronal = (figure.add_subplot(grid[row, column]) for column in range(2))
        _projection(axial, shown.mean(axis=0), drawn[:, [2, 1]], center[[2, 1]])
        _projection(coronal, shown.mean(axis=1), drawn[:, [2, 0]], center[[2, 0]])
        coronal.invert_yaxis()  # the head is up
        samples = [patches[SampleKey(epoch, index)] for epoch in range(NUM_NEGATIVES)]
        images = [samples[0]["positive"], *(sample["negative"] for sample in samples)]
        for column, image in enumerate(images):
            axes = figure.add_subplot(grid[row, 2 + column])
            axes.imshow(image[0, SIZE // 2], cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
            _frame(axes, LESION if column == 0 else NEGATIVE)
            if row == 0 and column < 2:
                axes.set_title("lesion" if column == 0 else "negatives", fontsize=11, loc="left")
        axial.set_ylabel(name, fontsize=12)
        if row == 0:
            axial.set_title(f"{NUM_CENTERS} centres, axial", fontsize=11, loc="left")
            coronal.set_title("coronal", fontsize=11, loc="left")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgb = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb.quantize(96).save(path, optimize=True)


def _projection(axes: Axes, image: np.ndarray, points: np.ndarray, lesion: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", aspect="equal")
    axes.scatter(*points.T, s=3, color=NEGATIVE, linewidths=0)
    axes.add_patch(Rectangle(tuple(lesion - SIZE / 2), SIZE, SIZE, fill=False, color=LESION, linewidth=1.4))
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    _frame(axes, "none")


def _frame(axes: Axes, color: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)


def main() -> None:
    """Prepare the scans of the table and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--image-root", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = read_annotations(arguments.annotations, arguments.image_root)
        prepare_store(table, Path(folder) / "store", image_root=arguments.image_root, num_workers=0)
        store = Store(Path(folder) / "store")
        for index in range(len(store.lesions)):
            path = arguments.output / f"mining_{index + 1}.png"
            picture(store, index, path)
            print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
