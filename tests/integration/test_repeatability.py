"""The same seed is the same run: with any number of workers, and when it is trained for longer."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import assert_equal_weights, checkpoint_of, metrics_of, tiny_settings

from fmcib_ssl.run import pretrain
from fmcib_ssl.training.loggers import MetricsFile
from fmcib_ssl.training.run_folder import RunFolderError

#: The rate depends on the length of a run, unless it is constant.
OPTIONS = ["+experiment=ct_infonce", "encoder=small", "schedule=constant", "schedule.warmup=0", "optimizer.base_lr=0.1"]
STEPS_PER_EPOCH = 3


def run_for(epochs: int, phantom_table: Path, run: Path, *overrides: str) -> Path:
    pretrain(tiny_settings(phantom_table, run, *OPTIONS, f"trainer.max_epochs={epochs}", *overrides))
    return run


@pytest.fixture(scope="module")
def reference(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_for(2, phantom_table, tmp_path_factory.mktemp("reference"))


def losses_of(run: Path) -> list[float]:
    losses: list[float] = metrics_of(run)["train/loss"].tolist()
    return losses


@pytest.mark.slow
def test_another_seed_is_another_run(reference: Path, phantom_table: Path, tmp_path: Path) -> None:
    run = run_for(2, phantom_table, tmp_path, "seed=1")
    assert not set(losses_of(run)) & set(losses_of(reference))


def test_a_finished_run_is_left_alone_and_may_be_trained_for_longer(
    reference: Path, phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_for(1, phantom_table, tmp_path)
    first = checkpoint_of(tmp_path)
    assert first["global_step"] == STEPS_PER_EPOCH
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    with caplog.at_level(logging.INFO):
        loss = pretrain(tiny_settings(phantom_table, tmp_path, *OPTIONS, "trainer.max_epochs=1"))
    assert "is finished, after 3 steps" in caplog.text and "trainer.max_epochs" in caplog.text
    assert loss == losses_of(tmp_path)[-1]
    changed = {file.name for file, time in times.items() if file.stat().st_mtime_ns != time}
    assert changed <= {"run.json", ".lock"}

    with caplog.at_level(logging.INFO):
        run_for(2, phantom_table, tmp_path)
    assert (
        f"resuming {tmp_path} at step 3; run=new starts afresh" in caplog.text
        and "trainer.max_epochs: 1 before, 2 now" in caplog.text
    )
    resumed, uninterrupted = checkpoint_of(tmp_path), checkpoint_of(reference)
    assert resumed["global_step"] == uninterrupted["global_step"] == 2 * STEPS_PER_EPOCH
    assert_equal_weights(resumed["state_dict"], uninterrupted["state_dict"])
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (resumed, uninterrupted)]
    for parameter, state in states[1].items():
        assert_equal_weights(states[0][parameter], state)
    # The second part has to have learned something, or it would equal anything.
    changed = {name for name, w in first["state_dict"].items() if not torch.equal(w, resumed["state_dict"][name])}
    assert len(changed) > len(first["state_dict"]) / 2
    assert metrics_of(tmp_path)["step"].tolist() == list(range(2 * STEPS_PER_EPOCH))
    assert losses_of(tmp_path) == losses_of(reference)


@pytest.mark.slow
def test_a_refused_start_leaves_a_finished_run_as_it_is(
    phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained for longer on other lesions: refused, and the command that made it still knows its run."""
    table = tmp_path / "table.csv"
    rows = pd.read_csv(phantom_table)
    rows["image_path"] = [str(phantom_table.parent / path) for path in rows["image_path"]]
    rows.to_csv(table, index=False)
    run_for(1, table, tmp_path / "run")

    def files() -> dict[str, bytes]:
        paths = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.read_bytes() for path in paths}

    before = files()
    rows.iloc[::-1].to_csv(table, index=False)
    with pytest.raises(RunFolderError, match=r"trained on other lesions.*run=new"):
        run_for(2, table, tmp_path / "run")
    assert files() == before
    rows.assign(comment="seen").to_csv(table, index=False, sep=";")  # the lesions are the same
    with caplog.at_level(logging.INFO):
        run_for(1, table, tmp_path / "run")
    assert "is finished, after 3 steps" in caplog.text
    run_for(2, table, tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 2 * STEPS_PER_EPOCH


def test_a_run_whose_rows_cannot_be_written_is_not_finished(
    phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(MetricsFile, "_write_anew", full)
        with pytest.raises(RunFolderError, match=r"lacks the last checkpoint.*make room"):
            run_for(1, phantom_table, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is None
    run_for(1, phantom_table, tmp_path)
    assert metrics_of(tmp_path)["step"].tolist() == list(range(STEPS_PER_EPOCH))


@pytest.mark.parametrize(("accumulated", "steps_per_epoch"), [(1, 3), (2, 2), (5, 1)])
def test_the_steps_announced_are_the_steps_taken(
    accumulated: int, steps_per_epoch: int, phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three batches an epoch: the last step of an epoch may have fewer to accumulate."""
    with caplog.at_level(logging.INFO):
        run_for(2, phantom_table, tmp_path, f"trainer.accumulate_grad_batches={accumulated}")
    assert f"{2 * steps_per_epoch} in all, {steps_per_epoch} an epoch" in caplog.text
    assert checkpoint_of(tmp_path)["global_step"] == 2 * steps_per_epoch
