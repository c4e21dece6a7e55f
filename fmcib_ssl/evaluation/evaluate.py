"""Everything that is asked of frozen features, on the same patients: metrics with intervals, differences, curves."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.evaluation.baselines import Contestants
from fmcib_ssl.evaluation.bootstrap import interval
from fmcib_ssl.evaluation.feature_table import ID_COLUMN
from fmcib_ssl.evaluation.folds import Part, without_shared
from fmcib_ssl.evaluation.frozen_probes import LINEAR_PROBE, PROBES
from fmcib_ssl.evaluation.labels import EvaluationError
from fmcib_ssl.evaluation.leakage import (
    Finding,
    check_duplicates,
    check_extent_columns,
    check_patch_borders,
    check_patients,
)
from fmcib_ssl.evaluation.metrics import ERRORS, METRICS
from fmcib_ssl.evaluation.scoring import PartScores, Setup, resampled, score
from fmcib_ssl.evaluation.survival import risk_halves

Array = npt.NDArray[Any]
logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """What an evaluation gives; plain values, but for the predictions.

    Attributes:
        rows: one row a set of features, probe, metric and share of the labels.
        differences: how far features are ahead of others on the same resamples; of an error, how far below.
        predictions: one row a test lesion, set of features, probe and share of the labels.
        survival: Kaplan-Meier curves of the two halves by risk, with the log-rank test.
        missing: what could not be computed: `features`, `reason`.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    predictions: pd.DataFrame = field(default_factory=pd.DataFrame)
    survival: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)


def find_leakage(
    setup: Setup, lesions: pd.DataFrame, contestants: Contestants, extent: Sequence[str] | None = None
) -> list[Finding]:
    """Run every check that the tables allow.

    Args:
        setup: the evaluation.
        lesions: one row a lesion, in the order of `setup`.
        contestants: the features; images are compared by their voxels where there are any, else by their features.
        extent: columns with the extent of crops; None: those that are named like one.
    """
    # A patient that is shared has its own finding; its images are compared all the same.
    ids = lesions[ID_COLUMN].to_numpy()
    found = [check_patients(setup.parts, setup.patients)]
    if contestants.voxels is not None:
        voxels, preprocessing = contestants.voxels
        found.append(check_duplicates("patches", voxels, setup.parts, ids))
        found += check_patch_borders(voxels, preprocessing, setup)
    else:
        first = contestants.inputs[0]
        found.append(check_duplicates(first.name, first.x, setup.parts, ids))
        unseen = "not checked: there are no voxels, since the patches could not be opened again"
        found.append(Finding("padding", False, True, unseen))
    return found + check_extent_columns(lesions, setup, extent)


def without_shared_patients(setup: Setup) -> Setup | None:
    """The same test without the tested patients in training and choosing; None where nothing would change.

    Raises:
        EvaluationError: nobody would be left to train on.
    """
    parts = [without_shared(part, setup.patients) for part in setup.parts]
    if all(_size(new) == _size(old) for new, old in zip(parts, setup.parts, strict=True)):
        return None
    if any(not len(part.train) for part in parts):
        raise EvaluationError("every training patient is also tested: nobody is left to train on")
    return replace(setup, parts=parts, split=f"{setup.split}, without shared patients")


def _size(part: Part) -> tuple[int, int]:
    return len(part.train), 0 if part.val is None else len(part.val)


def evaluate(
    setups: Sequence[Setup],
    lesions: pd.DataFrame,
    contestants: Contestants,
    *,
    probes: Sequence[str],
    fractions: Sequence[float] = (1.0,),
    num_bootstrap: int = 2000,
    progress: bool = True,
) -> Evaluation:
    """Score all features with all probes on all shares of the labels, and compare them.

    Args:
        setups: the evaluation, and others of the same labels, such as one without shared patients.
        lesions: one row a lesion, in the order of the setups.
        contestants: what is scored and compared.
        probes: names of `PROBES`; the size alone is always given to the linear probe.
        fractions: of the training patients, above 0 and at most 1.
        num_bootstrap: resamples of the patients.
        progress: show a bar.

    Raises:
        EvaluationError: a probe that cannot learn such labels, or a fraction that is none.
    """
    kind = setups[0].labels.kind
    _check_options(kind, probes, fractions)
    linear = LINEAR_PROBE[kind]
    jobs = [
        (setup, inputs, name, fraction)
        for setup in setups
        for inputs in contestants.inputs
        for name in ([linear] if inputs.linear_only else probes)
        for fraction in sorted(set(fractions), reverse=True)
    ]
    result = Evaluation(missing=list(contestants.missing))
    weights = {setup.split: setup.weights(num_bootstrap) for setup in setups}
    drawn: dict[tuple[str, str, str, float], dict[str, Array]] = {}
    tables = []
    for setup, inputs, name, fraction in tqdm(jobs, "evaluating", disable=not progress):
        try:
            scored = _Scored(setup, inputs.name, name, fraction, score(PROBES[name], inputs, setup, fraction))
        except ValueError as error:
            what = f"{inputs.name}, {name}, {fraction:.0%} of the patients, {setup.split}"
            result.missing.append({"features": what, "reason": str(error)})
            continue
        values = {
            title: resampled(metric, setup.labels.values, scored.parts, weights[setup.split])
            for title, metric in METRICS[kind].items()
        }
        drawn[setup.split, inputs.name, name, fraction] = values
        result.rows += _rows(scored, values)
        tables.append(_predictions(scored, lesions))
        if kind == "survival":
            result.survival.append(_halves(scored))
    for (split, features, name, fraction), values in drawn.items():
        for ours, theirs in contestants.compared:
            other = drawn.get((split, theirs, name, fraction), drawn.get((split, theirs, linear, fraction)))
            if features == ours and other is not None:
                about = {"split": split, "fraction": fraction, "task": setups[0].labels.name, "probe": name}
                result.differences += _differences(ours, theirs, about, values, other)
    if tables:
        result.predictions = pd.concat(tables, ignore_index=True)
    return result


@dataclass(frozen=True)
class _Scored:
    """Features that were scored, and how."""

    setup: Setup
    features: str
    probe: str
    fraction: float
    parts: Sequence[PartScores]

    def about(self) -> dict[str, Any]:
        values = {"features": self.features, "probe": self.probe, "fraction": self.fraction}
        return {**values, "split": self.setup.split}


def _check_options(kind: str, probes: Sequence[str], fractions: Collection[float]) -> None:
    for name in probes:
        if name not in PROBES:
            raise EvaluationError(f"probe={name}: there is {', '.join(PROBES)}")
        if kind not in PROBES[name].kinds:
            fitting = ", ".join(other for other, probe in PROBES.items() if kind in probe.kinds)
            raise EvaluationError(f"probe={name} cannot learn {kind} labels; {fitting} can")
    if wrong := [value for value in fractions if not 0 < value <= 1]:
        raise EvaluationError(f"fractions={wrong[0]:g}: a share of the training patients is above 0 and at most 1")


def _rows(scored: _Scored, values: dict[str, Array]) -> list[dict[str, Any]]:
    sizes = {
        "num_train": round(float(np.mean([part.num_train for part in scored.parts]))),
        "num_test": len(np.unique(np.concatenate([part.rows for part in scored.parts]))),
        "settings": [part.setting for part in scored.parts],
    }
    about = {"task": scored.setup.labels.name, **scored.about()}
    return [{**about, "metric": metric, **_told(drawn), **sizes} for metric, drawn in values.items()]


def _differences(
    ours: str, theirs: str, about: dict[str, Any], values: dict[str, Array], other: dict[str, Array]
) -> list[dict[str, Any]]:
    """Positive is ahead, so of an error the sign is turned."""
    return [
        {"features": ours, "against": theirs, **about, "metric": metric}
        | _told((other[metric] - drawn) if metric in ERRORS else (drawn - other[metric]))
        for metric, drawn in values.items()
    ]


def _told(drawn: Array) -> dict[str, float | None]:
    """The value and its interval; None where a metric has no meaning for these lesions."""
    if np.isnan(drawn[0]) or np.isnan(drawn[1:]).all():
        return {"value": None, "low": None, "high": None}
    told = interval(drawn[0], drawn[1:])
    return {"value": told.value, "low": told.low, "high": told.high}


def _predictions(scored: _Scored, lesions: pd.DataFrame) -> pd.DataFrame:
    labels, ids = scored.setup.labels, lesions[ID_COLUMN].to_numpy()
    tables = []
    for part in scored.parts:
        truth = labels.values[part.rows]
        columns: dict[str, Any] = {ID_COLUMN: ids[part.rows], "patient": scored.setup.patients[part.rows]}
        columns |= {"fold": part.part, **scored.about()}
        if labels.kind == "survival":
            columns |= {"label": truth[:, 0], "event": truth[:, 1].astype(bool)}
        else:
            columns["label"] = truth
        if part.scores.ndim == 2:
            columns |= {f"score_{name}": part.scores[:, number] for number, name in enumerate(labels.classes)}
        else:
            columns["score"] = part.scores
        if part.chosen is not None:
            columns["predicted"] = part.chosen
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _halves(scored: _Scored) -> dict[str, Any]:
    """Above or below the median risk of the test rows, each fold by its own."""
    rows = np.concatenate([part.rows for part in scored.parts])
    is_high = np.concatenate([part.scores > np.median(part.scores) for part in scored.parts])
    return scored.about() | risk_halves(scored.setup.labels.values[rows], is_high)
