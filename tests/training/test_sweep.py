"""Sweeps by Optuna: of a function whose optimum is known, and of trainings."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pandas as pd
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from tiny_runs import TINY, tiny_store

from fmcib_ssl.training.sweep import _distribution, _launch

REPO = Path(__file__).resolve().parents[2]
SPACE = ["x=tag(log, interval(1e-4, 1.0))", "kind=plain,raised", "n=range(1, 4)"]


def parabola(config: DictConfig) -> float:
    """Highest, 1, at x = 0.01 with kind = raised; n = 3 fails, and n = 2 has no value where x is high."""
    if config.n == 3:
        raise ValueError(f"three is refused at {config.x}")
    if config.n == 2 and config.x > 0.1:
        return math.nan
    return -((math.log10(config.x) + 2) ** 2) + (config.kind == "raised")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs a sweep of a function and gives the folder of its results."""

    def run(folder: str, task: Callable[[DictConfig], float], *words: str) -> Path:
        (tmp_path / "toy.yaml").write_text(
            "{seed: 0, x: 1.0, kind: plain, n: 1, hydra: "
            f"{{sweep: {{dir: {tmp_path / folder}, subdir: '${{x}}-${{kind}}-${{n}}'}}}}}}"
        )
        arguments = ["-m", f"hydra.searchpath=[file://{REPO}/configs]", "hydra/sweeper=optuna"]
        monkeypatch.setattr("sys.argv", ["toy", *arguments, "hydra.sweeper.metric=null", *words])
        hydra.main(version_base="1.3", config_path=str(tmp_path), config_name="toy")(task)()
        (results,) = (tmp_path / folder).glob("sweep-*")
        return results

    return run


def test_it_comes_to_the_optimum_and_sets_aside_what_fails(sweep: Callable[..., Path]) -> None:
    results = sweep("runs", parabola, "hydra.sweeper.n_trials=25", *SPACE)
    trials = pd.read_csv(results / "trials.csv")
    assert list(trials["trial"]) == list(range(1, 26))
    failed = trials["value"].isna()
    expected = [f"three is refused at {row.x}" if row.n == 3 else "it is nan" for row in trials[failed].itertuples()]
    assert list(trials.loc[failed, "error"]) == expected and trials.loc[~failed, "error"].isna().all()
    for row in trials[~failed].itertuples():
        assert row.value == pytest.approx(-((math.log10(row.x) + 2) ** 2) + (row.kind == "raised")), (
            "another trial's value"
        )
    best = yaml.safe_load((results / "optimization_results.yaml").read_text())
    assert best["best_value"] == trials["value"].max() > 0.9 and best["best_params"]["kind"] == "raised"
    assert Path(best["run"]).is_dir() and (results / "sweep.png").is_file()


def test_a_sweep_that_was_stopped_goes_on_as_it_would_have(sweep: Callable[..., Path]) -> None:
    words = ["hydra.sweeper.n_jobs=2", *SPACE]
    runs = []

    def stopped_at_the_seventh(config: DictConfig) -> float:
        runs.append(config)
        if len(runs) == 7:
            raise KeyboardInterrupt
        return parabola(config)

    with pytest.raises(KeyboardInterrupt):
        sweep("stopped", stopped_at_the_seventh, "hydra.sweeper.n_trials=10", *words)
    resumed = sweep("stopped", stopped_at_the_seventh, "hydra.sweeper.n_trials=10", *words)
    longer = sweep("whole", parabola, "hydra.sweeper.n_trials=8", *words)
    assert len(pd.read_csv(longer / "trials.csv")) == 8
    longer = sweep("whole", parabola, "hydra.sweeper.n_trials=10", *words)  # the same sweep, with more trials
    one, other = (pd.read_csv(folder / "trials.csv").drop(columns="run") for folder in (resumed, longer))
    pd.testing.assert_frame_equal(one, other)
    assert resumed.name == longer.name and len(one) == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0.1, 2)", FloatDistribution(0.1, 2.0)),
        ("interval(1, 8)", FloatDistribution(1.0, 8.0)),
        ("int(interval(1, 8))", IntDistribution(1, 8)),
        ("tag(log, int(interval(1, 64)))", IntDistribution(1, 64, log=True)),
        ("tag(log, interval(1e-4, 1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("range(2, 11, 4)", IntDistribution(2, 10, step=4)),
        ("range(8, 0, -4)", IntDistribution(4, 8, step=4)),
        ("range(0.5, 2, 0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("choice([16,16,16], true, 'a b')", CategoricalDistribution(["[16,16,16]", "True", "a\\ b"])),
        ("0.1,0.2", CategoricalDistribution(["0.1", "0.2"])),
    ],
)
def test_hydras_grammar_is_the_search_space(text: str, expected: BaseDistribution) -> None:
    assert _distribution(OverridesParser.create().parse_override(f"key={text}")) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=1"], "there is nothing to search"),
        (["hydra.sweeper.metric=online/linear_auc", "n=1,2"], "add callbacks=online"),
        (["n=3", "kind=plain,raised"], "every trial ends with the same error: three is refused at 1.0"),
        (["n=1,2", "hydra.sweeper.n_jobs=0"], "have to be 1 or more"),
        (["x=interval(2, 1)"], r"x=interval\(2, 1\): .*low <= high"),
        (["hydra.sweeper.metric=train/los", "n=1,2"], "metrics.csv has no column train/los"),
        (["hydra.sweeper.n_trials=2", "n=3", "kind=plain,raised"], "none of 2 trials has a value"),
    ],
)
def test_a_sweep_that_can_lead_nowhere_is_refused(sweep: Callable[..., Path], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        sweep("runs", parabola, *words)


def test_a_job_that_dies_is_set_aside_and_the_others_keep_their_values() -> None:
    launched = []

    def launch(runs: list[tuple[str, ...]], initial_job_idx: int) -> list[Any]:
        launched.append(runs)
        if ("n=2",) in runs:
            raise RuntimeError("job 2 has not produced any output\nlog")
        return [SimpleNamespace(return_value=(float(run[0][-1]), {})) for run in runs]

    outcomes = _launch(SimpleNamespace(launch=launch), [("n=1",), ("n=2",), ("n=3",)], 0)  # type: ignore[arg-type]
    assert {run: value for run, (value, _) in outcomes.items()} == {("n=1",): 1.0, ("n=2",): None, ("n=3",): 3.0}
    assert outcomes["n=2",][1] == {"error": "job 2 has not produced any output"} and len(launched) == 4


@pytest.mark.slow
def test_trials_are_launched_as_jobs(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path=None)\n"
        "def main(config):\n"
        "    return config.n\n"
        "main()\n"
    )
    words = [
        f"hydra.searchpath=[file://{REPO}/configs]", "+seed=0", "hydra.sweep.dir=runs", "hydra.sweep.subdir=${n}",
        "hydra/sweeper=optuna", "hydra/launcher=submitit_local", "hydra.sweeper.metric=null", "hydra.sweeper.n_jobs=3",
        "hydra.sweeper.n_trials=3", "+n=int(interval(1,1000))",
    ]  # fmt: skip
    command = [sys.executable, "toy.py", "-m", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("runs/sweep-*/trials.csv")
    trials = pd.read_csv(file)
    assert len(trials) == 3 and (trials["value"] == trials["+n"]).all()


@pytest.mark.slow
def test_a_sweep_of_trainings_resumes_after_a_kill(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store")
    command = [
        sys.executable, "train.py", "-m", "hydra/sweeper=optuna", "+experiment=ct_infonce", *TINY, "encoder=small",
        f"data.store={store}", f"paths.runs={tmp_path}/runs", "callbacks=online", "callbacks.online_probe.label=label",
        "callbacks.online_probe.select=null", "trainer.max_epochs=1", "hydra.sweeper.n_trials=3",
        "optimizer.base_lr=tag(log, interval(1e-4, 1e-1))", "loss.temperature=interval(0.05, 0.5)",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while first.poll() is None and not list(tmp_path.glob("runs/*/sweep-*/trials.csv")):
            time.sleep(0.2)
        first.kill()
    (file,) = tmp_path.glob("runs/*/sweep-*/trials.csv")
    before = file.read_text().splitlines()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trials = pd.read_csv(file)
    assert file.read_text().splitlines()[: len(before)] == before and len(trials) == 3
    for trial in trials.to_dict("records"):
        settings = yaml.safe_load(Path(trial["run"], "config.yaml").read_text())
        assert settings["optimizer"]["base_lr"] == trial["optimizer.base_lr"]
        assert settings["loss"]["temperature"] == trial["loss.temperature"]
        probe = pd.read_csv(Path(trial["run"], "metrics.csv"))["online/linear_auc"].dropna()
        assert trial["value"] == probe.iloc[-1] and Path(trial["run"], "encoder.safetensors").is_file()
