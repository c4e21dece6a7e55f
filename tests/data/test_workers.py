"""Data workers that die: the run ends, says why, and nothing is left of it."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL, SIGSEGV

import pytest
import torch
from dying_workers import die_within_the_lock
from torch.utils.data import Dataset

from fmcib_ssl.data import workers

#: A program whose worker 0 dies over lesion 4, that of its second batch; it is to end by itself.
PROGRAM = """
import contextlib, sys
sys.path[:0] = {here!r}
import test_workers as t
from fmcib_ssl.data import workers

if __name__ == "__main__":
    loader = workers.WatchedLoader(
        t.Dying({death!r}), batch_size=2, num_workers=2, persistent_workers=True, multiprocessing_context={method!r},
        title=lambda lesion: f"patient {{lesion}}",
    )
    try:
        with {guard}():
            {body}
    except workers.WorkerDiedError as error:
        sys.exit(f"error: {{error}}")
"""
READ = "for batch in loader: pass"


class Dying(Dataset[int]):
    """Lesions of which one ends its reader."""

    def __init__(self, death: str) -> None:
        self.death = death

    def __len__(self) -> int:
        return 400

    def __getitem__(self, lesion: int) -> int:
        if lesion == 4:
            getattr(self, self.death)()
        return lesion

    def within_the_lock(self) -> None:
        die_within_the_lock()

    def healthy(self) -> None:
        pass

    def killed(self) -> None:
        os.kill(os.getpid(), SIGKILL)

    def crashed(self) -> None:
        os.kill(os.getpid(), SIGSEGV)

    def ended(self) -> None:
        os._exit(3)


def run(
    tmp_path: Path, death: str, method: str = "fork", body: str = READ, guard: str = "workers.no_worker_left"
) -> str:
    """Run it to its end; gives what it says."""
    file = tmp_path / "program.py"
    file.write_text(
        PROGRAM.format(here=[*map(str, Path(__file__).parents[:2])], death=death, method=method, body=body, guard=guard)
    )
    # The workers hold its output open; so this waits for them too.
    result = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False, timeout=250)
    assert result.returncode == 1, result
    return result.stderr


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("forkserver", "spawn"))]
)
def test_killed_within_the_lock_of_the_queue(method: str, tmp_path: Path) -> None:
    message = run(tmp_path, "within_the_lock", method)
    assert "error: data worker (process" in message and "SIGKILL, likely out of memory" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("death", "reason"),
    [("killed", "was killed by SIGKILL"), ("crashed", "was killed by SIGSEGV"), ("ended", "ended by itself, code 3")],
)
def test_the_reason_and_the_lesion(death: str, reason: str) -> None:
    loader = workers.WatchedLoader(Dying(death), batch_size=2, num_workers=2, title="patient {}".format, rank=1)
    of_other_tests = multiprocessing.active_children()
    with pytest.raises(workers.WorkerDiedError) as error, workers.no_worker_left():
        list(loader)
    message = rf"data worker of rank 1 \(process \d+\) {reason}.* to read: number 4 \(patient 4\)\. .* resumes from it"
    assert re.match(message, str(error.value))
    assert set(multiprocessing.active_children()) <= set(of_other_tests)


def _no_room(_: torch.Tensor) -> None:
    raise RuntimeError("unable to allocate shared memory")


@pytest.mark.parametrize("options", [{}, {"collate_fn": list}], ids=["stacked", "listed"])
def test_no_room_in_shared_memory_is_an_error_not_a_hang(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch is made by: without, the queue's thread would drop it, and nobody would learn of it."""
    monkeypatch.setattr(torch.Tensor, "share_memory_", _no_room)
    loader = workers.WatchedLoader([torch.zeros(2)] * 4, batch_size=2, num_workers=1, **options)
    with pytest.raises(RuntimeError, match="unable to allocate shared memory"), workers.no_worker_left():
        next(iter(loader))


@pytest.mark.slow
def test_an_error_that_nobody_lets_through_ends_the_run_too(tmp_path: Path) -> None:
    message = run(tmp_path, "killed", body="next(iter(loader)); t.deaf()")
    assert "data worker (process" in message and "patient 4" in message


def deaf() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception as error:
            print(type(error))


@pytest.mark.slow
def test_workers_that_nobody_ends(tmp_path: Path) -> None:
    """As when a trainer's teardown is interrupted: Python would wait for them, and they are deaf to its SIGTERM."""
    body = "it = iter(loader); next(it); sys.exit('another')"
    assert run(tmp_path, "healthy", body=body, guard="contextlib.nullcontext") == "another\n"
