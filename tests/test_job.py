"""Processes of one job, and restarts of it, name the same run folder."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fmcib_ssl.job import run_key
from fmcib_ssl.settings import ConfigError


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "pretrain", "SLURM_PROCID": "3"}, "slurm-17"),
        (
            {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NAME": "p"},
            "slurm-18_0",
        ),
        ({"TORCHELASTIC_RUN_ID": "mine", "SLURM_JOB_ID": "17", "RANK": "1"}, "torchrun-mine"),
    ],
)
def test_a_job_has_a_name(environ: dict[str, str], key: str) -> None:
    assert run_key(environ) == key


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "interactive"}])
def test_else_it_is_the_time(environ: dict[str, str]) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run_key(environ))


def test_processes_of_one_torchrun_agree() -> None:
    """Two children, a second apart, of one parent."""
    child = (
        "from fmcib_ssl.job import run_key; "
        "print(run_key({'TORCHELASTIC_RUN_ID': 'none', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}))"
    )
    twice = f"for _ in range(2): subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(1)"
    code = f"import subprocess, sys, time\n{twice}"
    keys = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(keys) == 2 and len(set(keys)) == 1


def test_several_nodes_need_an_id() -> None:
    with pytest.raises(ConfigError, match="--rdzv-id=NAME"):
        run_key({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
