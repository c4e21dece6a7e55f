"""The notebooks under `examples/` run from top to bottom on synthetic scans, and are committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

from fmcib_ssl.data import make_archive
from fmcib_ssl.models import export_encoder, small_resnet
from fmcib_ssl.types import Preprocessing

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: Less of everything than a reader's notebook has.
SMALLER = {
    "TRAINING": "+experiment=ct_cpu data.batch_size=4 encoder.widths=[4,4,8,8] trainer.max_steps=2",
    "EVALUATION": "num_bootstrap=50 folds=3",
}


def run(name: str, folder: Path, parameters: dict[str, str]) -> list[Any]:
    """The outputs of a notebook that runs in a folder, its parameters set otherwise."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    first = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    first.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    archive = make_archive(tmp_path, num_scans=12, progress=False)
    pd.read_csv(archive).rename(columns={"label": "malignant"}).to_csv(tmp_path / "my.csv", index=False)
    return tmp_path


@pytest.mark.parametrize("name", ["own_ct.ipynb", "features_in_scikit_learn.ipynb"])
def test_are_committed_without_outputs(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_from_a_table_to_a_report(folder: Path) -> None:
    run("own_ct.ipynb", folder, SMALLER)
    assert "malignant" in (folder / "report.html").read_text()
    assert (folder / "my_run" / "encoder.safetensors").is_file()


@pytest.mark.slow
def test_features_in_scikit_learn(folder: Path) -> None:
    spec = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}
    torch.manual_seed(0)
    encoder = small_resnet([4, 4, 8, 8])
    export_encoder(encoder, spec, Preprocessing((16, 16, 16), 2.0), folder / "encoder.safetensors")
    outputs = run("features_in_scikit_learn.ipynb", folder, {})
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert all(name in tables[0] for name in ("encoder", "random weights", "HU statistics", "raw voxels"))
