"""Labels by several readers: targets by hand; reader, reliability and ceiling against simulated readers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f_oneway, spearmanr
from sklearn.metrics import roc_auc_score

from fmcib_ssl.evaluation.labels import EvaluationError, cross_validation
from fmcib_ssl.evaluation.probes import PROBES, Inputs, Protocol, score
from fmcib_ssl.evaluation.readers import (
    CEILING_METRICS,
    ONE_READER,
    Readers,
    ceiling,
    icc,
    judge,
    read_ratings,
    split_half,
    stepped_up,
)
from fmcib_ssl.types import Array

NAN = np.nan
#: Ratings of four lesions; the last reader saw two of them.
RATINGS = np.array([[5, 5, 4, NAN], [1, 5, 5, 1], [2, 3, 2, NAN], [5, 5, 5, 5.0]])


def simulated(num: int, noise: float, seed: int = 0) -> tuple[Array, Array]:
    """What infinitely many readers would say, and grades of 1 to 5 by three or four readers."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=num)
    ratings = np.clip(np.round(3 + truth[:, None] + noise * rng.normal(size=(num, 4))), 1, 5)
    ratings[rng.random(num) < 0.3, 3] = NAN
    return truth, ratings


def protocol_of(readers: Readers, num_folds: int = 3) -> Protocol:
    labels = readers.labels()
    patients = np.arange(len(labels.rows)) // 2
    splits = cross_validation(labels.kind, labels.values, patients, num_folds=num_folds)
    return Protocol(labels, patients, splits, "folds")


@pytest.mark.parametrize(
    ("target", "threshold", "expected"),
    [
        ("mean", None, [14 / 3, 3, 7 / 3, 5]),
        ("mean", "<3", [0, 0, 1, 0]),
        ("share", "<5", [1 / 3, 0.5, 1, 0]),
        ("majority", "<5", [0, NAN, 1, 0]),
        ("unanimous", "<5", [NAN, NAN, 1, 0]),
        ("unanimous", ">=4", [1, NAN, 0, 1]),
    ],
)
def test_targets(target: str, threshold: str | None, expected: list[float]) -> None:
    readers = Readers("texture", RATINGS, target, threshold)  # type: ignore[arg-type]
    np.testing.assert_allclose(readers.values(), expected)
    labels = readers.labels()
    kept = np.flatnonzero(np.isfinite(expected))
    assert labels.rows.tolist() == kept.tolist()
    np.testing.assert_allclose(labels.values, np.array(expected)[kept])
    np.testing.assert_array_equal(labels.readers.ratings[labels.rows], RATINGS[kept])  # type: ignore[union-attr]


def test_what_is_kept_is_counted_and_a_single_reading_is_none() -> None:
    ratings = np.vstack([RATINGS, [5, NAN, NAN, NAN]])
    assert Readers("texture", ratings, "mean", "<5").counts() == {
        "mean": 4, "share": 4, "majority": 3, "unanimous": 2
    }  # fmt: skip
    assert 4 not in Readers("texture", ratings).labels().rows


def test_refusals() -> None:
    with pytest.raises(EvaluationError, match="counts votes: say with threshold="):
        Readers("texture", RATINGS, "majority")
    with pytest.raises(EvaluationError, match="4 lesions have a label, and it is the same"):
        Readers("texture", RATINGS, "mean", "<9").labels()
    with pytest.raises(EvaluationError, match="needs the columns texture_1, texture_2 and so on"):
        read_ratings(pd.DataFrame({"texture": [1, 2]}), "texture")
    with pytest.raises(EvaluationError, match="should be numbers; 1 are not, such as 'solid'"):
        read_ratings(pd.DataFrame({"texture_1": ["1", "solid"], "texture_2": [1, 2]}), "texture")


def test_ratings_are_read_from_columns_or_lists() -> None:
    columns = pd.DataFrame(RATINGS, columns=[f"texture_{k}" for k in (1, 2, 3, 4)]).assign(texture_mode=5)
    lists = pd.DataFrame({"texture": [row[np.isfinite(row)].tolist() for row in RATINGS]})
    for lesions in (columns, lists):
        np.testing.assert_array_equal(read_ratings(lesions, "texture"), RATINGS)


def test_icc_is_that_of_an_analysis_of_variance() -> None:
    """ICC(1) from the F of scipy's one-way analysis, with lesions as groups."""
    _, ratings = simulated(60, 0.8)
    groups = [row[np.isfinite(row)] for row in ratings]
    num = np.array([len(group) for group in groups])
    size = (num.sum() - (num**2).sum() / num.sum()) / (len(num) - 1)
    f = f_oneway(*groups).statistic
    np.testing.assert_allclose(icc(ratings), (f - 1) / (f + size - 1))


def test_reliability_of_simulated_readers() -> None:
    """Ratings are truth plus noise of variance 2: one has a reliability of 1/3, the mean of four one of 2/3."""
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=(4000, 1)) + np.sqrt(2) * rng.normal(size=(4000, 4))
    np.testing.assert_allclose(icc(ratings), 1 / 3, atol=0.02)
    np.testing.assert_allclose(stepped_up(1 / 3, 4), 2 / 3)
    np.testing.assert_allclose(split_half(ratings), 2 / 3, atol=0.02)


@pytest.mark.parametrize("noise", [0.5, 1.0])
@pytest.mark.parametrize(
    ("target", "threshold"),
    [("mean", None), ("mean", "<2.5"), ("majority", ">3"), ("unanimous", ">3"), ("share", ">3")],
)
def test_the_ceiling_is_what_the_truth_reaches(target: str, threshold: str | None, noise: float) -> None:
    """Of a thousand lesions it is near what the truth has against readers of many lesions."""
    sign = -1 if threshold == "<2.5" else 1
    many = Readers("x", simulated(100_000, noise, seed=1)[1], target, threshold)  # type: ignore[arg-type]
    truth, values = sign * simulated(100_000, noise, seed=1)[0], many.values()
    known = np.isfinite(values)
    metric = spearmanr if many.kind != "binary" else lambda y, x: (roc_auc_score(y, x),)
    expected = metric(values[known], truth[known])[0]
    few = Readers("x", simulated(1000, noise)[1], target, threshold)  # type: ignore[arg-type]
    np.testing.assert_allclose(ceiling(few)[CEILING_METRICS[many.kind][0]], expected, atol=0.025)


def test_one_reader_against_the_others() -> None:
    """The row of the reader is the mean over readers; the truth is ahead of it, what a further reader says is not."""
    truth, ratings = simulated(600, 1.0)
    further = np.clip(np.round(3 + truth + np.random.default_rng(9).normal(size=600)), 1, 5)
    readers = Readers("texture", ratings)
    protocol = protocol_of(readers, num_folds=2)
    columns = {"truth": truth, "reader": further, "noise": np.random.default_rng(5).normal(size=600)}
    results = {
        (name, "ridge"): score(PROBES["ridge"], Inputs(name, x[:, None]), protocol) for name, x in columns.items()
    }
    judged = judge(protocol, results, num_bootstrap=200)
    rows = {(row["features"], row["metric"]): row for row in judged["rows"]}
    by_hand = [
        np.mean(
            [spearmanr(ratings[s.test, k], np.nanmean(np.delete(ratings, k, 1), axis=1)[s.test])[0] for k in range(3)]
        )
        for s in protocol.splits
    ]
    reader = rows[ONE_READER, "Spearman"]
    np.testing.assert_allclose(reader["value"], np.mean(by_hand), atol=0.02)
    assert reader["low"] < reader["value"] < reader["high"]
    ahead = {row["features"]: row for row in judged["differences"] if row["metric"] == "Spearman"}
    assert ahead["truth"]["low"] > 0
    assert ahead["reader"]["low"] < 0 < ahead["reader"]["high"]
    assert ahead["noise"]["high"] < 0
    for name, row in ahead.items():
        np.testing.assert_allclose(row["value"], rows[name, "Spearman"]["value"] - reader["value"])


@pytest.mark.parametrize("target", ["mean", "share", "majority"])
def test_every_target_is_judged(target: str) -> None:
    truth, ratings = simulated(240, 0.7)
    readers = Readers("texture", ratings, target, ">3")  # type: ignore[arg-type]
    protocol = protocol_of(readers)
    x = truth[protocol.labels.rows][:, None]
    results = {("truth", "logistic"): score(PROBES["logistic"], Inputs("truth", x), protocol)}
    judged = judge(protocol, results, num_bootstrap=50)
    metric = CEILING_METRICS[readers.kind][0]
    value = {row["features"]: row["value"] for row in judged["rows"] if row["metric"] == metric}
    assert value[ONE_READER] < value["truth"]
    assert judged["ceiling"][metric] > 0.7
    assert judged["kept"]["unanimous"] <= judged["kept"]["majority"] <= judged["kept"]["mean"]


@pytest.mark.parametrize("target", ["majority", "unanimous"])
def test_agreement_is_that_on_all_lesions(target: str) -> None:
    """Not only on those that the target keeps, on which readers agree better."""
    readers = Readers("texture", simulated(240, 1.0)[1], target, ">3")  # type: ignore[arg-type]
    judged = judge(protocol_of(readers), {}, num_bootstrap=50)
    assert judged["ceiling"] == ceiling(readers)
    assert judged["kept"] == readers.counts()
    assert judged["reliability"]["one reader (ICC)"] == icc(readers.ratings)


def test_of_unanimous_lesions_a_reader_is_no_rival() -> None:
    _, ratings = simulated(240, 0.7)
    judged = judge(protocol_of(Readers("texture", ratings, "unanimous", ">3")), {})
    assert judged["rows"] == judged["differences"] == []
    assert judged["ceiling"]["AUC"] > 0.9
