"""A file is the old one or the new one, whatever happens while it is written."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fmcib_ssl.io import (
    atomic_write,
    read_sealed_json,
    remove_leftovers,
    write_atomically,
    write_sealed_json,
)


def test_written_read_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for content in ("Größe", b"\x00\xff", ""):
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_not_there_before_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError])
def test_an_error_keeps_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_no_flipped_bit_of_a_sealed_file_is_read(tmp_path: Path) -> None:
    """Every bit of it, so also those of the word "digest"."""
    path, values = tmp_path / "a.json", {"sizes": {"b2nd": 251979}, "complete": True}
    write_sealed_json(path, values)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read_sealed_json(path) == values, bit  # where a blank became a line's end
        except ValueError:
            continue


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_keeps_what_was_there(size: int, tmp_path: Path) -> None:
    """Also if it is only found out when the buffer is emptied."""
    path = tmp_path / "a"
    write_atomically(path, b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"n" * size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_as_readable_as_any_other_file_and_never_writable_by_all(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", "")
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "other")]
    assert modes[0] == modes[1] & ~stat.S_IWOTH


def test_a_killed_process_leaves_a_leftover_that_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    code = (
        "import os, sys; from pathlib import Path; from fmcib_ssl.io import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'new'); file.flush(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    write_atomically(path, b"newer")
    remove_leftovers(tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"newer")]


@pytest.mark.parametrize(
    ("last", "code"),
    [("", 0), ("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('error')", 1), ("raise ValueError('error')", 1)],
)
def test_a_process_exits_as_without_the_shortcut(last: str, code: int) -> None:
    """Code, output and functions registered with `atexit` are Python's own; modules are not taken down."""
    script = (
        "import atexit, sys\nfrom fmcib_ssl.io import exit_without_teardown\n"
        "class Module:\n    def __del__(self): print('taken down', flush=True)\n"
        "with exit_without_teardown():\n"
        "    atexit.register(print, 'registered')\n    sys.modules['module'] = Module()\n    print('done')\n    "
    )
    done = subprocess.run(
        [sys.executable, "-c", script + (last or "pass")], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "done\nregistered\n")
    assert ("error" in done.stderr) == ("error" in last)
