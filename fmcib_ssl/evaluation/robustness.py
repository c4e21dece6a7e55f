"""How stable features and decisions are when the same lesion is imaged, or pointed at, a little differently.

Lesions are embedded under every condition of `conditions`. Each feature is compared with itself on the clean patch by
its intraclass correlation. A probe is fitted on clean features of the training patients; for held-out patients it is
measured how many of its decisions change under a condition, and how good they still are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fmcib_ssl.evaluation.conditions import CLEAN, CONDITIONS
from fmcib_ssl.evaluation.embedding import embed_to_file, inference_of
from fmcib_ssl.evaluation.embedding_sources import FrozenEncoder, rebuilt_encoder
from fmcib_ssl.evaluation.evaluate import NUM_COMPONENTS
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.metrics import METRICS, interval
from fmcib_ssl.evaluation.probes import LINEAR_PROBE, PROBES, Inputs, Protocol, SplitScores, resampled, score
from fmcib_ssl.evaluation.readers import icc
from fmcib_ssl.evaluation.report_results import safe_name
from fmcib_ssl.io import digest_of
from fmcib_ssl.types import Array

#: Features of the same lesions in the same order, `(n, dim)`: for each condition one array a draw.
ByCondition = Mapping[str, Sequence[Array]]

#: Share of held-out lesions whose decision is not the one for the clean patch.
FLIPS = "decisions that flip"
MEDIAN_ICC = "median ICC"
#: Reliability above these is called good and excellent. Source: Koo and Li, "A guideline of selecting and reporting
#: intraclass correlation coefficients", 2016.
_ICC_BOUNDS = (0.75, 0.9)


def encoder_of(table: FeatureTable, trusted_targets: Sequence[str] = ()) -> FrozenEncoder:
    """The encoder that made a table of features, opened again.

    Raises:
        FeatureTableError: the table does not say what made it or of which lesions, or its weights have changed since.
        FileNotFoundError: the weights are gone.
    """
    about, name = table.provenance, table.name
    if not about.get("source") or not about.get("preprocessing"):
        raise FeatureTableError(f"{name!r} does not say where its lesions are: embed them with fmcib-ssl embed")
    return rebuilt_encoder(about, trusted_targets)


def embed_conditions(
    files: Sequence[Path],
    *,
    conditions: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    trusted_targets: Sequence[str] = (),
) -> dict[str, list[FeatureTable]]:
    """Embed the lesions of tables of features under every condition, each by the encoder that made the table.

    What is embedded is kept beside the table, in `NAME.conditions-DIGEST/`, so that the next call resumes.

    Args:
        files: of the tables; several are put side by side.
        conditions: names of `CONDITIONS`; None: all.
        device: a GPU if there is one, by default.
        trusted_targets: foreign encoders that may be built, as of `load_encoder`.

    Returns:
        By condition, a table a draw.

    Raises:
        FeatureTableError: as `encoder_of` and `embed_to_file`.
    """
    conditions = list(CONDITIONS) if conditions is None else conditions
    parts = [_embed_conditions(file, conditions, device, trusted_targets) for file in files]
    return {
        condition: [FeatureTable.side_by_side(draw) for draw in zip(*(part[condition] for part in parts), strict=True)]
        for condition in conditions
    }


def _embed_conditions(
    file: Path, conditions: Sequence[str], device: str | torch.device | None, trusted_targets: Sequence[str]
) -> dict[str, list[FeatureTable]]:
    table, embedded = FeatureTable.read(file), defaultdict(list)
    encoder, inference = encoder_of(table, trusted_targets), inference_of(table, device)
    folder = file.with_suffix(f".conditions-{digest_of(table.provenance)[:8]}")
    draws = [(condition, draw) for condition in conditions for draw in range(CONDITIONS[condition].num_draws)]
    for condition, draw in (bar := tqdm(draws, unit="table")):
        bar.set_description(f"{file.stem}, {condition}")
        output = folder / f"{safe_name(condition)}_{draw}.parquet"
        source = {**table.provenance["source"], "condition": {"name": condition, "draw": draw}}
        embed_to_file(encoder, source, output, inference, progress=False)
        embedded[condition].append(FeatureTable.read(output))
    return embedded


def feature_iccs(clean: Array, draws: Sequence[Array]) -> Array:
    """ICC(1) of each feature between the clean patch and one under a condition, mean over draws, `(features,)`.

    One-way random effects: a shift that all lesions share counts as disagreement, since it would mislead a probe that
    knows only clean features. Features that are the same for all lesions of a draw have no ICC and are left out.

    Args:
        clean: `(n, dim)`.
        draws: likewise, of the same lesions.

    Source: Shrout and Fleiss, "Intraclass correlations", 1979; used for this purpose by Zwanenburg et al., "Assessing
    robustness of radiomic features by image perturbation", 2019.
    """
    pairs = np.stack([np.stack([clean, draw], axis=-1) for draw in draws]).astype(np.float64)
    varies = (np.ptp(pairs, axis=(1, 3)) > 0).all(axis=0)
    values = [[icc(pair[:, feature]) for feature in np.flatnonzero(varies)] for pair in pairs]
    return np.asarray(np.mean(values, axis=0))


@dataclass
class Robustness:
    """What a comparison gives; plain values.

    Attributes:
        rows: one row a set of features, condition and metric: `value`, and `low` and `high`, None for an ICC. A metric
            `... less clean` is the paired difference from the clean patch.
        differences: one row a pair of sets of features, condition and metric: by how much that of `features` is above
            that of `against`, on the same resamples.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)


def measure_robustness(
    features: Mapping[str, ByCondition],
    protocol: Protocol | None = None,
    *,
    voxels: Sequence[str] = (),
    num_bootstrap: int = 2000,
) -> Robustness:
    """Compare features and, with labels, decisions under every condition with those on clean patches.

    Args:
        features: by name and condition, `CLEAN` among them; of the lesions of the protocol, in its order.
        protocol: labels, and who is trained on and tested. None: only features are compared.
        voxels: names of those features that are raw voxels, and are reduced by a PCA before a probe.
        num_bootstrap: resamples of the patients.
    """
    result = Robustness()
    drawn: dict[tuple[str, str, str], Array] = {}
    for name, by_condition in features.items():
        clean = by_condition[CLEAN][0]
        for condition, draws in by_condition.items():
            values = feature_iccs(clean, draws)
            metrics = {MEDIAN_ICC: float(np.median(values))}
            metrics |= {f"share with ICC above {bound}": float(np.mean(values > bound)) for bound in _ICC_BOUNDS}
            about = {"features": name, "condition": condition}
            result.rows += [
                {**about, "metric": metric, "value": value, "low": None, "high": None}
                for metric, value in metrics.items()
            ]
        if protocol is not None:
            components = NUM_COMPONENTS if name in voxels else None
            by_metric = _decisions(name, by_condition, protocol, components, num_bootstrap)
            drawn |= {(name, condition, metric): values for (condition, metric), values in by_metric.items()}
    for (name, condition, metric), values in drawn.items():
        about = {"features": name, "condition": condition, "metric": metric}
        result.rows.append({**about, **vars(interval(values))})
    for first, second in combinations(features, 2):
        for (name, condition, metric), values in drawn.items():
            if name == first:
                about = {"features": first, "against": second, "condition": condition, "metric": metric}
                result.differences.append({**about, **vars(interval(values - drawn[second, condition, metric]))})
    return result


def _decisions(
    name: str, by_condition: ByCondition, protocol: Protocol, num_components: int | None, num_bootstrap: int
) -> dict[tuple[str, str], Array]:
    """By condition and metric, the value and that of every resample of the patients; the mean over draws."""
    kind, labels = protocol.labels.kind, protocol.labels.values
    metric, function = next(iter(METRICS[kind].items()))
    weights = protocol.weights(num_bootstrap)
    arrays = [array for draws in by_condition.values() for array in draws]
    scores = iter(_held_out_scores(Inputs(name, np.concatenate(arrays), num_components), protocol, len(arrays)))
    by_draw = {condition: [next(scores) for _ in draws] for condition, draws in by_condition.items()}
    clean = by_draw[CLEAN][0]
    values: dict[tuple[str, str], Array] = {}
    for condition, draws in by_draw.items():
        values[condition, metric] = np.mean([resampled(function, labels, one, weights) for one in draws], axis=0)
        values[condition, f"{metric} less clean"] = values[condition, metric] - values[CLEAN, metric]
        if protocol.labels.num_classes:
            flips = [_flips(clean, one, weights) for one in draws]
            values[condition, FLIPS] = np.mean(flips, axis=0)
    return values


def _held_out_scores(inputs: Inputs, protocol: Protocol, num_arrays: int) -> list[list[SplitScores]]:
    """Scores of the test rows of every split in each of several arrays, by probes fitted on the first one.

    The arrays are stacked, so that one fit scores the test rows of all.
    """
    num, splits = len(protocol.patients), protocol.splits
    stacked = [replace(s, test=np.concatenate([s.test + num * k for k in range(num_arrays)])) for s in splits]
    results = score(PROBES[LINEAR_PROBE[protocol.labels.kind]], inputs, replace(protocol, splits=stacked))
    by_array: list[list[SplitScores]] = [[] for _ in range(num_arrays)]
    for split, result in zip(splits, results, strict=True):
        scores = np.split(result.scores, num_arrays)
        chosen = [None] * num_arrays if result.chosen is None else np.split(result.chosen, num_arrays)
        for k, of_array in enumerate(by_array):
            of_array.append(replace(result, rows=split.test, scores=scores[k], chosen=chosen[k]))
    return by_array


def _flips(clean: Sequence[SplitScores], changed: Sequence[SplitScores], weights: Array) -> Array:
    """Share of the test rows for which another class is chosen: the mean over splits, as of every metric."""
    # The distance from 0 of what is 1 where the class is another.
    flips = [
        replace(one, scores=np.asarray(one.chosen != before.chosen, dtype=float), chosen=None)
        for before, one in zip(clean, changed, strict=True)
    ]
    return resampled(METRICS["continuous"]["MAE"], np.zeros(weights.shape[1]), flips, weights)
