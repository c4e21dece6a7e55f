"""The same seed is the same run: with any number of workers, and when it is interrupted and gone on with."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

from fmcib_ssl.run import train

#: The rate depends on the length of a run, unless it is constant.
OPTIONS = ["+experiment=ct_infonce", "encoder=small", "schedule=constant", "schedule.warmup=0", "optimizer.base_lr=0.1"]
STEPS_PER_EPOCH = 3


def run_for(epochs: int, phantom_table: Path, run: Path, *overrides: str) -> Path:
    train(tiny_settings(phantom_table, run, *OPTIONS, f"trainer.max_epochs={epochs}", *overrides))
    return run


@pytest.fixture(scope="module")
def reference(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_for(2, phantom_table, tmp_path_factory.mktemp("reference"))


def losses_of(run: Path) -> list[float]:
    losses: list[float] = metrics_of(run)["train/loss"].tolist()
    return losses


def test_workers_make_no_difference(reference: Path, phantom_table: Path, tmp_path: Path) -> None:
    run = run_for(2, phantom_table, tmp_path, "hardware.num_workers=2")
    assert losses_of(run) == losses_of(reference)
    assert_equal_weights(checkpoint_of(run)["state_dict"], checkpoint_of(reference)["state_dict"])


def test_another_seed_is_another_run(reference: Path, phantom_table: Path, tmp_path: Path) -> None:
    run = run_for(2, phantom_table, tmp_path, "seed=1")
    assert not set(losses_of(run)) & set(losses_of(reference))


def test_interrupted_and_gone_on_with(
    reference: Path, phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_for(1, phantom_table, tmp_path)
    first = checkpoint_of(tmp_path)
    assert first["global_step"] == STEPS_PER_EPOCH
    with caplog.at_level(logging.INFO):
        run_for(2, phantom_table, tmp_path)
    assert f"going on from {tmp_path / 'checkpoints' / 'last.ckpt'}" in caplog.text

    resumed, uninterrupted = checkpoint_of(tmp_path), checkpoint_of(reference)
    assert resumed["global_step"] == uninterrupted["global_step"] == 2 * STEPS_PER_EPOCH
    assert_equal_weights(resumed["state_dict"], uninterrupted["state_dict"])
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (resumed, uninterrupted)]
    for parameter, state in states[1].items():
        assert_equal_weights(states[0][parameter], state)
    # The second part has to have learned something, or it would equal anything.
    changed = [name for name, w in first["state_dict"].items() if not torch.equal(w, resumed["state_dict"][name])]
    assert len(changed) > len(first["state_dict"]) / 2

    kept = pd.read_csv(tmp_path / "metrics.before-restart-1.csv")
    together = pd.concat([kept, metrics_of(tmp_path)])
    assert together["step"].tolist() == list(range(2 * STEPS_PER_EPOCH))
    assert together["train/loss"].tolist() == losses_of(reference)


@pytest.mark.parametrize(("accumulated", "steps_per_epoch"), [(1, 3), (2, 2), (5, 1)])
def test_the_steps_announced_are_the_steps_taken(
    accumulated: int, steps_per_epoch: int, phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three batches an epoch: the last step of an epoch may have fewer to accumulate."""
    with caplog.at_level(logging.INFO):
        run_for(2, phantom_table, tmp_path, f"trainer.accumulate_grad_batches={accumulated}")
    assert f"{2 * steps_per_epoch} in all, {steps_per_epoch} an epoch" in caplog.text
    assert checkpoint_of(tmp_path)["global_step"] == 2 * steps_per_epoch
