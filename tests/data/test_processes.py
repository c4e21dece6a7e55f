"""Work in processes that fail, die, and are left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest

from fmcib_ssl.data.processes import run_jobs


def work(folder: Path, item: int) -> int:
    """Square a number; 3 kills its process whenever it is tried, 5 the first time only, 7 raises."""
    (folder / f"{item}-{len(list(folder.glob(f'{item}-*')))}").touch()
    if item == 3 or (item == 5 and not (folder / "5-1").exists()):
        time.sleep(0.3)  # so that the other worker has something in hand
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 7:
        raise ValueError("seven")
    return item**2


def given_up(item: int) -> int:
    return -item


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_item_once(tmp_path: Path, num_workers: int) -> None:
    items = [0, 1, 2, 4, 6, 8]
    results = list(run_jobs(partial(work, tmp_path), items, num_workers, given_up))
    assert sorted(results) == [(i, i**2) for i in items]
    assert not list(tmp_path.glob("*-1"))


def test_killed_workers_cost_one_item(tmp_path: Path) -> None:
    results = dict(run_jobs(partial(work, tmp_path), [1, 3, 2, 5, 4, 6], 2, given_up))
    assert results == {1: 1, 2: 4, 3: -3, 4: 16, 5: 25, 6: 36}


def test_an_error_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seven"):
        list(run_jobs(partial(work, tmp_path), [1, 7, 2, 4], 1, given_up))


def test_workers_that_cannot_start_are_not_blamed_on_an_item(tmp_path: Path) -> None:
    """A script without the guard of its main part: its workers would run it again."""
    code = "from fmcib_ssl.data.processes import run_jobs\nfor result in run_jobs(abs, [1, 2], 1, abs): print(result)\n"
    script = tmp_path / "no_guard.py"
    script.write_text(code)
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode != 0
    assert BrokenProcessPool.__name__ in ended.stderr
    assert not ended.stdout
