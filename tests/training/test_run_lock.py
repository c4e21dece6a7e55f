"""One run at a time, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fmcib_ssl.training import run_lock
from fmcib_ssl.training.run_lock import CLAIM_FILE, Held, RunLock

OTHER = "process 7 on elsewhere 0a1b2c3d"
#: As on a file system without locks, and impatient.
CHILD = """
import errno, fcntl, sys, time
from pathlib import Path
from fmcib_ssl.training import run_lock

def lockf(*_):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.lockf = lockf
run_lock.BEAT_S, run_lock.SILENCE_S = 0.1, 3.0
lock = run_lock.RunLock(Path(sys.argv[1]))
print("has it", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "SILENCE_S", 1.0)


@pytest.mark.usefixtures("no_locks")
def test_a_claim_that_is_renewed_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / CLAIM_FILE).write_text(OTHER)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.05):
            os.utime(tmp_path / CLAIM_FILE)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(Held, match=r"process 7 on elsewhere$"):
            RunLock(tmp_path)
    finally:
        done.set()
        thread.join()
    assert (tmp_path / CLAIM_FILE).read_text() == OTHER


@pytest.mark.usefixtures("no_locks")
def test_a_claim_of_the_dead_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CLAIM_FILE).write_text(OTHER)
    with caplog.at_level(logging.INFO):
        lock = RunLock(tmp_path)
    assert "waiting up to 1 s whether that run is still at work" in caplog.text and "has no locks" in caplog.text
    again = RunLock(tmp_path)  # of the same process, as when it asks Slurm for another start
    again.release()
    assert f"process {os.getpid()} on" in (tmp_path / CLAIM_FILE).read_text()
    lock.release()
    assert not (tmp_path / CLAIM_FILE).exists()


def test_two_processes_where_there_are_no_locks(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], text=True, **pipes)

    first = start()
    assert first.stdout and first.stdout.readline() == "has it\n"
    second = start()
    _, printed = second.communicate()
    assert second.returncode == 1 and f"Held: process {first.pid} on" in printed
    (tmp_path / CLAIM_FILE).write_text(OTHER)  # it was suspended, and another one took its place
    assert first.wait() == 1 and first.stderr and "was taken over by another run" in first.stderr.read()
