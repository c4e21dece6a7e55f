"""`python train.py` whose data workers die: an end with the reason, and the same command resumes to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from starts import assert_same_runs, end, start

pytestmark = pytest.mark.attack

OPTIONS = ["hardware.num_workers=2", "augment._target_=dying_workers.DyingViews"]


@pytest.fixture(scope="module")
def whole(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert end(start(phantom_table, run)) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_killed_within_the_lock_of_the_queue(method: str, phantom_table: Path, whole: Path, tmp_path: Path) -> None:
    run, fuse = tmp_path / "run", tmp_path / "fuse"
    options = [*OPTIONS, f"+augment.fuse={fuse}"]
    fuse.touch()
    assert end(start(phantom_table, run, *options, start_method=method)) == 1
    said = run.with_suffix(".out").read_text()
    assert "error: data worker " in said and "SIGKILL, likely out of memory" in said and "phantom_" in said
    assert "Traceback" not in said
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert not fuse.exists()
    assert end(start(phantom_table, run, *options, start_method="fork")) == 0
    assert_same_runs(run, whole)


@pytest.mark.slow
def test_a_callback_that_fails_over_an_error(phantom_table: Path, tmp_path: Path) -> None:
    """Then nobody ends the workers, and Python waits for them at its own end."""
    run = tmp_path / "run"
    options = ["hardware.num_workers=2", "+callbacks.fails._target_=dying_workers.FailsOverAnError"]
    assert end(start(phantom_table, run, *options)) == 1
    assert "LookupError: over an error" in run.with_suffix(".out").read_text()
