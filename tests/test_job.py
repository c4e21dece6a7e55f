"""The same command is the same run folder: on all processes of a job, after restarts of it, and typed another way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.run_folder import run_key
from fmcib_ssl.training.settings import ConfigError, Settings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SLURM = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "pretrain"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", ["data.annotations=my.csv", *overrides], return_hydra_config=hydra)


def folder_of(*overrides: str) -> str:
    """Where Hydra puts the run."""
    return str(composed(*overrides, hydra=True).hydra.run.dir)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return read_settings(composed("paths.run=here"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.annotations=./x/../my.csv"],
        [f"data.annotations={Path.cwd()}/my.csv"],
        ["hardware=gpu", "hardware.num_workers=9"],
        ["logger=tensorboard", "~callbacks.watchdog", "contact_sheet_rows=0"],
        ["trainer.max_epochs=200"],
        ["trainer.max_steps=7"],
        ["loss.temperature=0.10", "optimizer.base_lr=0.001"],
        ["data.image_root=/archive"],
        ["data.path_prefix=/elsewhere"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_may_differ_is_the_same_folder(overrides: list[str]) -> None:
    assert folder_of(*overrides) == folder_of()
    assert re.fullmatch(r"runs/pretrain/[0-9a-f]{8}", folder_of())


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.annotations=yours.csv"],
        ["data.annotations=null", "data.store=store"],
        ["seed=1"],
        ["data.batch_size=7"],
        ["loss=infonce"],
        ["+data.select.fold=1"],
        ["+trainer.limit_train_batches=3"],
        ["+experiment=ct_infonce"],
        ["+experiment=finetune", "finetune.label=malignant"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_may_not_is_another(overrides: list[str]) -> None:
    assert folder_of(*overrides) != folder_of()


def test_weights_to_be_fine_tuned_are_a_place() -> None:
    common = ["+experiment=finetune", "finetune.label=malignant"]
    one, same, other = (folder_of(*common, f"finetune.weights={w}") for w in ("a.ckpt", "./a.ckpt", "b.ckpt"))
    assert one == same != other


def test_lengths_that_a_sweep_compares_count(settings: Settings, tmp_path: Path) -> None:
    longer = settings.model_copy(update={"trainer": settings.trainer.model_copy(update={"max_epochs": 300})})
    assert run_key(settings, tmp_path, environ={}) == run_key(longer, tmp_path, environ={})
    keyed = [run_key(each, tmp_path, ("trainer.max_epochs",), environ={}) for each in (settings, longer)]
    assert len({*keyed, run_key(settings, tmp_path, environ={})}) == 3


@pytest.mark.parametrize("environ", [{}, SLURM, {**SLURM, "SLURM_PROCID": "3"}, TORCHRUN], ids=str)
def test_a_job_needs_no_name_of_its_own(environ: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    assert run_key(settings, tmp_path, environ=environ) == run_key(settings, tmp_path, environ={})


@pytest.mark.parametrize(
    ("environ", "suffix"),
    [
        ({**SLURM, "SLURM_PROCID": "3"}, "slurm-17"),
        ({**SLURM, "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "0"}, "slurm-18_0"),
        ({"TORCHELASTIC_RUN_ID": "mine", "SLURM_JOB_ID": "17", "RANK": "1"}, "torchrun-mine"),
        ({}, r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"),
    ],
)
def test_a_new_run_is_named_by_what_its_processes_and_restarts_have_in_common(
    environ: dict[str, str], suffix: str, settings: Settings, tmp_path: Path
) -> None:
    anew = settings.model_copy(update={"run": "new"})
    key = run_key(settings, tmp_path, environ={})
    assert re.fullmatch(f"{key}-{suffix}", run_key(anew, tmp_path, environ=environ))
    assert run_key(anew, tmp_path, environ=environ) == run_key(anew, tmp_path, environ=environ)


def begun(folder: Path, time: str, job: str | None = None) -> None:
    folder.mkdir()
    state: dict[str, Any] = {"run_id": "abcd1234", "starts": [{"time": f"2026-01-{time}T00:00:00+00:00", "job": job}]}
    (folder / "run.json").write_text(json.dumps(state))


def test_without_it_the_run_that_was_started_last_is_meant(settings: Settings, tmp_path: Path) -> None:
    key = run_key(settings, tmp_path, environ={})
    begun(tmp_path / key, "02")
    (tmp_path / f"{key}-never_begun").mkdir()
    assert run_key(settings, tmp_path, environ={}) == key
    begun(tmp_path / f"{key}-b", "05", job="17")
    begun(tmp_path / f"{key}-c", "03", job="18")
    assert run_key(settings, tmp_path, environ={}) == f"{key}-b"
    assert run_key(settings, tmp_path, environ={**SLURM, "SLURM_JOB_ID": "18"}) == f"{key}-c"  # queued again
    (tmp_path / f"{key}-b" / "run.json").write_text("{")
    assert run_key(settings, tmp_path, environ={}) == f"{key}-c"


def test_a_folder_that_was_named_by_its_job_is_found(settings: Settings, tmp_path: Path) -> None:
    begun(tmp_path / "slurm-17", "02")
    assert run_key(settings, tmp_path, environ=SLURM) == "slurm-17"
    assert run_key(settings, tmp_path, environ={}) != "slurm-17"


def test_a_new_run_under_torchrun_needs_an_id(settings: Settings, tmp_path: Path) -> None:
    run_key(settings, tmp_path, environ=TORCHRUN)
    with pytest.raises(ConfigError, match="--rdzv-id=NAME"):
        run_key(settings.model_copy(update={"run": "new"}), tmp_path, environ=TORCHRUN)
