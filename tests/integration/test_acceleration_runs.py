"""Runs with the switches of `hardware`: the losses of plain runs, exact resume, and two processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from starts import OPTIONS as STARTED
from starts import assert_same_runs
from tiny_runs import REPO, assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

import fmcib_ssl
from fmcib_ssl.run import pretrain

OPTIONS = ["+experiment=ct_infonce", "encoder=small", "schedule=constant", "schedule.warmup=0", "optimizer.base_lr=0.1"]
SWITCHES = [f"hardware.{name}=true" for name in ("channels_last", "skip_padded_kernels", "gradient_checkpointing")]
PLAIN = ["hardware.precision=32-true", "hardware.skip_padded_kernels=false"]


def run_for(epochs: int, table: Path, run: Path, *overrides: str) -> Path:
    pretrain(tiny_settings(table, run, *OPTIONS, f"trainer.max_epochs={epochs}", *overrides))
    return run


def test_switches_change_no_loss_and_a_run_goes_on_with_or_without_them(phantom_table: Path, tmp_path: Path) -> None:
    plain = run_for(2, phantom_table, tmp_path / "plain", *PLAIN)
    mixed = tmp_path / "mixed"
    for epochs, switches in ((1, SWITCHES), (2, [])):
        run_for(epochs, phantom_table, mixed, *PLAIN, *switches)
    assert metrics_of(mixed)["train/loss"].tolist() == pytest.approx(metrics_of(plain)["train/loss"], rel=1e-3)
    assert checkpoint_of(mixed)["state_dict"].keys() == checkpoint_of(plain)["state_dict"].keys()
    fmcib_ssl.load_encoder(mixed / "encoder.safetensors")


def test_resume_is_exact_with_the_switches_on(
    phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    switches = ["hardware.precision=auto", *SWITCHES]
    with caplog.at_level(logging.INFO):
        whole = run_for(2, phantom_table, tmp_path / "whole", *switches)
    assert "32-true, channels_last, skip_padded_kernels, gradient_checkpointing" in caplog.text
    parts = tmp_path / "parts"
    for epochs in (1, 2):
        run_for(epochs, phantom_table, parts, *switches)
    assert_equal_weights(checkpoint_of(parts)["state_dict"], checkpoint_of(whole)["state_dict"])
    assert metrics_of(parts)["train/loss"].tolist() == metrics_of(whole)["train/loss"].tolist()


@pytest.mark.slow
def test_compiled_runs_go_on_exactly_and_keep_the_names_of_weights(phantom_table: Path, tmp_path: Path) -> None:
    switches = [*PLAIN, *SWITCHES, "hardware.compile=true"]
    whole = run_for(2, phantom_table, tmp_path / "whole", *switches)
    parts = tmp_path / "parts"
    for epochs in (1, 2):
        run_for(epochs, phantom_table, parts, *switches)
        torch._dynamo.reset()  # as another process would
    assert_same_runs(parts, whole)
    plain = run_for(2, phantom_table, tmp_path / "plain", *PLAIN)
    assert checkpoint_of(whole)["state_dict"].keys() == checkpoint_of(plain)["state_dict"].keys()
    assert metrics_of(whole)["train/loss"].tolist() == pytest.approx(metrics_of(plain)["train/loss"], rel=1e-3)


@pytest.mark.slow
def test_compiled_on_two_processes(phantom_table: Path, tmp_path: Path) -> None:
    """The losses of two processes that compile are those of two that do not."""
    options = [option for option in STARTED if "batch_size" not in option]
    options += ["data.batch_size=1", "head.batch_norm=false", "hardware.devices=2", "trainer.max_epochs=1", *PLAIN]
    losses = []
    for switch in ("false", "true"):
        run = tmp_path / switch
        command = [sys.executable, str(REPO / "train.py"), *options, f"data.annotations={phantom_table}"]
        command += [f"paths.data={phantom_table.parent}"]
        command += [f"hydra.run.dir={run}", f"hardware.compile={switch}", f"hardware.gradient_checkpointing={switch}"]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "uncompiled" not in done.stdout + done.stderr
        losses.append(metrics_of(run)["train/loss"].tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
