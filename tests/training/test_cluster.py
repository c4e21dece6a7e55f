"""A mismatch between a job and its configuration is refused with the line to change; what Slurm is asked, and when."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from fmcib_ssl.training.cluster import check_machine, requeue
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.settings import ConfigError, Settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pretrain", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
TWO_TASKS = {**STEP, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TWO_NODES = {
    **STEP,
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def settings(*overrides: str) -> Settings:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return read_settings(compose("train", ["paths.run=here", "data.annotations=my.csv", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "environ"),
    [
        pytest.param([], {}, id="a workstation"),
        pytest.param(["hardware.devices=2"], {}, id="two processes that Lightning starts"),
        pytest.param([], JOB, id="a batch script without srun, one process"),
        pytest.param([], STEP, id="one task"),
        pytest.param(["hardware.devices=2"], TWO_TASKS, id="two tasks"),
        pytest.param(["hardware.num_nodes=2"], TWO_NODES, id="two nodes"),
        pytest.param(["hardware.devices=2", "hardware.num_nodes=2"], TORCHRUN, id="torchrun"),
        pytest.param(["hardware.devices=2"], {**JOB, "SLURM_JOB_NAME": "bash"}, id="a shell in a job"),
    ],
)
def test_what_fits_starts(overrides: list[str], environ: dict[str, str]) -> None:
    check_machine(settings(*overrides), environ)


@pytest.mark.parametrize(
    ("overrides", "environ", "fragments"),
    [
        (["hardware.devices=2"], JOB, ["2 processes need srun", "put `srun` before"]),
        ([], {**JOB, "SLURM_NTASKS": "2"}, ["2 processes", "srun"]),
        ([], TWO_TASKS, ["2 tasks", "--ntasks-per-node=1", "hardware.devices=2"]),
        (["hardware.devices=2"], STEP, ["1 tasks", "--ntasks-per-node=2", "hardware.devices=1"]),
        ([], TWO_NODES, ["2 nodes", "hardware.num_nodes=2", "--nodes=1"]),
        (
            ["hardware.devices=2"],
            {key: value for key, value in TWO_TASKS.items() if key != "SLURM_NTASKS_PER_NODE"},
            ["replace --ntasks", "--ntasks-per-node=2"],
        ),
        (["hardware.devices=4"], TORCHRUN, ["torchrun started 2", "hardware.devices=2", "--nproc-per-node=4"]),
        (["hardware.devices=2"], TORCHRUN, ["2 nodes", "hardware.num_nodes=2", "--nnodes=1"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_line_to_change(
    overrides: list[str], environ: dict[str, str], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_machine(settings(*overrides), environ)
    for part in fragments:
        assert part in str(error.value)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, fmcib_ssl.training.cluster; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Requeueing; Slurm's command is a stand-in that notes what it is asked.


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    answer_with(tmp_path, RUNNING, 0)
    return tmp_path / "asked"


def answer_with(folder: Path, shown: str, code: int) -> None:
    scontrol = folder / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then echo "{shown}"; exit 0; fi\n'
        f'echo "$@" >> {folder}/asked\n[ {code} = 0 ] || echo "Job is not requeueable" >&2\nexit {code}\n'
    )
    scontrol.chmod(0o755)


RUNNING, PUSHED_OUT = "JobState=RUNNING PreemptTime=None", "JobState=RUNNING PreemptTime=2026-01-01T00:00:00"
ARRAY = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "2"}


@pytest.mark.parametrize(
    ("signum", "shown", "environ", "code", "request_"),
    [
        pytest.param("SIGUSR1", RUNNING, {}, 75, "17", id="the signal it asked for"),
        pytest.param("SIGUSR1", RUNNING, ARRAY, 75, "16_2", id="one task of an array"),
        pytest.param("SIGTERM", PUSHED_OUT, {}, 143, "17", id="preempted"),
        pytest.param("SIGTERM", RUNNING, {}, 143, None, id="scancel --signal=TERM"),
        pytest.param("SIGTERM", "JobState=CANCELLED PreemptTime=None", {}, 143, None, id="cancelled"),
        pytest.param("SIGTERM", PUSHED_OUT.replace("RUNN", "COMPLET"), {}, 143, None, id="cancelled while preempted"),
        pytest.param("SIGTERM", "", {}, 143, None, id="no answer"),
        pytest.param("SIGINT", RUNNING, {}, 130, None, id="Ctrl-C"),
        pytest.param("SIGHUP", RUNNING, {}, 129, None, id="the terminal is closed"),
        pytest.param("SIGUSR1", RUNNING, {"SLURM_JOB_ID": None}, 75, None, id="no Slurm"),
        pytest.param("SIGUSR1", RUNNING, {"PATH": "/nowhere"}, 75, None, id="no scontrol"),
    ],
)
def test_when_a_job_is_requeued(
    signum: str, shown: str, environ: dict[str, str | None], code: int, request_: str | None, asked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answer_with(asked.parent, shown, 0)
    for name, value in environ.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert requeue(signal.Signals[signum], asked.parent / "run") == code
    assert (asked.read_text() if asked.exists() else None) == (f"requeue {request_}\n" if request_ else None)
    assert not (asked.parent / "run").exists()


def test_refused(asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer_with(tmp_path, "", 1)
    with caplog.at_level(logging.WARNING):
        assert requeue(signal.SIGUSR1, tmp_path / "run") == 75
    assert "Job is not requeueable" in caplog.text and "once more to resume" in caplog.text


def test_a_time_too_short_to_get_anywhere(
    asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three restarts that saved nothing are the end; a step, or a part of a fine-tuning, and it is queued again."""
    run = tmp_path / "run"
    assert requeue(signal.SIGUSR1, run) == 75
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert requeue(signal.SIGUSR1, run) == 78
    assert "more --time, or lower SECONDS in --signal=USR1@SECONDS" in caplog.text
    for file in ("checkpoints/step-00000004.ckpt", "fold_0/predictions.parquet"):
        (run / file).parent.mkdir(parents=True)
        (run / file).touch()
        assert requeue(signal.SIGUSR1, run) == 75
        (run / file).unlink()
    assert asked.read_text() == "requeue 17\n" * 3


def test_a_job_that_others_push_out_is_always_put_back(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(tmp_path, PUSHED_OUT, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        requeue(signum, tmp_path / "run")
    assert asked.read_text() == "requeue 17\n" * 2
