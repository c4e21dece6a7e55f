"""Labels by several readers: the target made of them, one reader against the others, and the ceiling of any score.

Readers need not be the same people for every lesion, nor in an order; each lesion has as many as its cells say. What
is asked of features is also asked of a reader: in every resample one reader of each lesion is drawn, and both the
reader and the features are scored against the target that the other readers make.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import betaln
from scipy.stats import rankdata

from fmcib_ssl.evaluation.labels import EvaluationError, Labels, passes
from fmcib_ssl.evaluation.metrics import ERRORS, METRICS, interval
from fmcib_ssl.evaluation.probes import Protocol, SplitScores, resampled
from fmcib_ssl.types import Array

Target = Literal["mean", "share", "majority", "unanimous"]

#: What tables call the reader that is taken for a rival.
ONE_READER = "one reader"
#: Metrics whose highest value follows from how far readers agree.
CEILING_METRICS = {
    "binary": ("AUC", "average precision"), "continuous": ("Spearman", "Pearson"), "share": ("Spearman", "Pearson"),
}  # fmt: skip
#: Lesions with fewer readings have no target: there would be no other reader to compare one with.
_MIN_READERS = 2
#: Draws of one reader a lesion, or of halves of them, whose mean is the value.
_NUM_DRAWS = 100
#: Lesions that are simulated for a ceiling.
_NUM_SIMULATED = 200_000


@dataclass(frozen=True)
class Readers:
    """Ratings and the target that is made of them.

    Attributes:
        name: of what was rated.
        ratings: `(lesions, readers)`, NaN where a lesion has fewer readers than another.
        target: `mean` of the ratings; `share` of the readers whose rating meets the threshold; `majority` of them, ties
            left out; `unanimous`, lesions on which they disagree left out.
        threshold: such as `<4.5`; None for the mean as a value.
    """

    name: str
    ratings: Array
    target: Target = "mean"
    threshold: str | None = None

    def __post_init__(self) -> None:
        if self.threshold is None and self.target != "mean":
            raise EvaluationError(f"readers={self.target} counts votes: say with threshold= what a vote is, as '>=4'")

    @property
    def kind(self) -> Literal["binary", "continuous", "share"]:
        """Of the labels."""
        if self.target == "share":
            return "share"
        return "continuous" if self.threshold is None else "binary"

    def values(self, ratings: Array | None = None) -> Array:
        """The target of each lesion, `(n,)`; NaN where it has none.

        Args:
            ratings: of which to make it; None: all of them.
        """
        ratings = self.ratings if ratings is None else ratings
        num = np.isfinite(ratings).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.target == "mean":
                means = np.where(num > 0, np.nansum(ratings, axis=1) / num, np.nan)
                return means if self.threshold is None else self.votes(means)
            share = np.nansum(self.votes(ratings), axis=1) / num
        if self.target == "share":
            return np.where(num > 0, share, np.nan)
        decided = share != 0.5 if self.target == "majority" else (share == 0) | (share == 1)
        return np.where((num > 0) & decided, share > 0.5, np.nan)

    def labels(self) -> Labels:
        """The labels of the lesions that have at least two readings and a target.

        Raises:
            EvaluationError: fewer than two different labels are left.
        """
        values = self.values()
        rows = np.flatnonzero(np.isfinite(values) & _have_several(self.ratings))
        if len(np.unique(values[rows])) < 2:
            raise EvaluationError(f"{self.title}: {len(rows)} lesions have a label, and it is the same for all of them")
        if self.kind == "binary":
            names = (f"not {self.threshold}", str(self.threshold))
            return Labels(self.title, "binary", values[rows].astype(np.int64), rows, names, self)
        return Labels(self.title, self.kind, values[rows], rows, readers=self)

    @property
    def title(self) -> str:
        """Such as `majority of texture<5`."""
        return f"{self.target} of {self.name}{self.threshold or ''}"

    def counts(self) -> dict[str, int]:
        """How many lesions each target keeps that this threshold allows."""
        targets: Sequence[Target] = ("mean",) if self.threshold is None else ("mean", "share", "majority", "unanimous")
        made = {target: replace(self, target=target).values() for target in targets}
        several = _have_several(self.ratings)
        return {target: int((np.isfinite(values) & several).sum()) for target, values in made.items()}

    def scores(self, ratings: Array) -> tuple[Array, Array | None]:
        """What one reader's ratings, `(n,)`, say of the target, higher for class 1, and the class that is chosen."""
        if self.threshold is None:
            return ratings, None
        votes = self.votes(ratings)
        if self.target == "share":
            return votes, None
        if self.threshold.strip()[:2] in ("==", "!="):
            return votes, votes
        return (-ratings if "<" in self.threshold else ratings), votes

    def votes(self, ratings: Array) -> Array:
        """1 where a rating meets the threshold, NaN where there is none."""
        return passes(ratings, str(self.threshold))


def _have_several(ratings: Array) -> Array:
    """Which lesions have enough readings for a target and a reader besides."""
    return np.asarray(np.isfinite(ratings).sum(1) >= _MIN_READERS)


def read_ratings(lesions: pd.DataFrame, name: str) -> Array:
    """Ratings from the columns `NAME_1`, `NAME_2`, …, or from one column of lists, `(lesions, readers)`.

    Raises:
        EvaluationError: no such columns, only one, or a rating that is not a number.
    """
    numbered = [column for column in lesions if re.fullmatch(rf"{re.escape(name)}_\d+", str(column))]
    if len(numbered) > 1:
        cells = lesions[numbered]
    elif name in lesions and lesions[name].map(lambda cell: isinstance(cell, list | tuple | np.ndarray)).any():
        lists = [list(cell) if isinstance(cell, list | tuple | np.ndarray) else [] for cell in lesions[name]]
        cells = pd.DataFrame(list(zip_longest(*lists))).T.set_axis(lesions.index)
    else:
        raise EvaluationError(
            f"readers= needs the columns {name}_1, {name}_2 and so on, or lists in a column {name}; there is "
            f"{', '.join(map(str, numbered or lesions))}"
        )
    numbers = cells.apply(pd.to_numeric, errors="coerce")
    if (wrong := cells.to_numpy(object)[(numbers.isna() & cells.notna()).to_numpy()]).size:
        raise EvaluationError(f"ratings of {name!r} should be numbers; {wrong.size} are not, such as {wrong[0]!r}")
    return np.asarray(numbers.to_numpy(dtype=np.float64, na_value=np.nan))


def judge(
    protocol: Protocol, results: Mapping[tuple[str, str], Sequence[SplitScores]], num_bootstrap: int = 2000
) -> dict[str, Any]:
    """One reader against the others, how far features are ahead of that reader, and what could be reached.

    In each resample of the patients one reader is drawn for every lesion. The reader's rating and the features' scores
    are judged against the target of the other readers, within each split as features always are. Where the others make
    no target, as with ties, the lesion is left out for both. Lesions whose votes are tied with the reader included are
    left out from the start, which favours the reader; of unanimous lesions there is nothing to compare.

    Args:
        protocol: whose labels were made by readers. Their agreement is that on all lesions, also on those that the
            target leaves out: without the ties of a majority they would seem to agree better than they do.
        results: of every split, by features and probe.
        num_bootstrap: resamples.

    Returns:
        Plain values: `target`; `kept`, lesions by target; `reliability`; `ceiling` by metric; `rows`, one a metric for
        the reader and for each set of features, all against the others; `differences` of features and the reader.
    """
    readers: Readers = protocol.labels.readers  # type: ignore[assignment]
    judged = replace(readers, ratings=readers.ratings[protocol.labels.rows])
    rows, differences = _against_others(judged, protocol, results, num_bootstrap)
    num_readers = float(np.isfinite(readers.ratings[_have_several(readers.ratings)]).sum(1).mean())
    one_reader = icc(readers.ratings)
    return {
        "target": readers.target,
        "kept": readers.counts(),
        "num_readers": num_readers,
        "reliability": {
            "one reader (ICC)": one_reader,
            "mean (ICC, Spearman-Brown)": stepped_up(one_reader, num_readers),
            "mean (split half)": split_half(readers.ratings, protocol.seed),
            "mean (split half, ranks)": split_half(readers.ratings, protocol.seed, ranks=True),
        },
        "ceiling": ceiling(readers, protocol.seed),
        "rows": rows,
        "differences": differences,
    }


def _against_others(
    readers: Readers, protocol: Protocol, results: Mapping[tuple[str, str], Sequence[SplitScores]], num_bootstrap: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if readers.target == "unanimous":  # lesions are chosen by every reader's agreement, so each one is always right
        return [], []
    weights, rng = protocol.weights(num_bootstrap), np.random.default_rng([protocol.seed, 1])
    drawn: dict[tuple[str, str, str], list[Array]] = {}
    # Each choice of one reader a lesion serves a share of the resamples, and with weights of 1 the value.
    for block in np.array_split(np.arange(1, len(weights)), _NUM_DRAWS):
        targets, ratings = _one_and_others(readers, rng)
        known = np.isfinite(targets)
        targets, weight = np.where(known, targets, targets[known][0]), weights[np.r_[0, block]] * known
        scores, chosen = readers.scores(ratings)
        reader = [
            SplitScores(s.name, s.test, scores[s.test], 0.0, 0, None if chosen is None else chosen[s.test])
            for s in protocol.splits
        ]
        for (name, probe), splits in {(ONE_READER, "-"): reader, **results}.items():
            for title, metric in METRICS[readers.kind].items():
                drawn.setdefault((name, probe, title), []).append(resampled(metric, targets, splits, weight))
    values = {
        key: np.r_[np.mean([block[0] for block in blocks]), np.concatenate([block[1:] for block in blocks])]
        for key, blocks in drawn.items()
    }
    rows, differences = [], []
    for (name, probe, title), value in values.items():
        about = {"features": name, "probe": probe, "metric": title}
        rows.append(about | vars(interval(value)))
        if name != ONE_READER:
            ahead = (value - values[ONE_READER, "-", title]) * (-1 if title in ERRORS else 1)
            differences.append({**about, "against": ONE_READER, **vars(interval(ahead))})
    return rows, differences


def _one_and_others(readers: Readers, rng: np.random.Generator) -> tuple[Array, Array]:
    """The target of the others and the rating of the one reader that is drawn for each lesion."""
    ratings = readers.ratings
    keys = np.where(np.isfinite(ratings), rng.random(ratings.shape), -1)
    one = keys.argmax(1)[:, None]
    others = ratings.copy()
    np.put_along_axis(others, one, np.nan, axis=1)
    return readers.values(others), np.take_along_axis(ratings, one, axis=1)[:, 0]


def icc(ratings: Array) -> float:
    """Reliability of a single rating: ICC(1), one-way random effects, for any number of readers a lesion.

    Args:
        ratings: `(lesions, readers)`, NaN where there is none; lesions with fewer than two are left out.

    Source: Shrout and Fleiss, "Intraclass correlations", 1979; unequal numbers as in Donner, 1986.
    """
    ratings = ratings[_have_several(ratings)]
    num = np.isfinite(ratings).sum(1)
    means = np.nanmean(ratings, axis=1)
    total = num.sum()
    grand = (num * means).sum() / total
    between = (num * (means - grand) ** 2).sum() / (len(num) - 1)
    within = np.nansum((ratings - means[:, None]) ** 2) / (total - len(num))
    size = (total - (num**2).sum() / total) / (len(num) - 1)
    return float((between - within) / (between + (size - 1) * within))


def stepped_up(reliability: float, factor: float) -> float:
    """Spearman-Brown: the reliability of a mean of `factor` times as many readings."""
    return factor * reliability / (1 + (factor - 1) * reliability)


def split_half(ratings: Array, seed: int = 0, *, ranks: bool = False) -> float:
    """Reliability of the mean of all readers, from the correlation of the means of two halves of them.

    Halves are drawn anew for each lesion, 100 times, the correlations averaged and stepped up by Spearman-Brown. Of an
    odd number one reader sits out, so that both halves are of equal size.

    Args:
        ratings: `(lesions, readers)`, NaN where there is none; lesions with fewer than two are left out.
        seed: of the halves.
        ranks: correlate ranks (Spearman), not values (Pearson).
    """
    ratings = ratings[_have_several(ratings)]
    num = np.isfinite(ratings).sum(1)
    half = (num // 2)[:, None]
    rng = np.random.default_rng([seed, 2])
    correlations = []
    for _ in range(_NUM_DRAWS):
        order = np.where(np.isfinite(ratings), rng.random(ratings.shape), 2).argsort(1).argsort(1)
        halves = order < half, (half <= order) & (order < 2 * half)
        means = [np.where(half_of, ratings, 0).sum(1) / half[:, 0] for half_of in halves]
        x, y = map(rankdata, means) if ranks else means
        correlations.append(np.corrcoef(x, y)[0, 1])
    return stepped_up(float(np.mean(correlations)), float((num / half[:, 0]).mean()))


def ceiling(readers: Readers, seed: int = 0) -> dict[str, float]:
    """What a perfect score could reach against the target of these readers, by metric.

    Perfect is what infinitely many readers like these would say on average. How it is estimated depends on the target:

    - mean as a value: its correlation is the square root of the split-half reliability of the mean.
    - mean below or above a threshold: score and mean are taken for jointly normal after a monotone transform, with that
      rank correlation, and the mean is cut at the share of the classes.
    - votes: each lesion's chance of a vote is drawn from a beta distribution that is fitted to the votes
      (beta-binomial), then as many votes as a lesion has. The chance is the perfect score.

    On simulated readers the AUC was within .03 of the truth, of votes mostly within .005.

    Source: Spearman, "The proof and measurement of association between two things", 1904; Skellam, 1948.
    """
    ratings = readers.ratings[_have_several(readers.ratings)]
    rng = np.random.default_rng([seed, 3])
    if readers.target == "mean":
        rank = np.sqrt(max(split_half(ratings, seed, ranks=True), 0.0))
        if readers.threshold is None:
            return {"Spearman": float(rank), "Pearson": float(np.sqrt(max(split_half(ratings, seed), 0.0)))}
        correlation = 2 * np.sin(np.pi / 6 * rank)  # of normal variables whose ranks correlate like this
        perfect, noise = rng.normal(size=(2, _NUM_SIMULATED))
        mean = correlation * perfect + np.sqrt(1 - correlation**2) * noise
        target = (mean > np.quantile(mean, 1 - readers.values(ratings).mean())).astype(np.float64)
    else:
        num = np.resize(np.isfinite(ratings).sum(1), _NUM_SIMULATED)
        a, b = _vote_chances(readers.votes(ratings))
        perfect = rng.beta(a, b, size=_NUM_SIMULATED)
        votes = np.where(np.arange(num.max()) < num[:, None], rng.random((_NUM_SIMULATED, num.max())), np.nan)
        voted = np.where(np.isfinite(votes), votes < perfect[:, None], np.nan)
        target = Readers(readers.name, voted, readers.target, ">0.5").values()
    known = np.isfinite(target)
    metrics, weights = METRICS[readers.kind], np.ones((1, int(known.sum())))
    return {
        name: float(metrics[name](target[known], perfect[known], weights)[0]) for name in CEILING_METRICS[readers.kind]
    }


def _vote_chances(votes: Array) -> list[float]:
    """Both parameters of the beta distribution of the chance of a vote, by maximum likelihood."""
    num, ones = np.isfinite(votes).sum(1), np.nansum(votes, axis=1)

    def loss(logarithms: Array) -> float:
        a, b = np.exp(logarithms)
        return float((betaln(a, b) - betaln(ones + a, num - ones + b)).sum())

    return list(np.exp(minimize(loss, np.zeros(2), bounds=[(-6.0, 6.0)] * 2).x))
