"""What Slurm is asked, and when; its command is a stand-in that notes what it is asked."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

from fmcib_ssl.training.requeue import requeue


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    answer_with(tmp_path, "JobState=RUNNING PreemptTime=None", 0)
    return tmp_path / "asked"


def answer_with(folder: Path, shown: str, code: int) -> None:
    scontrol = folder / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then echo "{shown}"; exit 0; fi\n'
        f'echo "$@" >> {folder}/asked\n[ {code} = 0 ] || echo "Job is not requeueable" >&2\nexit {code}\n'
    )
    scontrol.chmod(0o755)


def test_the_signal_it_asked_for(asked: Path) -> None:
    assert requeue(signal.SIGUSR1)
    assert asked.read_text() == "requeue 17\n"


def test_one_task_of_an_array(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue(signal.SIGUSR1)
    assert asked.read_text() == "requeue 16_2\n"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),
        ("JobState=RUNNING PreemptTime=None", False),  # scancel --signal=TERM
        ("JobState=CANCELLED PreemptTime=None", False),
        ("JobState=COMPLETING PreemptTime=2026-01-01T00:00:00", False),
        ("", False),
    ],
)
def test_sigterm_only_if_preempted(shown: str, expected: bool, asked: Path, tmp_path: Path) -> None:
    answer_with(tmp_path, shown, 0)
    assert requeue(signal.SIGTERM) == expected == asked.exists()


def test_ctrl_c_is_the_end(asked: Path) -> None:
    assert not requeue(signal.SIGINT) and not asked.exists()


def test_refused(asked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer_with(tmp_path, "", 1)
    with caplog.at_level(logging.WARNING):
        assert not requeue(signal.SIGUSR1)
    assert "Job is not requeueable" in caplog.text and "once more to go on" in caplog.text


def test_no_scontrol_here(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert not requeue(signal.SIGUSR1)


def test_no_slurm(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue(signal.SIGUSR1) and not asked.exists()
