"""`python train.py` in processes of its own that may be killed, without the seconds that importing torch takes."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from tiny_runs import REPO, assert_equal_weights, checkpoint_of, metrics_of

#: Figures that a clock has made.
TIMED = re.compile("perf/.*")

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["fmcib_ssl.run", "fmcib_ssl.training.config", "fmcib_ssl.augment", "fmcib_ssl.data.prepare"]
)

OPTIONS = [
    "+experiment=ct_infonce",
    "encoder=small",
    "data.patch_size=[16,16,16]",
    "data.batch_size=2",
    "trainer.max_epochs=4",
    "optimizer.base_lr=0.1",
    "contact_sheet_rows=0",
    "callbacks.progress.refresh_rate=0",
    "callbacks.checkpoint.every_n_train_steps=2",
    "hardware.num_workers=0",
]
NUM_STEPS = 12


def start(
    table: Path,
    run: Path,
    *overrides: str,
    environ: dict[str, str] | None = None,
    start_method: str | None = None,
    named: bool = True,
) -> BaseProcess:
    """Begin `python train.py` on a tiny archive; what it prints goes to `run.out`.

    It is in the run folder `run` or, if that is not `named` to it, in one of its own choice below `run`.
    """
    where = f"hydra.run.dir={run}" if named else f"paths.runs={run}"
    arguments = [*OPTIONS, f"data.annotations={table}", f"paths.data={table.parent}", where, *overrides]
    process = _SERVER.Process(target=_train, args=(arguments, run.with_suffix(".out"), environ or {}, start_method))
    process.start()
    return process


def _train(arguments: list[str], output: Path, environ: dict[str, str], start_method: str | None) -> None:
    os.environ.update(environ)
    multiprocessing.set_start_method(start_method, force=True)  # of data workers
    rank_zero_only.rank = int(environ.get("LOCAL_RANK", 0))  # Lightning has looked before
    torch.set_num_threads(1)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(REPO / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def end(process: BaseProcess, timeout_s: float = 250) -> int:
    """Wait for the end; gives the exit code, or minus the signal that killed it."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still there after {timeout_s} s")
    return process.exitcode


def wait_for(condition: Callable[[], bool], process: BaseProcess, timeout_s: float = 250) -> None:
    """Wait until something is so, and the process is still there."""
    patience = time.monotonic() + timeout_s
    while not condition():
        assert process.is_alive(), f"it ended with {process.exitcode} before that"
        assert time.monotonic() < patience
        time.sleep(0.002)


def steps_logged(run: Path) -> int:
    """Rows in the metrics so far."""
    try:
        return max(0, (run / "metrics.csv").read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def assert_same_runs(run: Path, whole: Path) -> None:
    """Weights, optimizer, schedule, counters and metrics, bit for bit; all but what a clock has made."""
    one, other = checkpoint_of(run), checkpoint_of(whole)
    assert_equal_weights(one["state_dict"], other["state_dict"])
    for parameter, state in other["optimizer_states"][0]["state"].items():
        assert_equal_weights(one["optimizer_states"][0]["state"][parameter], state)
    for part in ("lr_schedulers", "global_step", "epoch", "loops"):
        assert one[part] == other[part], part
    assert torch.equal(one["fmcib_ssl_rng"][0]["torch"], other["fmcib_ssl_rng"][0]["torch"])
    tables = [metrics_of(folder) for folder in (run, whole)]
    tables = [table[sorted(name for name in table if not TIMED.match(name))] for table in tables]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
