"""`python train.py` as a user types it, in one process and in two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import REPO, checkpoint_of, metrics_of

import fmcib_ssl

#: A user's own encoder. It has no batch norm, so that a batch may be divided without changing anything.
ENCODER = """
from torch import nn

def group_norm_net(width):
    layers = [nn.Conv3d(1, width, 3, stride=2), nn.GroupNorm(2, width), nn.ReLU(), nn.Conv3d(width, 2 * width, 3)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
"""
TARGET = "my_encoders.group_norm_net"
WIDTH = 8
GLOBAL_BATCH = 4


def train_with(num_processes: int, folder: Path) -> tuple[Path, str]:
    """Train two steps of `GLOBAL_BATCH` lesions; gives the run folder and what was printed."""
    command = [sys.executable, str(REPO / "train.py"), "--config-dir", "my_configs", "+experiment=ct_ntxent_mined"]
    data = ["data.annotations=archive/annotations.csv", "data.patch_size=[16,16,16]"]
    model = ["encoder=mine", "head.batch_norm=false", "optimizer=lars", "optimizer.trust_coeff=0.02"]
    model += ["optimizer.base_lr=64", "trainer.max_epochs=2", "seed=3"]  # a rate of 1: a step is 2 % of a weight's norm
    split = [f"hardware.devices={num_processes}", f"data.batch_size={GLOBAL_BATCH // num_processes}"]
    result = subprocess.run(
        [*command, *data, *model, *split, "hardware.num_workers=1", "callbacks.progress.refresh_rate=0"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (folder / "runs" / "ct_ntxent_mined").iterdir()
    return run, result.stdout + result.stderr


def user_folder(phantom_table: Path, folder: Path) -> Path:
    (folder / "my_encoders.py").write_text(ENCODER)
    (folder / "my_configs" / "encoder").mkdir(parents=True)
    (folder / "my_configs" / "encoder" / "mine.yaml").write_text(f"_target_: {TARGET}\nwidth: {WIDTH}\n")
    shutil.copytree(phantom_table.parent, folder / "archive")
    return folder


@pytest.fixture(scope="module")
def one(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return train_with(1, user_folder(phantom_table, tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return train_with(2, user_folder(phantom_table, tmp_path_factory.mktemp("two")))


@pytest.mark.parametrize("processes", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_one_run_folder_with_everything_once(processes: str, request: pytest.FixtureRequest) -> None:
    run, printed = request.getfixturevalue(processes)
    expected = "checkpoints config.yaml contact_sheet.png curves.png curves.svg encoder.safetensors environment.json"
    expected += " metrics.csv train.log run.json .lock"
    assert {path.name for path in run.iterdir() if path.stat().st_size} == set(expected.split())
    assert metrics_of(run)["step"].tolist() == [0, 1]
    log = (run / "train.log").read_text()
    assert "6 in 4 scans" in log and "2 in all, 1 an epoch" in log
    assert f" {GLOBAL_BATCH if processes == 'one' else 2} lesions on each of" in log
    for text in (log, printed):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        assert len(lines) == len(set(lines)), lines
        assert "Traceback" not in text and "Warning" not in text and "deprecated" not in text


def test_an_encoder_of_ones_own_comes_back(one: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = one
    monkeypatch.syspath_prepend(run.parents[2])
    files = (run / "encoder.safetensors", run / "checkpoints" / "last.ckpt")
    encoders = [fmcib_ssl.load_encoder(file, trusted_targets=[TARGET]) for file in files]
    with torch.no_grad():
        features, again = (encoder(torch.ones(2, 1, 16, 16, 16)) for encoder in encoders)
    assert features.shape == (2, 2 * WIDTH) and torch.equal(features, again)


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(one: tuple[Path, str], two: tuple[Path, str]) -> None:
    """The same lesions, views, loss and steps; to rounding, since sums are taken in another order."""
    losses_one, losses_two = (metrics_of(run)["train/loss"].tolist() for run in (one[0], two[0]))
    assert losses_two == pytest.approx(losses_one, rel=1e-4)
    assert metrics_of(two[0])["lr"].tolist() == metrics_of(one[0])["lr"].tolist()
    checkpoint_one, checkpoint_two = (checkpoint_of(run) for run in (one[0], two[0]))
    weights_one, weights_two = checkpoint_one["state_dict"], checkpoint_two["state_dict"]
    assert weights_one.keys() == weights_two.keys()
    for name, weight in weights_one.items():
        scale = float(weight.abs().max())
        torch.testing.assert_close(weights_two[name], weight, rtol=1e-4, atol=1e-4 * scale, msg=name)
    # The steps were a hundred times as long as what may differ.
    last_step = checkpoint_one["optimizer_states"][0]["state"][0]["momentum_buffer"]
    assert last_step.norm() > 1e-2 * weights_one["encoder.0.weight"].norm()
