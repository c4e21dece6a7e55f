"""Runs with the switches of `hardware`: the losses of plain runs, exact resume, and two processes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny_runs import assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

import fmcib_ssl
from fmcib_ssl.run import pretrain

OPTIONS = ["+experiment=ct_infonce", "encoder=small", "schedule=constant", "schedule.warmup=0", "optimizer.base_lr=0.1"]
SWITCHES = [f"hardware.{name}=true" for name in ("channels_last", "skip_padded_kernels", "gradient_checkpointing")]
PLAIN = ["hardware.precision=32-true", "hardware.skip_padded_kernels=false"]


def run_for(epochs: int, table: Path, run: Path, *overrides: str) -> Path:
    pretrain(tiny_settings(table, run, *OPTIONS, f"trainer.max_epochs={epochs}", *overrides))
    return run


@pytest.mark.slow
def test_switches_change_no_loss_and_resume_is_exact_with_them(
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
    plain = run_for(2, phantom_table, tmp_path / "plain", *PLAIN)
    assert metrics_of(whole)["train/loss"].tolist() == pytest.approx(metrics_of(plain)["train/loss"], rel=1e-3)
    assert checkpoint_of(whole)["state_dict"].keys() == checkpoint_of(plain)["state_dict"].keys()
    run_for(3, phantom_table, parts, *PLAIN)  # a run goes on without them
    fmcib_ssl.load_encoder(parts / "encoder.safetensors")
