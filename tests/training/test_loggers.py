"""What loggers keep through a restart: each step once, whatever was logged after the checkpoint."""

from __future__ import annotations

import io
import logging
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fmcib_ssl.training.loggers import MetricsFile, MLflow, TensorBoard, WeightsAndBiases


def resume(logger: Any, folder: Path, step: int) -> Any:
    run: Any = SimpleNamespace(run_id="abcd1234", path=folder)
    logger.resume_from(run, step, {"seed": 3, "environment": {"git": {"commit": "c0ffee"}}})
    return logger


def log(logger: Any, steps: range, **more: float) -> None:
    for step in steps:
        logger.log_metrics({"loss": step / 7, **more}, step=step)
        logger.save()


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.csv")
    resume(first, tmp_path, 0)
    log(first, range(6))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.9")  # killed while it wrote
    second = MetricsFile(tmp_path / "metrics.csv")
    resume(second, tmp_path, 4)
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == [0, 1, 2, 3]
    log(second, range(4, 8), late=1.5)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].tolist() == list(range(8))
    assert table["loss"].tolist() == [step / 7 for step in range(8)]  # to the last bit
    assert table["late"].isna().tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("room", range(0, 160, 20))
def test_a_row_that_was_written_in_part_is_written_again_whole(room: int, tmp_path: Path) -> None:
    """The disk is full after any byte, twice; the file is as if it had never been."""
    whole, metrics = MetricsFile(tmp_path / "whole.csv"), MetricsFile(tmp_path / "metrics.csv")
    log(whole, range(8))
    log(metrics, range(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for steps in (range(2, 4), range(4, 6)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.path.stat().st_size + room // 2, limits[1]))
        try:
            log(metrics, steps)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log(metrics, range(6, 8), later=0.0)
    table = pd.read_csv(metrics.path)
    pd.testing.assert_frame_equal(table[["loss", "step"]], pd.read_csv(whole.path)[["loss", "step"]])
    assert table["later"].isna().tolist() == [True] * 6 + [False] * 2


def test_new_columns_that_cannot_be_written_do_not_shift_the_rows(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    log(metrics, range(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        log(metrics, range(2, 3), a_new_one=5.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in metrics.unwritten] == [2]
    log(metrics, range(3, 4))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["step"].tolist() == [0, 1, 2, 3] and table["loss"].tolist() == [step / 7 for step in range(4)]


@pytest.mark.parametrize(
    ("damage", "steps"),
    [
        (lambda text: text.replace(b"\r\n0.14", b"\r\n\xff.14"), [0, 2, 3]),
        (lambda text: text.replace(b"0.28", b"\0\0\0\0"), [0, 1, 3]),
        (lambda text: text.replace(b",2\r\n", b",\xc2\xb2\r\n"), [0, 1, 3]),  # a digit, and no number
        (lambda text: text.replace(b",2\r\n", b",2,7\r\n"), [0, 1, 3]),
        (lambda text: text.replace(b"loss,step", b"loss,stxp"), []),
        (lambda text: bytes(200), []),
        (lambda text: bytes(range(256)) * 9, []),
    ],
)
def test_damaged_lines_are_left_out(
    damage: Any, steps: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log(MetricsFile(tmp_path / "metrics.csv"), range(4))
    damaged = damage((tmp_path / "metrics.csv").read_bytes())
    (tmp_path / "metrics.csv").write_bytes(damaged)
    metrics = MetricsFile(tmp_path / "metrics.csv")
    resume(metrics, tmp_path, 4)
    log(metrics, range(4, 5))
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == [*steps, 4]
    if b"\n" in damaged:
        assert "damaged lines are left out" in caplog.text


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    for first, last in ((0, 6), (4, 9)):
        board = TensorBoard(tmp_path, name="tensorboard", version="")
        resume(board, tmp_path, first)
        log(board, range(first, last))
        board.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(9))


def test_tensorboard_gets_pictures(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sheet.png")
    board = TensorBoard(tmp_path)
    resume(board, tmp_path, 4)
    board.show("sheet", tmp_path / "sheet.png")
    board.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["sheet"]
    (image,) = events.Images("sheet")
    assert image.step == 4
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), pixels)


def test_offline_with_one_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The real thing, twice."""
    for step in (0, 2):
        tracker = WeightsAndBiases("project", "name", tmp_path, offline=True, timeout_s=10)
        resume(tracker, tmp_path, step)
        log(tracker, range(step, step + 2))
        assert tracker._run.id == "abcd1234"
        log(MetricsFile(tmp_path / "metrics.csv"), range(step, step + 2))
        assert dict(tracker._run.config)["seed"] == 3
        with caplog.at_level(logging.INFO):
            tracker.finish()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2  # of the same second the second has one number more
    assert all(folder.name.removesuffix("-1").endswith("-abcd1234") for folder in folders)
    assert "wandb sync" in caplog.text


def test_no_failure_of_tracking_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise RuntimeError("the service died")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    tracker = WeightsAndBiases("project", "name", tmp_path)
    resume(tracker, tmp_path, 0)
    log(tracker, range(3))
    tracker.finish()
    assert caplog.text.count("stopped working") == 1 and "metrics.csv has everything" in caplog.text


def test_mlflow_has_one_run_and_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that resumes, then one that loses the server; read back by MLflow's own client."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    uri, metrics = f"sqlite:///{tmp_path}/mlflow.db", MetricsFile(tmp_path / "metrics.csv")
    log(metrics, range(4))

    def fail(*_: object, **__: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "get_metric_history", fail)  # long, of a long run
        for step in (0, 4):
            tracker = resume(MLflow(uri, "lesions", "mine"), tmp_path, step)
            log(tracker, range(step, step + 6))
            tracker.finish()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("lesions").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(k, k / 7) for k in range(10)]
    assert run.data.params == {"seed": "3", "environment.git.commit": "c0ffee"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert run.info.artifact_uri.startswith((tmp_path / "mlflow").as_uri())
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", fail)
    broken = resume(MLflow(uri, "lesions", "mine"), tmp_path, 0)
    log(broken, range(10, 12))
    broken.finish()
