"""Pictures of docs/when_mined_negatives_pay.md, of what benchmarks/sarcoma.py wrote.

python benchmarks/sarcoma_figures.py                   # the result
python benchmarks/sarcoma_figures.py data=DIR          # and places and negatives on scans, from the workspace
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from measure import REPO, RESULTS
from pydantic import Field
from sarcoma_data import KINDS, SIZE_ZYX, Mask, Sarcomas, load

from fmcib_ssl.data import STRATEGIES, Store
from fmcib_ssl.io import Command, parse_command

PANELS = {
    ("tumour", "outside", "auc"): "tumour, or body\n10 mm off (AUC)",
    ("tumour", "similar", "auc"): "tumour, or similar\ntissue (AUC)",
    ("same_tumour", "inside", "recall_at_1"): "finds its tumour\namong 17 (recall at 1)",
    ("texture", "mean", "spearman"): "nodules: texture\n(Spearman)",
    ("margin", "mean", "spearman"): "nodules: margin\n(Spearman)",
}
COLORS = {"mined": "#2f9be0", "both": "#2ca02c", "lesions": "#d62728", "untrained": "#7f7f7f", "other": "#9467bd"}
UNTRAINED = ("random", "hu_statistics", "raw_voxels")
KIND_COLORS = dict(zip(KINDS, ("#e0482d", "#2f9be0", "#2ca02c"), strict=True))
WINDOW_HU = (-160, 240)
PATIENTS = ("STS_002", "STS_014", "STS_027", "STS_043")
NUM_SHOWN = 2


class SarcomaFigures(Command):
    """Draw the pictures of docs/when_mined_negatives_pay.md."""

    data: Path | None = Field(None, description="folder with ct/sarcoma/; null: only the result")
    workspace: Path = Field(Path("runs/sarcoma"), description="that of benchmarks/sarcoma.py")
    results: Path = Field(RESULTS / "sarcoma.json", description="what benchmarks/sarcoma.py wrote")
    folder: Path = Field(REPO / "docs" / "img", description="where the pictures go")


def forest(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Value and interval of every contender, a panel a question, in the order of the second."""
    of = {(row["method"], row["task"], row["target"], row["metric"]): row for row in rows}
    order = [(of[key]["value"], key[0]) for key in of if key[1:] == list(PANELS)[1]]
    methods = [name for _, name in sorted(order)]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 0.26 * len(methods) + 1.3), sharey=True)
    for panel, (question, title) in zip(panels, PANELS.items(), strict=True):
        for place, method in enumerate(methods):
            row = of[method, *question]
            family = "untrained" if method in UNTRAINED else method.split("_")[0].replace("infonce", "both")
            error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            color = COLORS.get(family, COLORS["other"])
            panel.errorbar(row["value"], place, xerr=error, fmt="o", color=color, markersize=4, linewidth=1)
        panel.set_title(title, fontsize=9)
        panel.set_yticks(range(len(methods)), [name.replace("_", " ") for name in methods])
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", linewidth=0.3)
    panels[2].axvline(1 / 17, color="black", linewidth=0.6, linestyle=":")
    _save(figure, path, "all")


def places(sarcomas: Sarcomas, store: Store, masks: dict[str, Mask], workspace: Path, path: Path) -> None:
    """A row a patient: an axial slice with the places near it, then patches of each kind and negatives mined."""
    inside = sarcomas.places[sarcomas.places["kind"] == "inside"].reset_index(drop=True)
    centers = {name: np.load(workspace / f"pool-{name}.npz")["centers"] for name in STRATEGIES}
    columns = [*KINDS, *(f"mined: {name}" for name in STRATEGIES)]
    figure = plt.figure(figsize=(16, 1.75 * len(PATIENTS) + 0.3))
    grid = figure.add_gridspec(
        len(PATIENTS), 1 + NUM_SHOWN * len(columns), width_ratios=(1.8, *[1] * NUM_SHOWN * len(columns)),
        left=0.005, right=0.995, top=0.94, bottom=0.01, wspace=0.05, hspace=0.04,
    )  # fmt: skip
    for row, patient in enumerate(PATIENTS):
        own = sarcomas.places[sarcomas.places["PatientID"] == patient]
        asking = inside.index[inside["PatientID"] == patient]
        scan_id = str(store.lesions.loc[store.lesions["PatientID"] == patient, "scan_id"].iloc[0])
        volume = store.read_patch(scan_id, (0, 0, 0), store.grid(scan_id).shape_zyx)
        z = int(own.loc[own["kind"] == "inside", "z"].median())
        _slice(figure.add_subplot(grid[row, 0]), volume[z], own[(own["z"] - z).abs() <= SIZE_ZYX[0]], patient)
        y, x = np.indices(volume[z].shape)
        points = store.grid(scan_id).to_lps_mm(np.stack([np.full(y.size, z), y.ravel(), x.ravel()], 1).astype(float))
        in_tumour = (masks[patient].distances_at(points) == 0).reshape(y.shape)
        figure.axes[-1].contour(in_tumour, [0.5], colors="#f0c000", linewidths=1)
        shown = [own.loc[own["kind"] == kind, ["z", "y", "x"]].to_numpy()[:NUM_SHOWN] for kind in KINDS]
        shown += [centers[name][asking[:NUM_SHOWN], 0] for name in STRATEGIES]
        for number, (name, of_column) in enumerate(zip(columns, shown, strict=True)):
            for k, center in enumerate(of_column):
                start = center - SIZE_ZYX // 2
                patch = store.read_patch(scan_id, start.tolist(), SIZE_ZYX.tolist())
                axes = figure.add_subplot(grid[row, 1 + NUM_SHOWN * number + k])
                axes.imshow(patch[SIZE_ZYX[0] // 2], cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
                _frame(axes, KIND_COLORS.get(name, "#9467bd"))
                if row == 0 and k == 0:
                    axes.set_title(name, fontsize=9, loc="left")
    _save(figure, path, None)


def _slice(axes: Any, image: np.ndarray, near: Any, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
    height, width = SIZE_ZYX[1:]
    for place in near.itertuples():
        corner = (place.x - width / 2, place.y - height / 2)
        axes.add_patch(Rectangle(corner, width, height, fill=False, color=KIND_COLORS[place.kind], linewidth=1))
    _frame(axes, "none")
    axes.text(3, 12, title, color="white", fontsize=8)


def _frame(axes: Any, color: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)


def _save(figure: Any, path: Path, layout: str | None) -> None:
    if layout is not None:
        figure.tight_layout()
    figure.savefig(path, dpi=85)
    plt.close(figure)
    print(path)


def main(arguments: Sequence[str]) -> None:
    """Draw both, or one."""
    command = parse_command(SarcomaFigures, arguments)
    mpl.use("agg")
    command.folder.mkdir(parents=True, exist_ok=True)
    forest(json.loads(command.results.read_text(encoding="utf-8"))["rows"], command.folder / "sarcoma_results.png")
    if command.data is not None:
        sarcomas, store = load(command.data, command.workspace), Store(command.workspace / "store")
        masks = {name: Mask.read(command.data / "ct" / "sarcoma" / f"{name}_mask.nii.gz") for name in PATIENTS}
        path = command.folder / "sarcoma_places.png"
        places(sarcomas, store, masks, command.workspace, path)


if __name__ == "__main__":
    main(sys.argv[1:])
