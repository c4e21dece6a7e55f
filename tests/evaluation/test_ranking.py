"""Rankings: against definitions, a simulation with a known order, and simulations without any difference."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm, rankdata, somersd

from fmcib_ssl.evaluation.labels import Labels, Split, cross_validation
from fmcib_ssl.evaluation.metrics import auc, patient_weights, value_of
from fmcib_ssl.evaluation.probes import PROBES, Inputs, Protocol, resampled, score
from fmcib_ssl.evaluation.ranking import Ranking, chance_corrected, rank_models, retraining_share
from fmcib_ssl.types import Array


def simulated(seed: int, effects: list[float], num: int = 150, num_tasks: int = 3) -> dict[str, dict[str, Array]]:
    """Models whose scores are the label times an effect, noise that all share, and their own."""
    rng, drawn = np.random.default_rng(seed), {}
    weights = patient_weights(np.arange(num), 300, seed)
    for task in range(num_tasks):
        y, shared = rng.integers(0, 2, num), rng.normal(size=num)
        scores = [effect * y + 0.7 * shared + 0.7 * rng.normal(size=num) for effect in effects]
        drawn[f"task {task}"] = {
            f"model {k}": chance_corrected("AUC", auc(y, one, weights)) for k, one in enumerate(scores)
        }
    return drawn


def separates(ranking: Ranking) -> bool:
    return any(pair["separable"] for pair in ranking.pairs)


def test_a_score_is_somers_d_for_every_metric_with_half_at_chance() -> None:
    rng = np.random.default_rng(0)
    y, scores = rng.integers(0, 2, 50), rng.normal(size=50).round(1)
    found = chance_corrected("AUC", np.array([value_of(auc, y, scores)]))
    assert found[0] == pytest.approx(somersd(y, scores).statistic)
    assert chance_corrected("Spearman", np.array([0.3]))[0] == 0.3


def test_ranks_differences_and_holm_are_those_of_their_definitions() -> None:
    drawn = simulated(0, [2.0, 0.0, 1.0, 1.1])
    ranking = rank_models(drawn)
    names = list(drawn["task 0"])
    scores = np.array([[drawn[task][name] for name in names] for task in drawn])
    for row in ranking.rows:
        k = names.index(row["model"])
        per_task = [[rankdata(-one[:, r])[k] for one in scores] for r in range(scores.shape[2])]
        ranks = np.mean(per_task, axis=1)
        assert row["rank"] == ranks[0]
        assert (row["low"], row["high"]) == tuple(np.percentile(ranks[1:], [2.5, 97.5]))
        assert row["score"] == pytest.approx(scores[:, k, 0].mean())
    assert [row["score"] for row in ranking.rows] == sorted((r["score"] for r in ranking.rows), reverse=True)
    p_values = {}
    for pair in ranking.pairs:
        apart = (scores[:, names.index(pair["model"])] - scores[:, names.index(pair["against"])]).mean(0)
        assert pair["difference"] == pytest.approx(apart[0])
        assert pair["difference"] >= 0
        p_values[pair["model"], pair["against"]] = 2 * norm.sf(apart[0] / apart[1:].std())
    ordered = sorted(p_values, key=p_values.__getitem__)
    rejected = True
    for place, key in enumerate(ordered):  # Holm's own words: stop at the first that is not below its level
        rejected = rejected and p_values[key] < 0.05 / (len(ordered) - place)
        (pair,) = (one for one in ranking.pairs if (one["model"], one["against"]) == key)
        assert pair["separable"] == rejected


def test_other_training_sets_widen_a_difference_as_nadeau_and_bengio_say() -> None:
    rows = np.arange(60)
    folds = [Split(str(k), rows[rows % 5 != k], rows[rows % 5 == k]) for k in range(5)]
    assert retraining_share(folds) == pytest.approx(
        5 * 12 / 48
    )  # of J = 5 means 1 / J + tested / trained, times J, less 1
    assert retraining_share(folds[:1]) == pytest.approx(12 / 48)
    drawn = simulated(0, [1.0, 0.0], num_tasks=1)
    (test_set,), (both,) = rank_models(drawn).pairs, rank_models(drawn, {"task 0": 1.25}).pairs
    assert both["difference"] == test_set["difference"]
    assert both["high"] - both["low"] == pytest.approx(1.5 * (test_set["high"] - test_set["low"]))


def test_models_share_a_letter_if_and_only_if_they_cannot_be_told_apart() -> None:
    for seed in range(12):
        ranking = rank_models(simulated(seed, [0.0, 0.4, 0.5, 0.9, 1.0, 1.7], num=60))
        letters = {row["model"]: set(row["group"]) for row in ranking.rows}
        assert all(letters.values())
        for pair in ranking.pairs:
            assert bool(letters[pair["model"]] & letters[pair["against"]]) != pair["separable"]


def test_a_known_order_is_found_and_equals_are_said_to_be_equals() -> None:
    ranking = rank_models(simulated(1, [0.7, 3.0, 0.0, 1.7, 1.7], num=400))
    assert ranking.rows[0]["model"] == "model 1"
    assert {row["model"] for row in ranking.rows[1:3]} == {"model 3", "model 4"}
    assert [row["model"] for row in ranking.rows][3:] == ["model 0", "model 2"]
    assert [row["group"] for row in ranking.rows] == ["a", "b", "b", "c", "d"]
    assert ranking.verdict == "model 1 is ahead of all others."
    best = rank_models(simulated(1, [0.0, 1.7, 1.7], num=400))
    assert best.verdict.endswith(f" cannot be told apart from the best. Behind {best.rows[0]['model']}: model 0.")


def test_without_a_difference_models_cannot_be_told_apart() -> None:
    found = [rank_models(simulated(seed, [1.0] * 5, num=100)) for seed in range(20)]
    assert sum(map(separates, found)) <= 2
    assert "The 5 models cannot be told apart." in {one.verdict for one in found}


@pytest.mark.slow  # a hundred evaluations of four models
def test_without_a_difference_probes_of_features_are_told_apart_in_at_most_five_of_a_hundred() -> None:
    """From features to the verdict; four models see the same label through their own noise."""
    wrong, probe = 0, replace(PROBES["logistic"], settings=(1e-3, 1e-2, 1e-1, 1.0))
    for seed in range(100):
        rng, drawn = np.random.default_rng(seed), {}
        for task in ("first", "second"):
            y = rng.integers(0, 2, 160)
            patients = np.array([f"p{k // 2}" for k in range(160)])
            labels = Labels(task, "binary", y, np.arange(160), ("0", "1"))
            splits = cross_validation("binary", y, patients, num_folds=3, seed=seed)
            protocol = Protocol(labels, patients, splits, "folds", seed, num_inner_folds=3)
            weights, shared = protocol.weights(300), rng.normal(size=(160, 1))
            drawn[task] = {}
            for model in "abcd":
                x = 0.4 * y[:, None] + 0.7 * shared + rng.normal(size=(160, 8))
                results = score(probe, Inputs(model, x), protocol)
                drawn[task][model] = chance_corrected("AUC", resampled(auc, y, results, weights))
        wrong += separates(rank_models(drawn, dict.fromkeys(drawn, retraining_share(protocol.splits))))
    assert wrong <= 5


def test_models_without_a_value_on_a_task_are_left_out() -> None:
    drawn = simulated(2, [1.0, 0.0, 0.5])
    del drawn["task 1"]["model 2"]
    ranking = rank_models(drawn)
    assert {row["model"] for row in ranking.rows} == {"model 0", "model 1"}
    assert rank_models({"only": {"one": drawn["task 0"]["model 0"]}}).verdict.startswith("Fewer than two models")
    assert rank_models({}).verdict.startswith("No task counts") and not rank_models({}).rows


def test_identical_models_are_no_division_by_zero() -> None:
    drawn = simulated(3, [1.0])
    drawn = {task: {"a": one["model 0"], "b": one["model 0"]} for task, one in drawn.items()}
    ((pair,)) = (rank_models(drawn).pairs,)
    assert [one["p"] for one in pair] == [1.0]
    assert list(combinations("ab", 2)) == [(pair[0]["model"], pair[0]["against"])]
