"""Which of several models is best over several tasks, and which of them cannot be told apart.

A score is 0 at chance and 1 where every order is right, whatever the kind of label: Somers' D, which is 2 AUC - 1 and
2 C - 1, and Spearman's correlation. Each pair of models is compared by the mean over tasks of their difference. Its
variance is that of the same resamples of the patients, which is of the test sets, and of a task times `1 + retraining`
for the training sets: without that, models of equal worth are told apart by what their probes happened to learn.

Source: Wiesenfarth et al., Methods and open-source toolkit for analyzing and visualizing challenge results, Scientific
Reports 11, 2369, 2021 (ranks in resamples, pairs by Holm); Nadeau and Bengio, Inference for the generalization error,
Machine Learning 52, 2003 (training sets); Holm, A simple sequentially rejective multiple test procedure, 1979; Piepho,
An algorithm for a letter-based representation of all-pairwise comparisons, 2004 (groups).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from fmcib_ssl.evaluation.labels import Split
from fmcib_ssl.evaluation.metrics import interval
from fmcib_ssl.types import Array

#: Metrics with 0.5 at chance.
_HALF_AT_CHANCE = ("AUC", "C-index")
#: Chance of at least one wrong statement among all pairs.
_LEVEL = 0.05
_QUANTILE = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Ranking:
    """Models in the order of their mean score.

    Attributes:
        rows: of each model `model`, `score`, and its mean `rank` over tasks (1 is best) with `low` and `high`, the
            95 % interval over resamples; `group`, letters: models with a letter in common cannot be told apart.
        pairs: of each pair, the better `model` and the other, `against`; `difference` of their scores with `low` and
            `high`, 95 %; `p`, two-sided and adjusted by Holm; `separable`.
        tasks: on which all models have a value.
    """

    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    tasks: list[str]

    @property
    def verdict(self) -> str:
        """What may be said, in a sentence."""
        if not self.tasks:
            return "No task counts: there is no ranking."
        if len(self.rows) < 2:
            return "Fewer than two models have a value on every task: there is no ranking."
        if not any(pair["separable"] for pair in self.pairs):
            return f"The {len(self.rows)} models cannot be told apart."
        best = [row["model"] for row in self.rows if set(row["group"]) & set(self.rows[0]["group"])]
        behind = [row["model"] for row in self.rows if row["model"] not in best]
        if len(best) == 1:
            return f"{best[0]} is ahead of all others."
        return f"{', '.join(best)} cannot be told apart from the best. Behind {best[0]}: {', '.join(behind)}."


def chance_corrected(metric: str, values: Array) -> Array:
    """Score of a metric: 0 at chance, 1 at best."""
    return 2 * values - 1 if metric in _HALF_AT_CHANCE else values


def rank_models(drawn: Mapping[str, Mapping[str, Array]], retraining: Mapping[str, float] | None = None) -> Ranking:
    """Rank models by their mean score over tasks.

    Args:
        drawn: by task and model the score, `(1 + resamples,)`: its value, then that of every resample of the patients;
            resamples have the same numbers in all tasks. A model without a value on one of the tasks is left out.
        retraining: by task the variance that other training sets would add, as a share of that of the test sets; 0
            where nothing is trained. `retraining_share` says it of splits.
    """
    tasks = list(drawn)
    names = [name for name in dict.fromkeys(n for by_model in drawn.values() for n in by_model)
             if all(name in drawn[task] and np.isfinite(drawn[task][name][0]) for task in tasks)]  # fmt: skip
    if len(names) < 2:
        return Ranking([], [], tasks)
    scores = np.stack([[drawn[task][name] for name in names] for task in tasks])  # (tasks, models, 1 + resamples)
    scores = scores[:, :, np.isfinite(scores).all(axis=(0, 1))]
    ranks = rankdata(-scores, axis=1).mean(axis=0)
    means = scores.mean(axis=0)
    order = np.argsort(-means[:, 0], kind="stable")
    shares = np.array([(retraining or {}).get(task, 0.0) for task in tasks])
    pairs = _compare([names[k] for k in order], scores[:, order], shares)
    letters = _letters(len(names), [(i, j) for (i, j), pair in pairs.items() if pair["separable"]])
    rows = [
        {"model": names[k], "score": float(means[k, 0])}
        | {("rank" if key == "value" else key): value for key, value in vars(interval(ranks[k])).items()}
        | {"group": letters[place]}
        for place, k in enumerate(order)
    ]
    return Ranking(rows, list(pairs.values()), tasks)


def retraining_share(splits: Sequence[Split]) -> float:
    """Variance by other training sets as a share of that by other test sets, `splits * tested / trained`."""
    return float(len(splits) * np.mean([len(split.test) / len(split.train) for split in splits]))


def _compare(names: list[str], scores: Array, shares: Array) -> dict[tuple[int, int], dict[str, Any]]:
    """All pairs by their places; scores are `(tasks, models, 1 + resamples)`, the best model first."""
    pairs: dict[tuple[int, int], dict[str, Any]] = {}
    for i, j in combinations(range(len(names)), 2):
        apart = scores[:, i] - scores[:, j]
        value = float(apart[:, 0].mean())
        variance = apart[:, 1:].mean(0).var() + (shares * apart[:, 1:].var(1)).sum() / len(apart) ** 2
        error = float(np.sqrt(variance))
        # Not the share of resamples below 0: with hundreds of pairs, Holm's first step is finer than one of 2,000.
        p = float(2 * norm.sf(abs(value) / error)) if error > 0 else float(value == 0)
        low, high = (value + sign * _QUANTILE * error for sign in (-1, 1))
        pairs[i, j] = {"model": names[i], "against": names[j], "difference": value, "low": low, "high": high, "p": p}
    highest = 0.0
    for place, pair in enumerate(sorted(pairs.values(), key=lambda pair: pair["p"])):
        highest = max(highest, min(1.0, pair["p"] * (len(pairs) - place)))
        pair |= {"p": highest, "separable": highest < _LEVEL}
    return pairs


def _letters(num: int, separable: list[tuple[int, int]]) -> list[str]:
    """Of each of `num` models the letters of its groups; two that are separable have none in common."""
    groups = [frozenset(range(num))]
    for i, j in separable:
        split = [part for group in groups for part in ((group - {i}, group - {j}) if {i, j} <= group else (group,))]
        split = list(dict.fromkeys(split))
        groups = [group for group in split if not any(group < other for other in split)]
    groups.sort(key=sorted)
    return ["".join(chr(ord("a") + k) for k, group in enumerate(groups) if place in group) for place in range(num)]
