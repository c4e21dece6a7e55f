"""One process at a time, also where the file system has no locks."""

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

from fmcib_ssl import io
from fmcib_ssl.io import Held, Lock

OTHER = "process 7 on elsewhere 0a1b2c3d"
#: Takes a lock until its input ends; with an argument as on a file system without locks, and impatient.
CHILD = """
import errno, fcntl, sys
from pathlib import Path
from fmcib_ssl import io

def lockf(*_):
    raise OSError(errno.ENOLCK, "No locks available")

if len(sys.argv) > 2:
    fcntl.lockf, io._BEAT_S, io._SILENCE_S = lockf, 0.1, 3.0
lock = io.Lock(Path(sys.argv[1]) / ".lock")
print("has it", flush=True)
sys.stdin.read()
lock.release()
"""


def start(folder: Path, *how: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), *how], text=True, **pipes)


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(io, "_BEAT_S", 0.05)
    monkeypatch.setattr(io, "_SILENCE_S", 1.0)


def test_another_process_is_kept_out_until_the_first_lets_go(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert first.stdout and first.stdout.readline() == "has it\n"
    with pytest.raises(Held, match=f"process {first.pid} on"):
        Lock(tmp_path / ".lock")
    first.kill()
    with Lock(tmp_path / ".lock", patience_s=60):
        assert start(tmp_path).communicate()[1].count(f"Held: process {os.getpid()} on")
    Lock(tmp_path / ".lock").release()
    assert not (tmp_path / ".claim").exists()


@pytest.mark.usefixtures("no_locks")
def test_a_claim_that_is_renewed_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / ".claim-1").write_text(OTHER)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.05):
            os.utime(tmp_path / ".claim-1")

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(Held, match=r"process 7 on elsewhere$"):
            Lock(tmp_path / ".lock-1")
    finally:
        done.set()
        thread.join()
    assert (tmp_path / ".claim-1").read_text() == OTHER


@pytest.mark.usefixtures("no_locks")
def test_a_claim_of_the_dead_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".claim").write_text(OTHER)
    with caplog.at_level(logging.INFO):
        lock = Lock(tmp_path / ".lock")
    assert "waiting up to 1 s to see whether that run is still alive" in caplog.text and "has no locks" in caplog.text
    assert f"process {os.getpid()} on" in (tmp_path / ".claim").read_text()
    lock.release()
    assert not (tmp_path / ".claim").exists()


def test_two_processes_where_there_are_no_locks(tmp_path: Path) -> None:
    first = start(tmp_path, "no locks")
    assert first.stdout and first.stdout.readline() == "has it\n"
    second = start(tmp_path, "no locks")
    _, printed = second.communicate()
    assert second.returncode == 1 and f"Held: process {first.pid} on" in printed
    (tmp_path / ".claim").write_text(OTHER)  # it was suspended, and another one took its place
    assert first.wait() == 1 and first.stderr and "was taken over by another run" in first.stderr.read()
