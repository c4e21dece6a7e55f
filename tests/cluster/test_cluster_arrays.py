"""Job arrays: a sweep through Hydra's launcher, seeds through the batch script, a store in shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from cluster_runs import HELD_AT, PATIENCE_S, REPO, Bench, assert_same_runs, gate, held_in, starts_of
from tiny_runs import checkpoint_of

from fmcib_ssl.data.store import Store

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SHARDS = 3


def runs_by_seed(bench: Bench) -> list[Path]:
    """The run folders, which must be of the seeds 0, 1 and so on."""
    runs = {yaml.safe_load(file.read_text())["seed"]: file.parent for file in bench.folder.glob("runs/*/*/config.yaml")}
    return [runs[seed] for seed in range(len(runs))]


def test_a_sweep_of_four_of_which_one_is_queued_again(bench: Bench, whole_one: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    # There is one process in each run, so only that of seed 0 waits.
    options = [*bench.options(), *launcher, *gate(bench.folder / "gate", "${seed}"), "seed=0,1,2,3"]
    with (bench.folder / "sweep.out").open("w") as output:
        sweep = subprocess.Popen(
            [sys.executable, "train.py", "--multirun", *options],
            cwd=REPO,
            env={**os.environ, **bench.cluster.environ, **bench.environ},
            stdout=output,
            stderr=output,
        )
        try:
            _, number = bench.cluster.wait_until(
                lambda: held_in(bench.folder / "gate"), "the first run's middle", PATIENCE_S
            )
            bench.cluster.run("scancel", "--signal=USR1", number)
            assert sweep.wait(PATIENCE_S) == 0, (bench.folder / "sweep.out").read_text()
        finally:
            sweep.kill()
            sweep.wait()
    runs = runs_by_seed(bench)
    assert len(runs) == 4
    assert_same_runs(runs[0], whole_one)
    assert [[start["step"] for start in starts_of(run)] for run in runs] == [[0, HELD_AT], [0], [0], [0]]
    assert all(checkpoint_of(run)["global_step"] == checkpoint_of(whole_one)["global_step"] for run in runs)
    losses = [tuple(pd.read_csv(run / "metrics.csv")["train/loss"]) for run in runs]
    assert len(set(losses)) == 4
    (log,) = runs[0].parent.glob(".submitit/*_0/*_log.out")
    printed = log.read_text()
    assert "stopped by SIGUSR1" in printed and "resuming" in printed and "Traceback" not in printed


def test_an_array_of_seeds(bench: Bench, whole_one: Path) -> None:
    job = bench.train(sbatch=["--array=0-1"])
    states = ("COMPLETED", "FAILED", "CANCELLED")
    for task in (f"{job.number}_0", f"{job.number}_1"):
        assert bench.cluster.wait(task, states, PATIENCE_S)["JobState"] == "COMPLETED"
    runs = runs_by_seed(bench)
    assert len(runs) == 2
    assert_same_runs(runs[0], whole_one)


def test_a_store_in_shards(bench: Bench, archive: Path, store: Path) -> None:
    arguments = [str(REPO / "scripts" / "slurm" / "prepare.sbatch"), f"annotations={archive}", "spacing_mm=1.5"]
    arguments += [f"store={bench.folder / 'store'}", "sheet_lesions=0"]
    options = ["--cpus-per-task=1", f"--chdir={bench.folder}", f"--output={bench.folder}/%A-%a.out"]
    array = bench.cluster.submit(*options, f"--array=1-{SHARDS}", *arguments, environ=bench.environ)
    merge = bench.cluster.submit(
        *options, f"--dependency=afterok:{array}", *arguments, "merge=true", environ=bench.environ
    )
    ended = bench.cluster.wait(merge, ("COMPLETED", "FAILED", "CANCELLED"), PATIENCE_S)
    printed = "\n".join(path.read_text() for path in bench.folder.glob("*.out"))
    assert ended["JobState"] == "COMPLETED", printed
    one, other = Store(bench.folder / "store"), Store(store)
    pd.testing.assert_frame_equal(one.lesions, other.lesions)
    assert (bench.folder / "store" / "lesions.parquet").read_bytes() == (store / "lesions.parquet").read_bytes()
    for scan in (store / "scans").glob("*.b2nd"):
        assert (bench.folder / "store" / "scans" / scan.name).read_bytes() == scan.read_bytes()
