"""Pretrain an encoder on synthetic scans, then show what it learned: a table and a page. `make demo` runs this.

Making scans, preparing them and training are the commands a user would type. What was learned is measured on patients
that were held out: a linear probe tells the two classes of lesions apart from frozen features, beside the same encoder
with random weights and the raw voxels.
"""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import yaml
from hydra.utils import instantiate

import fmcib_ssl
from fmcib_ssl.data import LesionPatches
from fmcib_ssl.evaluation.figures import embedding_map, roc_curves
from fmcib_ssl.evaluation.probes import (
    ProbeResult,
    embed,
    linear_probe,
    paired_auc_difference,
    raw_voxel_features,
)
from fmcib_ssl.evaluation.report import ReportFigure, Section, results_table, write_report

REPO = Path(__file__).resolve().parents[1]
EXPERIMENT = "phantom_ntxent_mined"
ARCHIVE = Path("data") / "phantom"
NUM_SCANS = 140
SPACING_MM = 1.25
#: Raw voxels are reduced to as many principal components before the probe.
NUM_COMPONENTS = 64


def main(overrides: list[str]) -> None:
    """Make scans, prepare them, train, measure, report; `overrides` go to the training."""
    began = time.monotonic()
    run = Path("runs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    table, store = ARCHIVE / "annotations.csv", ARCHIVE / "store"
    show_and_run("scripts/phantom.py", f"folder={ARCHIVE}", f"num_scans={NUM_SCANS}")
    show_and_run("scripts/prepare.py", f"annotations={table}", f"store={store}", f"spacing_mm={SPACING_MM}")
    show_and_run("train.py", f"+experiment={EXPERIMENT}", f"data.store={store}", f"hydra.run.dir={run}", *overrides)

    config = yaml.safe_load((run / "config.yaml").read_text())
    print("\nmeasuring what the frozen encoder knows about lesions of patients it has never seen ...", flush=True)
    features, labels, patients, is_test = measure(run, config)
    probes = probe(features, labels, patients, is_test)
    rows = summarise(probes, labels[is_test], patients[is_test])
    scores = {name: result.scores for name, result in probes.items()}
    curves = roc_curves(labels[is_test], scores, run / "roc.png", title="Held-out patients")
    features_of_test = features["pretrained encoder"][is_test]
    map_ = embedding_map(features_of_test, class_names(labels[is_test]), run / "map.png", title="Pretrained encoder")
    page = report(run, config, rows, [curves, map_], num_train=int((~is_test).sum()), num_test=int(is_test.sum()))
    print(f"\n{results_table(rows)}\n")
    print(f"page      {page}")
    print(f"encoder   {run / 'encoder.safetensors'}   (fmcib_ssl.load_encoder reads it)")
    print(f"took      {time.monotonic() - began:.0f} s")


def show_and_run(script: str, *arguments: str) -> None:
    """Run a command as a user would, and show it."""
    print("\n$", " ".join(["python", script, *arguments]), flush=True)
    subprocess.run([sys.executable, str(REPO / script), *arguments], check=True)


def measure(run: Path, config: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Features of every lesion of the archive by each method, with labels, patients and who is held out."""
    encoder = fmcib_ssl.load_encoder(run / "encoder.safetensors")
    preprocessing = encoder.preprocessing
    patches = LesionPatches(config["data"]["store"], preprocessing.patch_size_zyx)
    positives = [patches.positive(i) for i in range(len(patches))]

    L.seed_everything(config["seed"], verbose=False)  # the weights that the training began with
    untrained = instantiate(config["encoder"])
    features = {
        "pretrained encoder": embed(encoder, positives, preprocessing),
        "random weights": embed(untrained, positives, preprocessing),
        "raw voxels": raw_voxel_features(positives, preprocessing),
    }
    rows = patches.lesions
    is_test = (rows["split"] == "test").to_numpy()
    return features, rows["label"].astype(int).to_numpy(), rows["PatientID"].to_numpy(), is_test


def probe(
    features: dict[str, np.ndarray], labels: np.ndarray, patients: np.ndarray, is_test: np.ndarray
) -> dict[str, ProbeResult]:
    """A linear probe on each method's features, fitted on the training patients, scored on the others."""
    return {
        name: linear_probe(
            values[~is_test],
            labels[~is_test],
            values[is_test],
            labels[is_test],
            train_groups=patients[~is_test],
            test_groups=patients[is_test],
            num_components=NUM_COMPONENTS if name == "raw voxels" else None,
        )
        for name, values in features.items()
    }


def summarise(probes: dict[str, ProbeResult], labels: np.ndarray, patients: np.ndarray) -> list[dict[str, object]]:
    """One row a method: AUC, and how far the pretrained encoder is ahead."""
    pretrained = probes["pretrained encoder"]
    rows: list[dict[str, object]] = []
    for name, result in probes.items():
        ahead: object = "-"
        if result is not pretrained:
            ahead = paired_auc_difference(labels, pretrained.scores, result.scores, patients)
        rows.append({"features": name, "AUC (95 % interval)": result.auc, "pretrained is ahead by": ahead})
    return rows


def class_names(labels: np.ndarray) -> np.ndarray:
    """What the two classes of the phantom's lesions look like."""
    return np.where(labels == 1, "heterogeneous, spiculated", "solid, smooth")


def report(
    run: Path,
    config: dict[str, Any],
    rows: list[dict[str, object]],
    pictures: list[Path],
    *,
    num_train: int,
    num_test: int,
) -> Path:
    """Write the page."""
    loss = ", ".join(f"{key} {value}" for key, value in config["loss"].items() if key != "_target_")
    return write_report(
        run / "report.html",
        "What the encoder learned from synthetic scans",
        [
            Section(
                "Result",
                "Lesions of two classes that differ in texture and margin, not in size, mean HU or place. The encoder "
                "was pretrained without labels. A logistic regression on its frozen features was fitted on "
                f"{num_train} lesions and scored on {num_test} lesions of other patients. Intervals: bootstrap over "
                "patients.",
                table=rows,
                figures=[
                    ReportFigure(pictures[0], "ROC curves of the probes on held-out lesions"),
                    ReportFigure(
                        pictures[1],
                        "The held-out lesions on the first two principal components, which show what varies most "
                        "(size, what lies around); the probe uses all features",
                    ),
                ],
            ),
            Section(
                "What the encoder saw",
                f"Before the first step. Loss: {loss}.",
                figures=[ReportFigure(run / "contact_sheet.png", "Lesions, their two views, their mined negative's")],
            ),
            Section(
                "Training",
                figures=[ReportFigure(run / "curves.png", "Loss, cosines, learning rate and speed by step")],
            ),
        ],
        subtitle=f"{config['name']}, seed {config['seed']}, fmcib_ssl {fmcib_ssl.__version__}",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
