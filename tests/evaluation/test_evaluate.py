"""An evaluation as a whole: what is compared with what, and what is said where something is missing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmcib_ssl.evaluation.evaluate import (
    Candidates,
    Evaluation,
    compact,
    evaluate_features,
    find_leakage,
    gather,
    without_shared_patients,
)
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.labels import EvaluationError, Labels, Split, cross_validation, read_labels
from fmcib_ssl.evaluation.probes import Protocol
from fmcib_ssl.types import Preprocessing

NUM = 160
RNG = np.random.default_rng(0)
Y = RNG.integers(0, 2, NUM)
LESIONS = pd.DataFrame(
    {
        "lesion_id": [f"l{k}" for k in range(NUM)],
        "PatientID": [f"p{k // 2}" for k in range(NUM)],
        "y": Y,
        "site": np.where(Y == 1, "lung", np.where(RNG.random(NUM) < 0.5, "bone", "liver")),
        "grade": np.rint(3 + Y + RNG.normal(size=NUM)).clip(1, 5),
        "days": RNG.exponential(np.exp(-1.5 * Y)),
        "died": RNG.random(NUM) < 0.8,
        "diameter_mm": 8 + RNG.normal(size=NUM),
    }
)


def table(x: np.ndarray, kind: str = "encoder", **provenance: object) -> FeatureTable:
    order = RNG.permutation(NUM)  # rows are joined by name
    provenance = {"name": kind, "kind": kind, "preprocessing": None, "encoder": None, **provenance}
    return FeatureTable(LESIONS.iloc[order].reset_index(drop=True), x[order].astype(np.float32), provenance)


GOOD = RNG.normal(size=(NUM, 24)) + 0.5 * Y[:, None]
NOISE = RNG.normal(size=(NUM, 24))
VOXELS = RNG.uniform(0.2, 0.6, (NUM, 4 * 8 * 8)) + 0.02 * Y[:, None]
PATCH = Preprocessing((4, 8, 8)).to_dict()


def baselines(of: FeatureTable) -> Mapping[str, FeatureTable]:
    made = {
        "HU statistics": table(NOISE[:, ::-1], "hu_statistics"),
        "raw voxels": table(VOXELS, "raw_voxels", preprocessing=PATCH),
    }
    return made if of.provenance["encoder"] is None else {"random weights": table(NOISE, "random_weights"), **made}


def protocol_of(labels: Labels, splits: list[Split] | None = None) -> Protocol:
    patients = LESIONS["PatientID"].to_numpy(str)
    splits = splits or cross_validation(labels.kind, labels.values, patients, num_folds=3)
    return Protocol(labels, patients, splits, "3 folds", num_inner_folds=2)


BINARY = protocol_of(read_labels(LESIONS, "binary", label="y"))


def run(protocol: Protocol, candidates: Candidates, **options: object) -> Evaluation:
    options = {"probes": ["logistic"], "num_bootstrap": 100, "progress": False, **options}
    return evaluate_features([protocol], LESIONS, candidates, **options)  # type: ignore[arg-type]


def value(result: Evaluation, features: str, metric: str = "AUC", **where: object) -> float:
    where = {"features": features, "metric": metric, **where}
    (row,) = [row for row in result.rows if all(row[key] == v for key, v in where.items())]
    return float(row["value"])


@pytest.fixture(scope="module")
def whole() -> tuple[Candidates, Evaluation]:
    tables = {"ours": table(GOOD, encoder={"_target_": "x"}), "again": table(GOOD, encoder={"_target_": "x"})}
    candidates = gather(tables, LESIONS, ["diameter_mm"], baselines)
    return candidates, run(BINARY, candidates, probes=["logistic", "knn"], fractions=[1.0, 0.4])


def test_everything_that_explains_a_result_stands_beside_it(whole: tuple[Candidates, Evaluation]) -> None:
    candidates, result = whole
    names = {row["features"] for row in result.rows}
    size = "size (diameter_mm)"
    assert names == {
        "ours", "again", "random weights", "HU statistics", "raw voxels", size, "ours + size", "again + size"
    }  # fmt: skip
    assert candidates.missing == []
    probes = {(row["features"], row["probe"]) for row in result.rows}
    assert ("random weights", "knn") in probes
    assert (size, "knn") not in probes  # a cosine of one column is its sign
    assert {row["fraction"] for row in result.rows} == {1.0, 0.4}
    assert {row["metric"] for row in result.rows} == {"AUC", "average precision", "balanced accuracy"}
    for row in result.rows:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["num_test"] == NUM
    compared = {(row["features"], row["against"]) for row in result.differences}
    assert compared >= {("ours", "random weights"), ("ours", "raw voxels"), ("ours", size), ("ours + size", size)}


def test_the_difference_of_two_equal_tables_is_exactly_zero(whole: tuple[Candidates, Evaluation]) -> None:
    same = [row for row in whole[1].differences if (row["features"], row["against"]) == ("ours", "again")]
    assert len(same) == 2 * 2 * 3
    assert {(row["value"], row["low"], row["high"]) for row in same} == {(0.0, 0.0, 0.0)}


def test_a_difference_is_that_of_the_values(whole: tuple[Candidates, Evaluation]) -> None:
    _, result = whole
    for row in result.differences:
        where = {"fraction": row["fraction"], "metric": row["metric"]}
        ours = value(result, row["features"], probe=row["probe"], **where)
        other = "logistic" if row["against"].startswith("size") else row["probe"]
        assert row["value"] == pytest.approx(ours - value(result, row["against"], probe=other, **where))
    ahead = [r for r in result.differences if (r["features"], r["against"]) == ("ours", "random weights")]
    assert all(row["low"] > 0 for row in ahead if row["metric"] == "AUC" and row["fraction"] == 1.0)


def test_the_values_are_those_of_the_predictions(whole: tuple[Candidates, Evaluation]) -> None:
    _, result = whole
    told = result.predictions.query("features == 'ours' and probe == 'logistic' and fraction == 1.0")
    assert sorted(told["lesion_id"]) == sorted(LESIONS["lesion_id"])
    truth = told.merge(LESIONS, on="lesion_id")
    np.testing.assert_array_equal(truth["label"], truth["y"])
    aucs = [roc_auc_score(fold["label"], fold["score"]) for _, fold in told.groupby("fold")]
    assert value(result, "ours", probe="logistic", fraction=1.0) == pytest.approx(np.mean(aucs))
    # and the scores those of scikit-learn with the settings that are told
    (row,) = [
        r
        for r in result.rows
        if (r["features"], r["probe"], r["fraction"], r["metric"]) == ("ours", "logistic", 1.0, "AUC")
    ]
    for split, c in zip(BINARY.splits, row["settings"], strict=True):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="newton-cholesky", tol=1e-9))
        x = GOOD.astype(np.float32).astype(float)
        expected = model.fit(x[split.train], Y[split.train]).predict_proba(x[split.test])[:, 1]
        found = (
            told[told["fold"] == split.name].set_index("lesion_id").loc[LESIONS["lesion_id"].iloc[split.test], "score"]
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_size_alone_is_the_size(whole: tuple[Candidates, Evaluation]) -> None:
    told = whole[1].predictions.query("features == 'size (diameter_mm)' and fraction == 1.0").merge(LESIONS)
    for _, fold in told.groupby("fold"):
        assert abs(fold["score"].corr(fold["diameter_mm"], method="spearman")) == pytest.approx(1)


def test_a_baseline_that_cannot_be_made_is_said_and_a_given_one_is_not_made_again() -> None:
    def gone(of: FeatureTable) -> Mapping[str, FeatureTable]:
        raise FeatureTableError("the scans are there no more")

    found = gather({"ours": table(GOOD)}, LESIONS.assign(diameter_mm=np.nan), ["diameter_mm"], gone)
    assert {(m["features"], m["reason"]) for m in found.missing} == {
        ("random weights of ours", "the scans are there no more"),
        ("HU statistics of ours", "the scans are there no more"),
        ("raw voxels of ours", "the scans are there no more"),
        ("size (diameter_mm)", "160 of 160 lesions have no diameter_mm"),
    }
    given = {"ours": table(GOOD), "mine": table(NOISE, "random_weights")}
    found = gather(given, LESIONS, ["volume"], baselines)
    assert [inputs.name for inputs in found.inputs] == ["ours", "mine", "HU statistics", "raw voxels"]
    assert found.missing == [
        {"features": "size (volume)", "reason": found.missing[0]["reason"]},
    ]
    assert "no column 'volume'" in found.missing[0]["reason"]


def test_raw_voxels_in_the_basis_of_their_rows_have_the_same_components() -> None:
    x = RNG.normal(size=(40, 500)).astype(np.float32)
    small = compact(x)
    assert small.shape == (40, 40)
    ours, theirs = PCA(5).fit(small[:30]), PCA(5).fit(x[:30].astype(float))
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_)
    distances = np.abs(ours.transform(small[30:])), np.abs(theirs.transform(x[30:].astype(float)))
    np.testing.assert_allclose(*distances, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "options", "probes", "metric"),
    [
        ("ordinal", {"label": "grade"}, ["ridge", "knn"], "quadratic kappa"),
        ("multiclass", {"label": "site"}, ["logistic", "knn"], "AUC"),
        ("continuous", {"label": "days"}, ["ridge"], "MAE"),
        ("survival", {"time": "days", "event": "died"}, ["cox"], "C-index"),
    ],
)
def test_every_kind_of_label(kind: str, options: dict[str, str], probes: list[str], metric: str) -> None:
    protocol = protocol_of(read_labels(LESIONS, kind, **options))  # type: ignore[arg-type]
    tables = {"ours": table(GOOD), "noise": table(NOISE)}
    result = run(protocol, gather(tables, LESIONS, ["diameter_mm"]), probes=probes)
    ahead = [r for r in result.differences if (r["features"], r["against"], r["metric"]) == ("ours", "noise", metric)]
    assert len(ahead) == len(probes)
    assert all(row["value"] > 0 for row in ahead)  # for an error too, ahead is positive
    assert result.missing == []
    assert (kind == "survival") == bool(result.survival)
    if kind == "survival":
        (curves,) = [c for c in result.survival if c["features"] == "ours"]
        assert curves["log_rank_p"] < 0.01
        assert [half["num"] for half in curves["halves"]] == [80, 80]


def test_shared_patients_are_also_left_out_of_training() -> None:
    shared = protocol_of(BINARY.labels, [Split("split", np.arange(0, 101), np.arange(101, NUM))])  # p50 has 100 and 101
    apart = without_shared_patients(shared)
    assert apart is not None
    assert apart.name == "3 folds, without shared patients"
    assert apart.splits[0].train.tolist() == list(range(100))
    assert without_shared_patients(apart) is None
    # what is shared only by choosing and testing is left out of choosing
    chosen = protocol_of(BINARY.labels, [Split("split", np.arange(80), np.arange(121, NUM), np.arange(80, 121))])
    apart_too = without_shared_patients(chosen)
    assert apart_too is not None
    assert apart_too.splits[0].val is not None
    assert apart_too.splits[0].val.tolist() == list(range(80, 120))
    candidates = gather({"ours": table(GOOD)}, LESIONS, [])
    (finding, *_) = find_leakage(shared, LESIONS, candidates)
    assert finding.found
    result = evaluate_features(
        [shared, apart], LESIONS, candidates, probes=["logistic"], num_bootstrap=50, progress=False
    )
    told = {row["split"]: row["num_train"] for row in result.rows}
    assert told == {"3 folds": 101, "3 folds, without shared patients": 100}


def test_a_share_that_is_too_small_is_said_and_wrong_options_are_refused() -> None:
    candidates = gather({"ours": table(GOOD)}, LESIONS, [])
    result = run(BINARY, candidates, fractions=[1.0, 0.01])
    assert [m["features"] for m in result.missing] == ["size", "ours, logistic, 1% of the patients, 3 folds"]
    assert {row["fraction"] for row in result.rows} == {1.0}
    with pytest.raises(EvaluationError, match="probe=cox cannot learn binary labels; logistic, knn, attention can"):
        run(BINARY, candidates, probes=["cox"])
