"""The developer's page: its examples are run as they stand."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import fmcib_ssl

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "develop.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
TINY = [
    "hardware=cpu", "hardware.num_workers=0", "data.patch_size=[16,16,16]", "data.batch_size=4", "trainer.max_steps=2",
    "contact_sheet_rows=0", "callbacks.progress.refresh_rate=0", "head.hidden_dim=16", "head.out_dim=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    for name, content in BLOCK.findall(PAGE):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


def test_every_example_is_short() -> None:
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == PAGE.count("```python") + PAGE.count("```yaml") == 9
    assert all(len(content.splitlines()) < 30 for _, content in blocks)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_commands_train(number: int, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the encoder of one's own comes back, from both files, as the page says."""
    command = re.findall(r"^    python (train\.py .*)$", PAGE, re.MULTILINE)[number].split()
    store = f"data.store={REPO / 'tests' / 'golden' / 'files' / 'store'}"
    arguments = [store if word == "data.store=my_store" else word for word in command[1:]]
    done = subprocess.run(
        [sys.executable, str(REPO / command[0]), *arguments, *TINY, f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=examples, env={**os.environ, "PYTHONPATH": f"{REPO}:{examples}"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["train/loss"].notna().sum() == 2
    monkeypatch.syspath_prepend(examples)
    files = (tmp_path / "run" / name for name in ("encoder.safetensors", "checkpoints/last.ckpt"))
    encoders = [fmcib_ssl.load_encoder(file, trusted_targets=["my_package.encoders.TwoConvolutions"]) for file in files]
    features, again = (encoder(torch.ones(2, 1, 16, 16, 16)) for encoder in encoders)
    assert features.shape == (2, 8) and torch.equal(features, again)


def test_the_importer(examples: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(examples)
    (tmp_path / "table.csv").write_text(
        "scan,column,row,slice,spacing_x,spacing_y,spacing_z,patient\na.nii,10,20,4,0.5,0.5,2.5,007\n"
    )
    row = importlib.import_module("my_package.importers").voxel_table(tmp_path / "table.csv").iloc[0]
    assert row[["coordX", "coordY", "coordZ"]].tolist() == [5, 10, 10]
    assert (row["image_path"], row["PatientID"]) == ("a.nii", "007")
