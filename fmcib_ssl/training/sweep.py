"""A sweep by Optuna: `fmcib-ssl train -m hydra/sweeper=optuna KEY='interval(LOW, HIGH)' ...`; docs/sweeps.md.

The trials that have ended are the state of a sweep. What is proposed next is a function of them and of the seed, so a
sweep that was stopped goes on as it would have without the stop, and an interrupted trial is a run that resumes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from fmcib_ssl.evaluation import results_table, sweep_chart
from fmcib_ssl.io import Held, Lock, digest_of, write_atomically
from fmcib_ssl.training.loggers import last_value, read_metrics
from fmcib_ssl.types import UserError

logger = logging.getLogger(__name__)

#: So many trials that all end with one error are a mistake in the command.
_ENOUGH = 5
#: Value of a trial, None if it is set aside, and what else `trials.csv` says of it.
_Outcome = tuple[float | None, dict[str, str]]


class SweepError(UserError, ValueError):
    """A sweep that cannot be run; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Trains with settings that Optuna proposes from the values that earlier trials have reached.

    Writes to `sweep-KEY/`, beside the run folders: `trials.csv` (value, settings, run folder and error of each trial),
    `optimization_results.yaml`, `sweep.png`, and Optuna's database `optuna.db`. KEY is a digest of the command.

    Args:
        metric: column of `metrics.csv` whose last value is the trial's; None: the value that the run returns.
        direction: of the optimization.
        n_trials: number of trials, those of earlier starts included.
        n_jobs: number of trials that are proposed, and handed to the launcher, at once.
        seed: the proposal of trial `i` is a function of `(seed, i)` and the trials before.
        sampler: `_target_` of a sampler of Optuna that takes a seed, and its other arguments.
        params: search spaces by key, in Hydra's grammar; those of the command line have precedence.
    """

    metric: str | None
    direction: Literal["maximize", "minimize"]
    n_trials: int
    n_jobs: int
    seed: int
    sampler: DictConfig
    params: Mapping[str, Any]

    def run(self, arguments: Sequence[str], context: HydraContext, task: TaskFunction, config: DictConfig) -> None:
        """Run the trials that are missing, then write, draw and log the results.

        Args:
            arguments: overrides of the command line.
            context: Hydra's.
            task: trains with a configuration.
            config: what was composed without the search space.

        Raises:
            SweepError: nothing to search, an empty interval, no such metric, all trials fail, another process runs
                this sweep.
        """
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(lines)
        overrides = {override.get_key_element(): override for override in parsed}
        space = {key: _distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        fixed = [str(override.input_line) for key, override in overrides.items() if key not in space]
        if min(self.n_trials, self.n_jobs) < 1:
            raise SweepError("hydra.sweeper.n_trials and hydra.sweeper.n_jobs have to be 1 or more")
        if not space:
            raise SweepError("there is nothing to search: say what a key may be, such as KEY='interval(0.1, 1.0)'")
        if str(self.metric).startswith("online/") and "online_probe" not in (config.get("callbacks") or {}):
            raise SweepError(
                f"hydra.sweeper.metric={self.metric} is a value of the online probe: add callbacks=online "
                "callbacks.online_probe.label=COLUMN, or name another column of metrics.csv"
            )
        digest = digest_of(sorted(str(o.input_line) for o in overrides.values()), self.metric, self.direction)
        folder = Path(config.hydra.sweep.dir, f"sweep-{digest[:8]}")
        folder.mkdir(parents=True, exist_ok=True)
        launcher = Plugins.instance().instantiate_launcher(context, partial(_run_trial, task, self.metric), config)
        try:
            with Lock(folder / ".lock"):
                study = self._optimize(folder, space, fixed, launcher)
                self._report(study, space, folder)
        except Held as error:
            raise SweepError(f"{folder}: another process runs this sweep ({error})") from error

    def _optimize(
        self, folder: Path, space: dict[str, BaseDistribution], fixed: Sequence[str], launcher: Launcher
    ) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = f"sqlite:///{folder / 'optuna.db'}"
        study = optuna.create_study(storage=storage, study_name="sweep", direction=self.direction, load_if_exists=True)
        for stopped in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            study.tell(stopped.number, state=TrialState.FAIL)  # it is proposed again
        while (first := len(_ended(study))) < self.n_trials:
            trials = {}
            for number in range(first, min(first + self.n_jobs, self.n_trials)):
                seed = np.random.SeedSequence(self.seed, spawn_key=(number,)).generate_state(1)[0]
                study.sampler = instantiate(self.sampler, seed=int(seed))
                trial = study.ask(space)
                trials[trial] = (*fixed, *(f"{key}={value}" for key, value in trial.params.items()))
            outcomes = _launch(launcher, list(dict.fromkeys(trials.values())), first)  # the same settings: the same run
            for trial, overrides in trials.items():
                value, record = outcomes[overrides]
                for name, text in record.items():
                    trial.set_user_attr(name, text)
                study.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
                shown = f"{self.metric or 'value'} {value}" if value is not None else f"set aside: {record['error']}"
                logger.info("%s: %s", " ".join(overrides[len(fixed) :]), shown)
            table = _table(study)
            table.to_csv(folder / "trials.csv", index=False)
            if len(table) >= _ENOUGH and table["value"].isna().all() and table["error"].nunique() == 1:
                raise SweepError(f"every trial ends with the same error: {table['error'][0]}")
        return study

    def _report(self, study: optuna.Study, space: dict[str, BaseDistribution], folder: Path) -> None:
        trials = _table(study)
        valued = trials.dropna(subset="value")
        if valued.empty:
            raise SweepError(f"none of {len(trials)} trials has a value; {folder}/trials.csv says why")
        best = study.best_trial
        results = {"best_params": best.params, "best_value": best.value, "run": best.user_attrs["run"]}
        write_atomically(folder / "optimization_results.yaml", yaml.safe_dump(results, sort_keys=False))
        logarithmic = [key for key, distribution in space.items() if getattr(distribution, "log", False)]
        ascending, metric = self.direction == "minimize", self.metric or "value"
        picture = sweep_chart(valued, list(space), logarithmic, metric, folder / "sweep.png", ascending=ascending)
        ranked = valued.sort_values("value", ascending=ascending, kind="stable").head(5)
        logger.info(
            "%s of the best of %d trials, %d of which were set aside (trials.csv)\n%s\nlook at   %s",
            metric, len(trials), len(trials) - len(valued),
            results_table(ranked.drop(columns="error", errors="ignore")), picture,
        )  # fmt: skip


def _run_trial(task: TaskFunction, metric: str | None, config: DictConfig) -> _Outcome:
    """Train, wherever the launcher does; an error sets the trial aside, a signal ends it with an exit code.

    Raises:
        SweepError: no such metric.
    """
    run = HydraConfig.get().runtime.output_dir
    try:
        value = task(config)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            raise
        logger.error("the trial is set aside: %s", error, exc_info=not isinstance(error, SystemExit))
        return None, {"run": run, "error": _line(error)}
    if metric is not None and (value := last_value(read_metrics(Path(run, "metrics.csv")), metric)) is None:
        raise SweepError(f"{run}/metrics.csv has no column {metric}: hydra.sweeper.metric has to name one")
    return (float(value), {"run": run}) if math.isfinite(value) else (None, {"run": run, "error": f"it is {value}"})


def _launch(launcher: Launcher, runs: list[tuple[str, ...]], first: int) -> dict[tuple[str, ...], _Outcome]:
    try:
        jobs = launcher.launch(runs, initial_job_idx=first)
    except Exception as error:  # a job has died, and with it what the others have returned
        if len(runs) == 1:
            return {runs[0]: (None, {"error": _line(error)})}
        # One by one; a run that is finished returns at once.
        return {run: outcome for one in runs for run, outcome in _launch(launcher, [one], first).items()}
    return {run: job.return_value for run, job in zip(runs, jobs, strict=True)}


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0].removeprefix("error: ") or type(error).__name__


def _distribution(override: Override) -> BaseDistribution:
    """What a key may be; a choice by Hydra's texts, which may be lists, options of groups and null."""
    low: Any
    high: Any
    options: dict[str, Any]
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high, options = sweep.start, sweep.end, {"log": "log" in sweep.tags}
    elif isinstance(sweep, RangeSweep):
        values = list(sweep.range())
        low, high, options = min(values), max(values), {"step": abs(sweep.step)}
    else:
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    try:
        return kind(low, high, **options)
    except ValueError as error:
        raise SweepError(f"{override.input_line}: {error}") from error


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a value or an error; not those that were interrupted."""
    return [t for t in study.get_trials(deepcopy=False) if t.value is not None or "error" in t.user_attrs]


def _table(study: optuna.Study) -> pd.DataFrame:
    rows = [{"trial": n, "value": t.value, **t.params, **t.user_attrs} for n, t in enumerate(_ended(study), 1)]
    return pd.DataFrame(rows)
