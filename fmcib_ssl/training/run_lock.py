"""One run at a time in a folder: by the kernel's lock or, where a file system has none, by a claim with a heartbeat."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK_FILE, CLAIM_FILE = ".lock", ".claim"
#: A run that is killed may take a moment to let go.
LOCK_PATIENCE_S = 10.0
#: A claim is renewed so often, and taken over when it was not for so long.
BEAT_S, SILENCE_S = 10.0, 60.0

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class RunLock:
    """Holds a folder for this process; another one of the same process may hold it too.

    The kernel's lock ends with the process, however it ends, and its children do not inherit it. Over a network there
    may be none. Then a file names the process and is touched every ten seconds; who finds one watches whether it is.

    Args:
        folder: it exists.

    Raises:
        OSError: it cannot be written.
        Held: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._released = threading.Event()
        self._claim = ""
        self._file: IO[str] = (folder / LOCK_FILE).open("a+")
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise

    def release(self) -> None:
        """Let others have the folder; the end of the process does so too."""
        self._file.close()
        self._released.set()
        if self._claim and _read(self._folder / CLAIM_FILE)[0] == self._claim:
            (self._folder / CLAIM_FILE).unlink(missing_ok=True)
        self._claim = ""

    def _lock(self) -> None:
        try:
            import fcntl  # noqa: PLC0415
        except ImportError:  # Windows
            self._make_claim()
            return
        patience = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self._make_claim()
                    return
                if time.monotonic() > patience:
                    self._file.seek(0)
                    raise Held(self._file.read().strip() or "unknown") from error
                time.sleep(0.2)
            else:
                self._file.truncate(0)
                self._file.write(f"{_this_process()}\n")
                self._file.flush()
                return

    def _make_claim(self) -> None:
        file, claim = self._folder / CLAIM_FILE, f"{_this_process()} {secrets.token_hex(4)}"
        while True:
            try:
                with file.open("x") as new:
                    new.write(claim)
                break
            except FileExistsError:
                if _read(file)[0].startswith(f"{_this_process()} "):
                    return  # of another one in this process
                _wait_for_silence(file)
        self._claim = claim
        logger.warning(
            "%s: this file system has no locks. %s, renewed every %g s, keeps other runs out",
            self._folder, CLAIM_FILE, BEAT_S,
        )  # fmt: skip
        threading.Thread(target=self._beat, args=(file, claim), daemon=True).start()

    def _beat(self, file: Path, claim: str) -> None:
        while not self._released.wait(BEAT_S):
            if (now := _read(file)[0]) and now != claim:
                # This process was suspended for so long that another took its place; a step more, and both would write.
                sys.stderr.write(f"error: {self._folder} was taken over by another run: this one ends\n")
                os._exit(1)
            try:
                os.utime(file)
            except OSError as error:
                logger.warning("%s cannot be renewed: %s", file, error.strerror or error)


class Held(Exception):  # noqa: N818  (caught where it is known what to do)
    """Another process has the folder; the message is its name."""


def _wait_for_silence(file: Path) -> None:
    """Take a claim away that nobody has renewed for as long as it takes; clocks of machines are not compared.

    Raises:
        Held: somebody has.
    """
    before = _read(file)
    logger.info("%s was there before: waiting up to %g s whether that run is still at work", before[0], SILENCE_S)
    patience = time.monotonic() + SILENCE_S
    while time.monotonic() < patience:
        time.sleep(min(1.0, BEAT_S / 4))
        if (now := _read(file)) == ("", 0):
            return  # released
        if now != before:
            raise Held(now[0].rpartition(" ")[0] or "unknown")
    file.unlink(missing_ok=True)


def _read(file: Path) -> tuple[str, int]:
    """What a claim says, and when it was renewed; over a network only opening a file looks at the server's copy."""
    try:
        with file.open() as opened:
            return opened.read(), os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return "", 0


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
