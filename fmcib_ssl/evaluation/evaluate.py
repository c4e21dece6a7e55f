"""Everything that is asked of frozen features, on the same patients: metrics with intervals, differences, curves.

Beside the features stand their baselines: random weights, HU statistics, raw voxels, and the lesion's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable
from fmcib_ssl.evaluation.labels import EvaluationError, Labels, shared_patients, without_shared
from fmcib_ssl.evaluation.leakage import Finding, check_duplicates, check_patch_borders, check_patients
from fmcib_ssl.evaluation.metrics import ERRORS, METRICS, interval, risk_halves
from fmcib_ssl.evaluation.probes import LINEAR_PROBE, PROBES, Inputs, Protocol, SplitScores, resampled, score
from fmcib_ssl.evaluation.readers import judge
from fmcib_ssl.types import Array, Preprocessing

#: Components to which raw voxels are reduced before a probe.
NUM_COMPONENTS = 64
_BASELINES = {"random weights": "random_weights", "HU statistics": "hu_statistics", "raw voxels": "raw_voxels"}


@dataclass
class Candidates:
    """Everything that is evaluated on the same lesions.

    Attributes:
        inputs: sets of features to score, the user's tables first.
        compared: pairs of names: features, and what they should be ahead of.
        missing: baselines that could not be made: `features`, `reason`.
        voxels: normalised patches, flattened, and how they were cut, where there are any.
    """

    inputs: list[Inputs] = field(default_factory=list)
    compared: list[tuple[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    voxels: tuple[Array, Preprocessing] | None = None


def gather(
    tables: Mapping[str, FeatureTable],
    lesions: pd.DataFrame,
    size: Sequence[str] = (),
    make_baselines: Callable[[FeatureTable], Mapping[str, FeatureTable]] | None = None,
) -> Candidates:
    """The user's tables, their baselines, the size alone, and each table together with the size.

    Args:
        tables: features by name; a table that itself is a baseline is not made again.
        lesions: the rows to evaluate, with `lesion_id`.
        size: columns with the lesion's size, such as a diameter.
        make_baselines: opens a table's patches again; `embedding.baseline_tables`. None: no baselines are made.
    """
    ids = lesions[ID_COLUMN].tolist()
    candidates = Candidates()
    own = {name: table.aligned(ids) for name, table in tables.items()}
    kinds = {name: table.provenance.get("kind") for name, table in own.items()}
    encoders = [name for name in own if kinds[name] not in _BASELINES.values()] or list(own)
    others = {name: table for name, table in own.items() if name not in encoders}
    titles = [title for title, kind in _BASELINES.items() if kind not in kinds.values()]
    for name in encoders:
        if make_baselines is None or not titles:
            break
        baselines: dict[str, FeatureTable] = {}
        reason = "the table does not say what builds its encoder"
        try:
            baselines = {title: table.aligned(ids) for title, table in make_baselines(own[name]).items()}
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error)
        candidates.missing += [{"features": f"{t} of {name}", "reason": reason} for t in titles if t not in baselines]
        for title, table in baselines.items():
            is_new = not any(np.array_equal(other.features, table.features) for other in others.values())
            if title in titles and is_new:
                others[title if title not in others else f"{title} ({name})"] = table
    for name, table in {**{name: own[name] for name in encoders}, **others}.items():
        if table.provenance.get("kind") != "raw_voxels":
            candidates.inputs.append(Inputs(name, table.features.astype(np.float64)))
            continue
        candidates.inputs.append(Inputs(name, compact(table.features), NUM_COMPONENTS))
        if candidates.voxels is None and table.provenance.get("preprocessing"):
            candidates.voxels = table.features, Preprocessing.from_dict(table.provenance["preprocessing"])
    candidates.compared += [(name, other) for name in encoders for other in others]
    candidates.compared += [(a, b) for i, a in enumerate(encoders) for b in encoders[i + 1 :]]
    _add_size(candidates, encoders, lesions, size)
    return candidates


def compact(x: Array) -> Array:
    """Rows in a basis of their span: distances stay, so a PCA sees the same, and columns are no more than rows."""
    if x.shape[1] <= len(x):
        return x.astype(np.float64)
    centered = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centered @ centered.T)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None)))[:, ::-1])


def _add_size(candidates: Candidates, encoders: Sequence[str], lesions: pd.DataFrame, size: Sequence[str]) -> None:
    alone, reason = f"size ({', '.join(size)})", ""
    values = lesions.reindex(columns=list(size)).apply(pd.to_numeric, errors="coerce")
    values = values.to_numpy(np.float64, na_value=np.nan)
    if not size:
        alone, reason = "size", "no column was named: size=diameter_mm, or a volume"
    elif absent := [name for name in size if name not in lesions]:
        reason = f"no column {', '.join(map(repr, absent))}; name the lesion's diameter or volume with size="
    elif lacking := int((~np.isfinite(values)).any(axis=1).sum()):
        reason = f"{lacking} of {len(lesions)} lesions have no {', '.join(size)}"
    if reason:
        candidates.missing.append({"features": alone, "reason": reason})
        return
    with_features = [inputs for inputs in candidates.inputs if inputs.name in encoders]
    candidates.inputs.append(Inputs(alone, values, linear_only=True))
    for inputs in with_features:
        name = f"{inputs.name} + size"
        candidates.inputs.append(
            replace(inputs, name=name, x=np.hstack([inputs.x, values]), num_beside=values.shape[1])
        )
        candidates.compared += [(inputs.name, alone), (name, alone)]


def find_leakage(protocol: Protocol, lesions: pd.DataFrame, candidates: Candidates) -> list[Finding]:
    """Run every check: images are compared by their voxels where there are any, else by the first features."""
    # A patient that is shared has its own finding; its images are compared all the same.
    ids, first = lesions[ID_COLUMN].to_numpy(), candidates.inputs[0]
    findings = [check_patients(protocol.splits, protocol.patients)]
    if candidates.voxels is None:
        unseen = "not checked: there are no voxels, since the patches could not be opened again"
        duplicates = check_duplicates(first.name, first.x, protocol.splits, ids)
        return [*findings, duplicates, Finding("padding", False, True, unseen)]
    voxels, preprocessing = candidates.voxels
    findings.append(check_duplicates("patches", voxels, protocol.splits, ids))
    return findings + check_patch_borders(voxels, preprocessing, protocol)


def without_shared_patients(protocol: Protocol) -> Protocol | None:
    """The same test without the tested patients in training and choosing; None where nothing would change.

    Raises:
        EvaluationError: nobody would be left to train on.
    """
    if not any(len(shared_patients(split, protocol.patients)) for split in protocol.splits):
        return None
    splits = [without_shared(split, protocol.patients) for split in protocol.splits]
    if any(not len(split.train) for split in splits):
        raise EvaluationError("every training patient is also tested: no training patients remain")
    return replace(protocol, splits=splits, name=f"{protocol.name}, without shared patients")


@dataclass
class Evaluation:
    """What an evaluation gives; plain values, but for predictions and scores.

    Attributes:
        rows: one row a set of features, probe, metric and share of the labels.
        differences: how far features are ahead of others on the same resamples; of an error, how far below.
        predictions: one row a test lesion, set of features, probe and share of the labels.
        survival: Kaplan-Meier curves of the two halves by risk, with the log-rank test.
        missing: `features` that could not be scored, and the `reason`.
        readers: of labels by several readers what `judge` gives; else empty.
        scores: of the test lesions, by split, set of features, probe and share of the labels; no plain values either.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    predictions: pd.DataFrame = field(default_factory=pd.DataFrame)
    survival: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    readers: dict[str, Any] = field(default_factory=dict)
    scores: dict[tuple[str, str, str, float], list[SplitScores]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What JSON can hold, by name."""
        return {name: value for name, value in vars(self).items() if name not in ("predictions", "scores")}


def evaluate_features(
    protocols: Sequence[Protocol],
    lesions: pd.DataFrame,
    candidates: Candidates,
    *,
    probes: Sequence[str],
    fractions: Sequence[float] = (1.0,),
    num_bootstrap: int = 2000,
    progress: bool = True,
) -> Evaluation:
    """Score all features with all probes on all shares of the labels, and compare them.

    Args:
        protocols: the evaluation, and others of the same labels and patients, such as one without shared patients.
        lesions: one row a lesion, in the order of the protocols.
        candidates: the features to score and to compare.
        probes: names of `PROBES`; the size alone is always given to the linear probe.
        fractions: shares of the training patients to fit on, above 0 and at most 1.
        num_bootstrap: resamples of the patients.
        progress: show a bar.

    Raises:
        EvaluationError: a probe that cannot learn such labels.
    """
    labels = protocols[0].labels
    for name in probes:
        if labels.kind not in PROBES[name].kinds:
            fitting = ", ".join(other for other, probe in PROBES.items() if labels.kind in probe.kinds)
            raise EvaluationError(f"probe={name} cannot learn {labels.kind} labels; {fitting} can")
    linear, metrics = LINEAR_PROBE[labels.kind], METRICS[labels.kind]
    jobs = [
        (protocol, inputs, name, fraction)
        for protocol in protocols
        for inputs in candidates.inputs
        for name in ([linear] if inputs.linear_only else probes)
        for fraction in sorted(set(fractions), reverse=True)
    ]
    evaluation = Evaluation(missing=list(candidates.missing))
    weights = protocols[0].weights(num_bootstrap)
    drawn: dict[tuple[str, str, str, float], dict[str, Array]] = {}
    predictions = []
    for protocol, inputs, name, fraction in tqdm(jobs, "evaluating", disable=not progress):
        try:
            results = score(PROBES[name], inputs, protocol, fraction)
        except ValueError as error:
            title = f"{inputs.name}, {name}, {fraction:.0%} of the patients, {protocol.name}"
            evaluation.missing.append({"features": title, "reason": str(error)})
            continue
        about = {"features": inputs.name, "probe": name, "fraction": fraction, "split": protocol.name}
        values = {title: resampled(metric, labels.values, results, weights) for title, metric in metrics.items()}
        evaluation.rows += _rows({"task": labels.name, **about}, values, results)
        drawn[protocol.name, inputs.name, name, fraction] = values
        evaluation.scores[protocol.name, inputs.name, name, fraction] = results
        predictions += [_predictions(one, protocol, lesions, about) for one in results]
        if labels.kind == "survival":  # above or below the median risk of the test rows, each split by its own
            rows = np.concatenate([one.rows for one in results])
            is_high = np.concatenate([one.scores > np.median(one.scores) for one in results])
            evaluation.survival.append({**about, **risk_halves(labels.values[rows], is_high)})
    evaluation.differences = _differences(drawn, candidates, labels)
    if labels.readers is not None:
        whole = {key[1:3]: results for key, results in evaluation.scores.items() if key[::3] == (protocols[0].name, 1)}
        evaluation.readers = judge(protocols[0], whole, num_bootstrap)
    if predictions:
        evaluation.predictions = pd.concat(predictions, ignore_index=True)
    return evaluation


def _rows(
    about: Mapping[str, Any], values: Mapping[str, Array], results: Sequence[SplitScores]
) -> list[dict[str, Any]]:
    sizes = {
        "num_train": round(float(np.mean([one.num_train for one in results]))),
        "num_test": len(np.unique(np.concatenate([one.rows for one in results]))),
        "settings": [one.setting for one in results],
    }
    return [{**about, "metric": metric, **_interval(drawn), **sizes} for metric, drawn in values.items()]


def _differences(
    drawn: Mapping[tuple[str, str, str, float], Mapping[str, Array]], candidates: Candidates, labels: Labels
) -> list[dict[str, Any]]:
    """How far features are ahead of what they are compared with; the size alone has only its linear probe."""
    differences = []
    for (split, features, name, fraction), values in drawn.items():
        for ours, against in candidates.compared:
            linear = split, against, LINEAR_PROBE[labels.kind], fraction
            other = drawn.get((split, against, name, fraction), drawn.get(linear))
            if features != ours or other is None:
                continue
            about = {"features": ours, "against": against, "split": split, "fraction": fraction}
            differences += [
                {**about, "task": labels.name, "probe": name, "metric": metric}
                # Positive is ahead, so of an error the sign is turned.
                | _interval(other[metric] - value if metric in ERRORS else value - other[metric])
                for metric, value in values.items()
            ]
    return differences


def _interval(drawn: Array) -> dict[str, float | None]:
    """The value and its interval; None where a metric has no meaning for these lesions."""
    if np.isnan(drawn[0]) or np.isnan(drawn[1:]).all():
        return {"value": None, "low": None, "high": None}
    return dict(vars(interval(drawn)))


def _predictions(
    results: SplitScores, protocol: Protocol, lesions: pd.DataFrame, about: Mapping[str, object]
) -> pd.DataFrame:
    labels, rows = protocol.labels, results.rows
    columns: dict[str, Any] = {ID_COLUMN: lesions[ID_COLUMN].to_numpy()[rows], "patient": protocol.patients[rows]}
    columns |= {"fold": results.split, **about}
    if labels.kind == "survival":
        columns |= {"label": labels.values[rows, 0], "event": labels.values[rows, 1].astype(bool)}
    else:
        columns["label"] = labels.values[rows]
    if results.scores.ndim == 2:
        columns |= {f"score_{name}": results.scores[:, number] for number, name in enumerate(labels.classes)}
    else:
        columns["score"] = results.scores
    if results.chosen is not None:
        columns["predicted"] = results.chosen
    return pd.DataFrame(columns)
