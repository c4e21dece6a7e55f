"""Scores of held-out lesions by a probe, part by part, and metrics of them on the resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fmcib_ssl.evaluation.bootstrap import Estimate, interval, patient_weights
from fmcib_ssl.evaluation.folds import Part, grouped_folds, nested_share
from fmcib_ssl.evaluation.frozen_probes import Inputs, Probe, choose_setting, fit_and_score
from fmcib_ssl.evaluation.labels import Labels
from fmcib_ssl.evaluation.metrics import Metric, balanced_accuracy, most_raised

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Setup:
    """What all features are evaluated on.

    Attributes:
        labels: of the lesions; row numbers below count these.
        patients: the patient of every lesion, `(n,)`.
        parts: who is trained on and who is tested.
        split: what the parts are called in tables.
        seed: of the inner folds, of a PCA, of which patients are in a share of the labels, and of the resamples.
        num_inner_folds: of the training patients, by which a setting is chosen.
    """

    labels: Labels
    patients: Array
    parts: Sequence[Part]
    split: str
    seed: int = 0
    num_inner_folds: int = 5
    _training: dict[tuple[str, float], tuple[Array, list[tuple[Array, Array]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def training(self, part: Part, fraction: float) -> tuple[Array, list[tuple[Array, Array]]]:
        """Rows to train on, a share of the part's, and folds of them by which a probe's setting is chosen.

        They are drawn once for all features. There are no folds where the part has validation rows.

        Raises:
            ValueError: too few patients of a class for folds.
        """
        if (part.name, fraction) not in self._training:
            kind, labels, patients = self.labels.kind, self.labels.values, self.patients
            rows = nested_share(kind, labels, patients, part.train, fraction=fraction, seed=self.seed)
            folds = []
            if part.val is None:
                folds = grouped_folds(kind, labels[rows], patients[rows], self.num_inner_folds, self.seed)
            self._training[part.name, fraction] = rows, folds
        return self._training[part.name, fraction]

    def weights(self, num_bootstrap: int) -> Array:
        """Weights of every lesion: a first row of ones, for the value, then the resamples."""
        drawn = patient_weights(self.patients, num_bootstrap, self.seed)
        return np.concatenate([np.ones((1, len(self.patients))), drawn])


@dataclass(frozen=True)
class PartScores:
    """What a probe makes of the test rows of a part; `scores` are `(n,)` or `(n, classes)`, `chosen` class numbers."""

    part: str
    rows: Array
    scores: Array
    setting: float
    num_train: int
    chosen: Array | None = None


def score(probe: Probe, inputs: Inputs, setup: Setup, fraction: float = 1.0) -> list[PartScores]:
    """Fit a probe on the training rows of every part, or on a share of their patients, and score the test rows.

    Raises:
        ValueError: too few patients of a class to choose a setting.
    """
    labels, values = setup.labels, setup.labels.values
    found = []
    for part in setup.parts:
        rows, folds = setup.training(part, fraction)
        train = replace(inputs, x=inputs.x[rows])
        given = None if part.val is None else (inputs.x[part.val], values[part.val])
        setting = choose_setting(
            probe, labels.kind, train, values[rows], folds,
            num_classes=labels.num_classes, validation=given, seed=setup.seed,
        )  # fmt: skip
        scores = fit_and_score(
            probe, train, values[rows], inputs.x[part.test],
            num_classes=labels.num_classes, setting=setting, seed=setup.seed,
        )  # fmt: skip
        chosen = None
        if labels.num_classes:
            chosen = most_raised(scores, np.bincount(values[rows], minlength=labels.num_classes) / len(rows))
        found.append(PartScores(part.name, part.test, scores, setting, len(rows), chosen))
    return found


def resampled(metric: Metric, values: Array, found: Sequence[PartScores], weights: Array) -> Array:
    """A metric for every row of weights: within each part, then the mean over those where it has a value.

    Scores of two parts come from two models and share no scale, so lesions of different parts are not compared.
    """
    parts = np.stack([metric(values[part.rows], _taken(metric, part), weights[:, part.rows]) for part in found])
    there = ~np.isnan(parts)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(there, parts, 0).sum(0) / there.sum(0)
    return mean


def estimate(metric: Metric, values: Array, found: Sequence[PartScores], weights: Array) -> Estimate:
    """The value by the first row of weights, the interval by the others.

    Raises:
        ValueError: no resample has a value.
    """
    drawn = resampled(metric, values, found, weights)
    return interval(drawn[0], drawn[1:])


def _taken(metric: Metric, part: PartScores) -> Array:
    return part.chosen if metric is balanced_accuracy and part.chosen is not None else part.scores
