"""What the code computed, and the files that it wrote, when they were made golden; and how to make them.

`files/` holds a store, a run folder that was stopped, an encoder and a feature table as commit 4d22717 wrote them: such
files users have, and they must go on loading. `golden.json` holds the losses of seeded runs, bit for bit.

    python tests/golden/golden.py losses      makes golden.json anew, for a change that is meant to change numbers
    python tests/golden/golden.py files DIR   writes files like those of files/ into DIR
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
FILES = HERE / "files"
GOLDEN = HERE / "golden.json"
NUM_STEPS = 20
STOPPED_AFTER = 7  # at least; a signal comes when it comes

#: Direction cosines (columns: the scan's own axes) of stored scans: six ways along the axes of LPS, one oblique.
DIRECTIONS = {
    "lps": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "ras": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "flipped_z": ((1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "sagittal": ((0, 0, 1), (1, 0, 0), (0, -1, 0)),
    "transposed": ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
    "oblique": ((0.8, -0.6, 0), (0.6, 0.8, 0), (0, 0, 1)),
}
SHAPE_ZYX, SPACING_XYZ = (24, 40, 40), (1.2, 1.2, 2.0)
LESIONS_PER_SCAN = 3

TINY = [
    "hardware=cpu",
    "hardware.num_workers=0",
    "hardware.num_threads=1",
    "data.patch_size=[10,10,10]",
    "contact_sheet_rows=0",
    "callbacks.progress.refresh_rate=0",
    f"trainer.max_steps={NUM_STEPS}",
    "trainer.max_epochs=100",
]
NARROW = ["encoder=small", "encoder.widths=[4,4,8,8]", "head.hidden_dim=16", "head.out_dim=8"]
PLAIN = ["+experiment=ct_infonce", *NARROW, "data.batch_size=4", "optimizer.base_lr=0.1"]
TWO_RANKS = ["hardware.devices=2", "data.batch_size=2", "head.batch_norm=false"]
#: Every shipped pretraining experiment, and one of them with workers, with a method of each kind, and on two ranks.
RUNS: dict[str, list[str]] = {
    "ct_infonce": PLAIN,
    "ct_infonce, 2 workers": [*PLAIN, "hardware.num_workers=2"],
    "ct_infonce, 2 ranks": [*PLAIN, *TWO_RANKS],
    "ct_infonce, chunks, streamed": [*PLAIN, "method.chunk_size=2", "loss.kernel=streamed"],
    "ct_ntxent_mined": ["+experiment=ct_ntxent_mined", *NARROW, "data.batch_size=4"],
    "nodule_recipe": [
        "+experiment=nodule_recipe", "encoder=concentric", "data.batch_size=8", "data.patch_size=[8,12,12]",
    ],
    "deeplesion_ntxent_mined": [
        "+experiment=deeplesion_ntxent_mined", *NARROW, "data.spacing_mm=1.5", "data.batch_size=4",
    ],
    "deeplesion_infonce": ["+experiment=deeplesion_infonce", *NARROW, "data.spacing_mm=1.5", "data.batch_size=4"],
    "simclr": ["+experiment=ct_infonce", "method=simclr", *NARROW, "data.batch_size=8"],
    "vicreg": [
        "+experiment=ct_infonce", "method=vicreg", *NARROW[:2], "data.batch_size=8",
        "method.hidden_dim=16", "method.out_dim=8",
    ],
}  # fmt: skip


def make_scans(folder: Path) -> Path:
    """Scans of smooth tissue in air, stored along other axes each, and a table of points in them."""
    folder.mkdir(parents=True)
    rows = []
    for number, (name, direction) in enumerate(DIRECTIONS.items()):
        rng = np.random.default_rng(number)
        z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE_ZYX), indexing="ij")
        body = np.where(y**2 + x**2 < 0.9, 40.0 + 60 * np.sin(5 * x + number) * np.cos(4 * y) * np.cos(3 * z), -1000)
        image = sitk.GetImageFromArray((body + rng.integers(-4, 5, SHAPE_ZYX)).round().astype(np.int16))
        image.SetSpacing(SPACING_XYZ)
        image.SetDirection(np.ravel(np.array(direction, dtype=float)).tolist())
        image.SetOrigin((10.0 * number, -5.0, 3.25))
        file = f"{name}.nii.gz" if number % 2 else f"{name}.nrrd"
        sitk.WriteImage(image, str(folder / file), useCompression=True)
        for _ in range(LESIONS_PER_SCAN):
            index = [float(rng.uniform(0.35 * n, 0.65 * n)) for n in SHAPE_ZYX[::-1]]
            point = image.TransformContinuousIndexToPhysicalPoint(index)
            label = len(rows) % 2
            rows.append((file, *(round(value, 3) for value in point), f"P{number}", label, 4.5 + len(rows) % 5))
    table = folder / "lesions.csv"
    columns = ["image_path", "coordX", "coordY", "coordZ", "PatientID", "label", "diameter_mm"]
    pd.DataFrame(rows, columns=columns).to_csv(table, index=False)
    return table


def command(*arguments: object, wait: bool = True) -> subprocess.Popen[str]:
    """Start a command of the project as a user would, on one thread."""
    script, *options = map(str, arguments)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, str(REPO / script), *options],
        env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if wait:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{script} {' '.join(options)} ended with {process.returncode}:\n{output}")
    return process


def prepare(table: Path, store: Path) -> None:
    """Bring the golden scans into a store of 1.5 mm."""
    command("scripts/prepare.py", f"annotations={table}", f"store={store}", "spacing_mm=1.5", "sheet_lesions=0",
            "num_workers=1")  # fmt: skip


def losses(run: Path, *, whole: bool = True) -> list[str]:
    """The loss of every step, as `float.hex`; of a `whole` run there are `NUM_STEPS`."""
    rows = pd.read_csv(run / "metrics.csv")
    assert rows["step"].tolist() == list(range(NUM_STEPS if whole else len(rows)))
    return [float(loss).hex() for loss in rows["train/loss"]]


def train(name: str, store: Path, run: Path, *overrides: str) -> list[str]:
    """One of `RUNS` from a store."""
    command(*training(name, store, run), *overrides)
    return losses(run)


def training(name: str, store: Path, run: Path) -> list[str]:
    """The command line of one of `RUNS`; what it chooses itself wins over `TINY`."""
    chosen = {option.split("=")[0] for option in RUNS[name]}
    tiny = [option for option in TINY if option.split("=")[0] not in chosen]
    return ["train.py", *tiny, *RUNS[name], f"data.store={store}", f"hydra.run.dir={run}"]


def arithmetic() -> dict[str, str]:
    """What the bits of a float may depend on besides the code."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}


def stop(name: str, store: Path, run: Path) -> None:
    """Begin one of `RUNS`, and stop it by a signal once it has taken `STOPPED_AFTER` steps."""
    process = command(*training(name, store, run), wait=False)
    metrics = run / "metrics.csv"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") <= STOPPED_AFTER:
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before step {STOPPED_AFTER}")
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    process.communicate()


def make_files(folder: Path) -> None:
    """A store, a run that was stopped, the encoder of the whole run, and its features of the store's lesions."""
    with tempfile.TemporaryDirectory() as scratch:
        prepare(make_scans(Path(scratch) / "scans"), folder / "store")
        stop("ct_infonce", folder / "store", folder / "run")
        train("ct_infonce", folder / "store", Path(scratch) / "whole")
        shutil.copy(Path(scratch) / "whole" / "encoder.safetensors", folder)
    embed(folder / "encoder.safetensors", folder / "store", folder / "features.parquet")


def embed(encoder: Path, store: Path, output: Path) -> None:
    """Features of every lesion of a store."""
    command("scripts/embed.py", f"checkpoint={encoder}", f"store={store}", f"output={output}", "device=cpu")


def make_losses() -> None:
    """`golden.json` from the store of `files/`, which stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: train(name, FILES / "store", Path(scratch) / f"run{i}") for i, name in enumerate(RUNS)}
    GOLDEN.write_text(json.dumps({"arithmetic": arithmetic(), "losses": runs}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["files"]:
        make_files(Path(sys.argv[2]))
    else:
        make_losses()
