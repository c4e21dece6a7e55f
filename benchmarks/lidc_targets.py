"""What benchmarks/lidc.py asks of features: targets made of the readers' ratings, and metrics with intervals.

Every target has the same folds of patients; a target that leaves lesions out leaves them out of every fold. Values are
means over folds, then over seeds. A reader is compared as `fmcib_ssl.evaluation.readers.judge` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from lidc_data import NUM_FOLDS, Nodules

from fmcib_ssl.evaluation import (
    METRICS,
    PROBES,
    Labels,
    Protocol,
    Readers,
    Split,
    SplitScores,
    interval,
    read_labels,
    read_ratings,
    resampled,
    within,
    without_shared,
)
from fmcib_ssl.evaluation.probes import Probe
from fmcib_ssl.evaluation.readers import judge
from fmcib_ssl.types import Array

#: What is class 1, or a vote for it. Texture and calcification fall with what is of interest, margin with sharpness.
THRESHOLDS = {"texture": "<5", "margin": "<=3", "spiculation": ">1", "calcification": "<6", "malignancy": ">3"}
#: Grades, which have a mean; calcification's ratings are kinds.
GRADED = ("texture", "margin", "spiculation", "malignancy")
#: A rating of 3 in malignancy is "indeterminate": no vote, as in most work on these nodules.
NO_VOTE = {"malignancy": 3}
FRACTIONS = (0.5, 0.2, 0.1)
SIZES = ("small", "medium", "large")
METRIC_NAMES = {"binary": ("AUC",), "continuous": ("Spearman", "Pearson")}
NUM_BOOTSTRAP = 2000
#: By kind of label. Logistic regression is coarser than the package's own, as there are thousands of fits.
PROBE = {"binary": replace(PROBES["logistic"], settings=(1e-4, 1e-3, 1e-2, 1e-1)), "continuous": PROBES["ridge"]}
REFERENCES = (
    "concentric", "learned_only", "point_features", "random", "random_radial", "random_concentric", "raw_voxels",
    "lightly_simclr", "lightly_simclr_concentric", "diameter",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Question:
    """A target, who is trained on and who is tested.

    Attributes:
        task: what was rated.
        target: `mean` of the ratings; `majority`, or `unanimous`, of the votes; `mode`, the rating that most readers
            gave and the smallest of several; `published`.
        protocol: the labels, and splits named as those of `splits_of`.
        fraction: of the training patients whose labels are used.
    """

    task: str
    target: str
    protocol: Protocol
    fraction: float = 1.0

    @property
    def probe(self) -> Probe:
        """What is fitted on features."""
        return PROBE[self.protocol.labels.kind]

    @cached_property
    def protocols(self) -> list[Protocol]:
        """The protocol of each split, since features differ from split to split; kept, as its inner folds take long."""
        return [replace(self.protocol, splits=[split]) for split in self.protocol.splits]

    @property
    def about(self) -> dict[str, Any]:
        """How rows of results name it."""
        return {"task": self.task, "target": self.target} | ({"fraction": self.fraction} if self.fraction < 1 else {})


def splits_of(nodules: Nodules, rows: Array | None = None) -> list[Split]:
    """Each fold tested once.

    Args:
        nodules: with the fold of each.
        rows: those that have a label, which row numbers count; None: all.
    """
    fold = nodules.fold if rows is None else nodules.fold[rows]
    return [Split(f"fold{k}", np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(NUM_FOLDS)]


def published_split(nodules: Nodules) -> Split:
    """The published malignancy split, without the patients that it has on two sides in training and validation."""
    rows = {side: np.flatnonzero(nodules.published == side) for side in ("train", "val", "test")}
    return without_shared(Split("published", rows["train"], rows["test"], rows["val"]), nodules.patients)


def questions(nodules: Nodules) -> Iterator[Question]:
    """Every target of every task; texture and margin with a share of the labels; the published split."""
    for task, threshold in THRESHOLDS.items():
        ratings = read_ratings(nodules.lesions, task)
        votes = np.where(ratings == NO_VOTE.get(task), np.nan, ratings)
        labels = {"mean": Readers(task, ratings).labels()} if task in GRADED else {}
        labels |= {"majority": Readers(task, votes, "majority", threshold).labels()}
        labels |= {"unanimous": Readers(task, votes, "unanimous", threshold).labels()}
        labels |= {"mode": read_labels(nodules.lesions, "binary", label=task, threshold=threshold)}
        for target, own in labels.items():
            protocol = Protocol(own, nodules.patients[own.rows], splits_of(nodules, own.rows), "folds")
            yield Question(task, target, protocol)
            if target == "mean" and task in ("texture", "margin"):
                yield from (Question(task, target, protocol, fraction) for fraction in FRACTIONS)
    everyone = np.arange(len(nodules.patients))
    own = Labels("published malignancy", "binary", nodules.published_malignancy, everyone, ("0", "1"))
    yield Question("malignancy", "published", Protocol(own, nodules.patients, [published_split(nodules)], "published"))


def within_sizes(question: Question, diameter_mm: Array, results: Mapping[str, Sequence[SplitScores]]) -> Iterator[Any]:
    """The question asked of lesions of about one size: each third by diameter, and the mean over all three.

    Lesions of one fold and third are compared with each other only, so that what the size says is mostly taken away.

    Args:
        question: with folds.
        diameter_mm: of all nodules, whose terciles these are.
        results: of every split, by method.

    Yields:
        A question, whose task ends with the size, or with `within_size`, and the results that belong to it.
    """
    third = np.searchsorted(np.quantile(diameter_mm, [1 / 3, 2 / 3]), diameter_mm)[question.protocol.labels.rows]
    for name, kept in (("within_size", (0, 1, 2)), *((size, (k,)) for k, size in enumerate(SIZES))):
        splits = [replace(s, test=s.test[third[s.test] == k]) for k in kept for s in question.protocol.splits]
        cut = {
            method: [one for k in kept for one in within(scores, third) if third[one.rows[0]] == k]
            for method, scores in results.items()
        }
        protocol = replace(question.protocol, splits=splits)
        yield replace(question, task=f"{question.task}_{name}", protocol=protocol), cut


def answers(question: Question, results: Mapping[str, Sequence[SplitScores]]) -> dict[str, list[dict[str, Any]]]:
    """Values and differences with 95 % intervals over patients.

    Args:
        question: what was asked.
        results: scores of all splits and seeds, by method.

    Returns:
        `rows`, one a method and metric; `differences`, how far a method is ahead of another on the same resamples; and
        `targets`, one: how many lesions it keeps, how far its readers agree, and the ceiling.
    """
    protocol, about = question.protocol, question.about
    labels, weights = protocol.labels, protocol.weights(NUM_BOOTSTRAP)
    rows, differences = [], []
    for name in METRIC_NAMES[labels.kind]:
        metric = {**about, "metric": name.lower()}
        drawn = {
            method: resampled(METRICS[labels.kind][name], labels.values, scores, weights)
            for method, scores in results.items()
        }
        for method, values in drawn.items():
            num_seeds = len(results[method]) // len(protocol.splits)
            rows.append({"method": method, **metric, **_rounded(vars(interval(values))), "seeds": num_seeds})
        for method, against in compared(list(results)):
            ahead = interval(drawn[method] - drawn[against])
            differences.append({"method": method, "against": against, **metric, **_rounded(vars(ahead))})
    tested = np.concatenate([split.test for split in protocol.splits])
    target = {**about, "label": labels.name, "lesions": len(tested)}
    if labels.classes:
        target["positives"] = int(labels.values[tested].sum())
    if labels.readers is not None and question.fraction == 1:
        judged = judge(protocol, {(method, ""): scores for method, scores in results.items()}, NUM_BOOTSTRAP)
        for row in [*judged["rows"], *judged["differences"]]:
            if row["metric"] not in METRIC_NAMES[labels.kind]:
                continue
            estimate = _rounded({key: row[key] for key in ("value", "low", "high")})
            metric = {**about, "metric": row["metric"].lower()}
            if "against" in row:
                differences.append({"method": row["features"], "against": "one_reader", **metric, **estimate})
            elif row["features"] not in results:
                rows.append({"method": "one_reader", **metric, **estimate, "seeds": 0})
        target |= {"reliability": _rounded(judged["reliability"])}
        target |= {"ceiling": _rounded({key.lower(): value for key, value in judged["ceiling"].items()})}
    return {"rows": rows, "differences": differences, "targets": [target]}


def compared(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: the recipe with every reference, all with statistics, those of two with both."""
    pairs = [("recipe", other) for other in REFERENCES]
    pairs += [(method, "hu_statistics") for method in methods]
    pairs += [(method, part) for method in methods if "+" in method for part in method.split("+")]
    return [(a, b) for a, b in dict.fromkeys(pairs) if a in methods and b in methods and a != b]


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
