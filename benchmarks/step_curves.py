"""Whether fast settings learn what plain ones learn: loss curves of both on the phantom, over several seeds.

    python benchmarks/step_curves.py                # about 20 minutes of a core; again: goes on where it was stopped

Plain is float32, uncompiled, in the default layout. Fast has the switches of docs/step.md on; with `hardware=gpu` that
includes bfloat16. A seed decides weights, order, mined negatives and views, so the two curves of a seed differ by
rounding alone. That is compared with how far apart the seeds are. Prints the figures, writes
benchmarks/results/step_curves.json and docs/images/step_curves.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from pydantic import Field, PositiveInt

from fmcib_ssl.io import Command, parse_command
from fmcib_ssl.run import pretrain
from fmcib_ssl.training import CONFIG_NAME, read_settings

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "step_curves.json"
PICTURE = REPO / "docs" / "images" / "step_curves.png"

SETTINGS = {
    "plain": [
        "hardware.precision=32-true",
        "hardware.channels_last=false",
        "hardware.skip_padded_kernels=false",
        "hardware.compile=false",
    ],
    "fast": [
        "hardware.precision=auto",
        "hardware.channels_last=true",
        "hardware.skip_padded_kernels=true",
        "hardware.compile=true",
    ],
}
COLORS = {"plain": "tab:gray", "fast": "tab:blue"}


class StepCurves(Command):
    """Train the phantom with fast and with plain settings, and compare the losses."""

    workspace: Path = Field(Path("runs") / "step_curves", description="folder for the phantom and the runs")
    hardware: str = Field("cpu", description="of configs/hardware")
    seeds: int = Field(5, ge=2, description="runs of each kind")
    epochs: PositiveInt = Field(20, description="of each run")
    scans: PositiveInt = Field(140, description="of the phantom archive")
    compile: bool = Field(True, description="false: fast is uncompiled")
    output: Path = Field(RESULTS, description="JSON file")
    picture: Path = Field(PICTURE, description="PNG file")


def losses(command: StepCurves, kind: str, seed: int) -> npt.NDArray[np.float64]:
    """The mean loss of every epoch of a run; trained unless the workspace has it."""
    switches = SETTINGS[kind] if command.compile else [*SETTINGS[kind][:-1], "hardware.compile=false"]
    run = command.workspace / f"{kind}-seed{seed}-epochs{command.epochs}{'' if command.compile else '-uncompiled'}"
    overrides = [
        "+experiment=phantom_ntxent_mined",
        f"hardware={command.hardware}",
        f"seed={seed}",
        f"trainer.max_epochs={command.epochs}",
        f"data.phantom.folder={command.workspace / 'phantom'}",
        f"data.phantom.num_scans={command.scans}",
        f"paths.run={run}",
        "hardware.num_workers=0",
        "contact_sheet_rows=0",
        "callbacks.progress.refresh_rate=0",
        *switches,
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(REPO / "configs")):
        settings = read_settings(compose(CONFIG_NAME, overrides))
    pretrain(settings)
    table = pd.read_csv(run / "metrics.csv")
    steps = table["train/loss"].to_numpy()
    return steps.reshape(command.epochs, -1).mean(axis=1)


def compare(plain: npt.NDArray[np.float64], fast: npt.NDArray[np.float64]) -> dict[str, Any]:
    """How far the kinds are apart, in units of how far the seeds are.

    Args:
        plain: `(seeds, epochs)`, mean losses.
        fast: the same.
    """
    spread = plain.std(axis=0, ddof=1)
    apart = (fast.mean(axis=0) - plain.mean(axis=0)) / spread
    inside = (fast >= plain.min(axis=0)) & (fast <= plain.max(axis=0))
    return {
        "last_loss": {"plain": plain[:, -1].tolist(), "fast": fast[:, -1].tolist()},
        "seed_to_seed_sd_of_the_last": float(spread[-1]),
        "means_apart_in_sd_last": float(apart[-1]),
        "means_apart_in_sd_largest": float(np.abs(apart).max()),
        "same_seed_apart_in_sd_rms": float(np.sqrt((((fast - plain) / spread) ** 2).mean())),
        "two_seeds_apart_in_sd_rms": float(np.sqrt(2)),
        "share_within_range_of_plain": float(inside.mean()),
    }


def draw(curves: dict[str, npt.NDArray[np.float64]], path: Path) -> None:
    """A line a run, and the range of the plain ones."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = np.arange(1, curves["plain"].shape[1] + 1)
    low, high = curves["plain"].min(axis=0), curves["plain"].max(axis=0)
    axes.fill_between(epochs, low, high, color=COLORS["plain"], alpha=0.25, label="range of the plain runs")
    for kind, runs in curves.items():
        for number, run in enumerate(runs):
            axes.plot(epochs, run, color=COLORS[kind], linewidth=1, label=f"{kind}, each seed" if not number else None)
    axes.set(xlabel="epoch", ylabel="training loss, mean of the epoch", xlim=(1, len(epochs)))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Train, compare, draw."""
    command = parse_command(StepCurves, arguments)
    torch.set_num_threads(1)
    curves = {kind: np.stack([losses(command, kind, seed) for seed in range(command.seeds)]) for kind in SETTINGS}
    results = {
        "torch": torch.__version__,
        "seeds": command.seeds,
        "epochs": command.epochs,
        "hardware": command.hardware,
        "settings": SETTINGS if command.compile else {**SETTINGS, "fast": SETTINGS["fast"][:-1]},
        **compare(curves["plain"], curves["fast"]),
        "curves": {kind: runs.tolist() for kind, runs in curves.items()},
    }
    draw(curves, command.picture)
    for key, value in results.items():
        if key != "curves":
            print(f"{key:<30} {value}")
    command.output.parent.mkdir(parents=True, exist_ok=True)
    command.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
