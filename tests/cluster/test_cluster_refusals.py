"""Batch scripts that cannot work are refused on a real cluster within seconds, with the line to change."""

from __future__ import annotations

import shlex

import pytest
from cluster_runs import REPO, Bench

pytestmark = pytest.mark.cluster

TWO = "hardware.devices=2"
TRAIN = "$PYTHON train.py"
#: Within seconds; but other tests may be at work.
DEADLINE_S = 300


@pytest.mark.parametrize(
    ("sbatch", "command", "line"),
    [
        pytest.param(["--ntasks-per-node=2"], f"{TRAIN} {TWO}", "put `srun` before", id="no srun"),
        pytest.param(["--ntasks-per-node=2"], f"srun {TRAIN}", "hardware.devices=2", id="one device, two tasks"),
        pytest.param(["--nodes=2", "--ntasks-per-node=1"], f"srun {TRAIN}", "set hardware.num_nodes=2", id="two nodes"),
    ],
)
def test_what_cannot_work(sbatch: list[str], command: str, line: str, bench: Bench) -> None:
    options = " ".join(map(shlex.quote, bench.options()))
    number = bench.cluster.submit(
        *sbatch,
        f"--chdir={REPO}",
        f"--output={bench.folder}/job.out",
        f"--wrap={command.replace('train.py', f'train.py {options}')}",
        environ=bench.environ,
    )
    ended = bench.cluster.wait(number, ("COMPLETED", "FAILED"), DEADLINE_S)
    printed = (bench.folder / "job.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), printed
    assert line in printed and "Traceback" not in printed
    assert not list((bench.folder / "runs").rglob("run.json"))


def test_the_batch_script_ends_as_training_does(bench: Bench) -> None:
    """No line after srun that would hide how it ended."""
    job = bench.train("data.store=/nowhere")  # one task: of two the other may be ended first, with 143
    ended = job.wait(DEADLINE_S)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), job.printed
    assert "/nowhere" in job.printed and "Traceback" not in job.printed
