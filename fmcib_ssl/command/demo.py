"""Pretrain an encoder on synthetic scans, then show what it learned. `make demo` runs this.

Every step is a command that a user would type, shown before it runs. What was learned is measured on patients that were
held out: probes tell the two classes of lesions apart from frozen features, beside the same encoder with random
weights, the raw voxels and the lesion's size.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

EXPERIMENT = "phantom_ntxent_mined"
ARCHIVE = Path("data") / "phantom"
NUM_SCANS = 140
SPACING_MM = 1.25
ABOUT = (
    "Synthetic chest scans, with lesions of two classes that differ in texture and margin, not in size, mean HU or "
    "place: label 0 is solid and smooth, label 1 heterogeneous and spiculated. The encoder was pretrained without "
    "labels, on the training patients. Probes of its frozen features were fitted on these patients and scored on the "
    "others."
)


def main(overrides: Sequence[str]) -> None:
    """Make scans, prepare them, train, embed, evaluate, report; `overrides` go to the training."""
    if {"-h", "--help", "help"} & set(overrides):
        print(__doc__, "  fmcib-ssl demo [key=value ...]     for the training: fmcib-ssl train --help", sep="\n")
        return
    began = time.monotonic()
    run = Path("runs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    table, store = ARCHIVE / "annotations.csv", ARCHIVE / "store"
    encoder, features, results = run / "encoder.safetensors", run / "pretrained.parquet", run / "evaluation"
    title, page = "What the encoder learned from synthetic scans", run / "report.html"
    show_and_run("phantom", f"folder={ARCHIVE}", f"num_scans={NUM_SCANS}")
    show_and_run("prepare", f"annotations={table}", f"store={store}", f"spacing_mm={SPACING_MM}")
    show_and_run("train", f"+experiment={EXPERIMENT}", f"data.store={store}", f"hydra.run.dir={run}", *overrides)
    show_and_run("embed", f"checkpoint={encoder}", f"store={store}", f"output={features}")
    show_and_run("evaluate", f"features={features}", "label=label", "split=split", f"output={results}")
    given = (f"run={run}", f"features={features}", f"results={results}", "label=label")
    show_and_run("report", *given, f"title={title}", f"about={ABOUT}", f"out={page}")
    print(f"encoder   {encoder}   (fmcib_ssl.load_encoder reads it)")
    print(f"took      {time.monotonic() - began:.0f} s")


def show_and_run(verb: str, *arguments: str) -> None:
    """Run a command as a user would, and show it."""
    print("\n$", shlex.join(["fmcib-ssl", verb, *arguments]), flush=True)
    # -P: of this package, not of what may be called so in the current folder.
    done = subprocess.run([sys.executable, "-P", "-m", "fmcib_ssl", verb, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why
