"""Every mismatch between a job and its configuration is refused in words that name the line to change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from fmcib_ssl.training import cluster as preflight
from fmcib_ssl.training.cluster import check_disk, check_machine, first_host
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.settings import ConfigError, Settings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pretrain", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
TWO_TASKS = {**STEP, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TWO_NODES = {
    **STEP,
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "MASTER_ADDR": "localhost",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


def settings(*overrides: str) -> Settings:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return read_settings(compose("train", ["paths.run=here", "data.annotations=my.csv", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "environ"),
    [
        pytest.param([], {}, id="a workstation"),
        pytest.param(["hardware.devices=2"], {}, id="two processes that Lightning starts"),
        pytest.param([], JOB, id="a batch script without srun, one process"),
        pytest.param([], STEP, id="one task"),
        pytest.param(["hardware.devices=2"], {**TWO_TASKS, "SLURM_NODELIST": "localhost"}, id="two tasks"),
        pytest.param(["hardware.num_nodes=2"], TWO_NODES, id="two nodes"),
        pytest.param(["hardware.devices=2", "hardware.num_nodes=2"], TORCHRUN, id="torchrun"),
        pytest.param(["hardware.devices=2"], {**JOB, "SLURM_JOB_NAME": "bash"}, id="a shell in a job"),
    ],
)
def test_what_fits_starts(overrides: list[str], environ: dict[str, str]) -> None:
    check_machine(settings(*overrides), environ)


@pytest.mark.parametrize(
    ("overrides", "environ", "said"),
    [
        (["hardware.devices=2"], JOB, ["without srun", "put `srun` before"]),
        ([], {**JOB, "SLURM_NTASKS": "2"}, ["2 processes", "srun"]),
        ([], TWO_TASKS, ["2 tasks", "--ntasks-per-node=1", "hardware.devices=2"]),
        (["hardware.devices=2"], STEP, ["1 tasks", "--ntasks-per-node=2", "hardware.devices=1"]),
        ([], TWO_NODES, ["2 nodes", "hardware.num_nodes=2", "--nodes=1"]),
        (
            ["hardware.devices=2"],
            {key: value for key, value in TWO_TASKS.items() if key != "SLURM_NTASKS_PER_NODE"},
            ["replace --ntasks", "--ntasks-per-node=2"],
        ),
        (["hardware.devices=4"], TORCHRUN, ["torchrun started 2", "hardware.devices=2", "--nproc-per-node=4"]),
        (["hardware.devices=2"], TORCHRUN, ["2 nodes", "hardware.num_nodes=2", "--nnodes=1"]),
        (
            ["hardware.devices=2"],
            {**TWO_TASKS, "SLURM_NODELIST": "no-such-host.invalid"},
            ["no-such-host.invalid", "MASTER_ADDR"],
        ),
        (["hardware.devices=2"], {"MASTER_PORT": "http"}, ["MASTER_PORT=http", "65535"]),
        (["data.store=nowhere/store"], {}, ["data.store=nowhere/store", "No such file", "mount"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_line_to_change(
    overrides: list[str], environ: dict[str, str], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        check_machine(settings(*overrides), environ)
    for part in said:
        assert part in str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check_machine(settings("hardware.devices=4", "data.store=nowhere", "+trainer.profiler=simple"), TORCHRUN)
    assert "nproc-per-node" in str(error.value) and "nowhere" in str(error.value)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_has_cuda_driver", lambda: False)
    with pytest.raises(ConfigError, match=r"no NVIDIA driver.*hardware=cpu"):
        check_machine(settings("hardware=gpu"), {})
    monkeypatch.setattr(preflight, "_has_cuda_driver", lambda: True)
    check_machine(settings("hardware=gpu"), {"CUDA_VISIBLE_DEVICES": "3"})
    check_machine(settings("hardware=gpu"), {})
    with pytest.raises(ConfigError, match=r"shows 0.*--gpus-per-node=1"):
        check_machine(settings("hardware=gpu"), {"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(ConfigError, match=r"hardware.devices=2"):
        check_machine(settings("hardware=gpu", "hardware.devices=4"), {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    check_disk(tmp_path, 500_000)
    with pytest.raises(ConfigError, match=r"hydra.run.dir"):
        check_disk(tmp_path, 500_001)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node1,node2", "node1"), ("gpu[07-09,12],login1", "gpu07"), ("a[3]", "a3"), ("n[1,4]", "n1")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, fmcib_ssl.training.cluster; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
