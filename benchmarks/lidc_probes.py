"""Probes of frozen features for benchmarks/lidc.py: one held-out fold at a time, kept on disk, then intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fmcib_ssl.evaluation import (
    PROBES,
    Estimate,
    Inputs,
    Labels,
    Protocol,
    Split,
    SplitScores,
    auc,
    interval,
    resampled,
    score,
)
from fmcib_ssl.io import atomic_write

Array = npt.NDArray[Any]

#: Logistic regression; coarser than the package's own grid, as there are thousands of fits.
PROBE = replace(PROBES["logistic"], settings=(1e-4, 1e-3, 1e-2, 1e-1))
NUM_BOOTSTRAP = 2000


@dataclass(frozen=True)
class Question:
    """What is asked of features.

    Attributes:
        task: its name.
        labels: 0 or 1, `(n,)`.
        fraction: of the training patients whose labels are used.
    """

    task: str
    labels: Array
    fraction: float = 1.0

    @property
    def file(self) -> str:
        """Part of a file's name."""
        return f"{self.task}-{self.fraction:g}"


def scores_of(
    question: Question, inputs: Callable[[], Inputs], patients: Array, part: Split, cache: Path
) -> SplitScores:
    """Scores of a part's test rows, computed once; the regularisation is chosen on folds of its training patients.

    Args:
        question: what is asked.
        inputs: gives the features of all rows; called only where nothing is cached.
        patients: of all rows.
        part: who is trained on and who is tested.
        cache: where the scores are kept.
    """
    if cache.is_file():
        return SplitScores(part.name, part.test, np.load(cache), float("nan"), len(part.train))
    (found,) = score(PROBE, inputs(), setup_of(question.task, question.labels, patients, [part]), question.fraction)
    with atomic_write(cache) as file:
        np.save(file, found.scores)
    return found


def setup_of(task: str, labels: Array, patients: Array, parts: Sequence[Split]) -> Protocol:
    """The package's own setup of a binary task."""
    everyone = np.arange(len(labels))
    return Protocol(Labels(task, "binary", labels, everyone, ("0", "1")), patients, parts, "folds", num_inner_folds=5)


def mean_auc(labels: Array, by_seed: Sequence[Sequence[SplitScores]], weights: Array) -> Array:
    """AUC within each fold, mean over folds, then over seeds; for all rows and for every resample of the patients."""
    found: Array = np.mean([resampled(auc, labels, parts, weights) for parts in by_seed], axis=0)
    return found


def told(drawn: Array) -> dict[str, float]:
    """The value and its interval, for JSON."""
    estimate: Estimate = interval(drawn)
    names = {"auc": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: round(value, 4) for name, value in names.items()}
