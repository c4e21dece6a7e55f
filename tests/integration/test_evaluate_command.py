"""`scripts/evaluate.py` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from fmcib_ssl.command import evaluate as command
from fmcib_ssl.evaluation.feature_table import FeatureTable

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
NUM = 120


class Done(NamedTuple):
    returncode: object
    stdout: str
    stderr: str


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """The command in this process; what ends it is its return code, or its message."""
    code: object = 0
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    return Done(code, out, err + str(code))


def test_the_help_needs_nothing_heavy() -> None:
    check = "import sys; assert not {'torch', 'sklearn', 'pandas'} & set(sys.modules)"
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='x'); {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_says_what_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    done = evaluate(capsys, "--help")
    assert done.returncode == 0
    assert "allow_leakage" in done.stdout


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, NUM)
    lesions = pd.DataFrame(
        {
            "lesion_id": [f"l{k}" for k in range(NUM)],
            "PatientID": [f"p{k // 2}" for k in range(NUM)],
            "texture": np.where(y == 1, 3, 5),
            "diameter_mm": rng.normal(8, 2, NUM),
            **{f"spiculation_{k}": y + 1 + rng.integers(0, 2, NUM) for k in (1, 2, 3)},
            "side": np.where(np.arange(NUM) < 81, "train", "test"),  # p40 has a lesion on each
        }
    )
    provenance = {"name": "made", "kind": "encoder", "source": None, "preprocessing": None, "encoder": None}
    x = (rng.normal(size=(NUM, 20)) + 0.7 * y[:, None]).astype(np.float32)
    return FeatureTable(lesions, x, provenance).write(tmp_path_factory.mktemp("features") / "made.parquet")


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_labels_of_patients(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pooling: str) -> None:
    table = FeatureTable.read(features)
    first = table.lesions.groupby("PatientID")["texture"].transform("first")
    file = FeatureTable(table.lesions.assign(died=first), table.features, table.provenance).write(
        tmp_path / "p.parquet"
    )
    asked = [f"features={file}", f"patients={pooling}", "folds=2", "num_bootstrap=20", f"output={tmp_path / 'out'}"]
    done = evaluate(capsys, *asked, "label=died")
    assert done.returncode == 0, done.stderr
    assert f"60 patients, whose lesions are pooled: {pooling}" in done.stdout
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert predictions[predictions["features"] == "p"]["lesion_id"].is_unique
    assert set(predictions["lesion_id"]) == set(table.lesions["PatientID"])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[0]["probe"] == ("attention" if pooling == "attention" else "logistic")
    done = evaluate(capsys, *asked, "label=texture")
    assert "'texture' differs between lesions of patient" in done.stderr


def test_results_predictions_and_what_is_missing(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    done = evaluate(
        capsys, f"features={features}", "label=texture", "threshold=<5", "folds=3", "fractions=1,0.5",
        "num_bootstrap=100", f"out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "random weights of made" in done.stdout  # there is no source to open: said, not dropped
    assert "made + size" in done.stdout
    told = json.loads((out / "results.json").read_text())
    assert {"rows", "differences", "leakage", "missing", "provenance"} <= told.keys()
    keys = {"features", "task", "probe", "metric", "value", "low", "high", "num_train", "num_test", "fraction", "split"}
    assert all(keys <= row.keys() for row in told["rows"])
    (row,) = [r for r in told["rows"] if (r["features"], r["metric"], r["fraction"]) == ("made", "AUC", 1.0)]
    assert (row["task"], row["num_test"], row["split"]) == ("texture<5", NUM, "3 folds by PatientID")
    assert row["value"] > 0.85
    assert told["provenance"]["features"]["made"]["kind"] == "encoder"
    assert [finding["check"] for finding in told["leakage"]] == ["patients", "duplicates", "padding"]
    scores = pd.read_parquet(out / "predictions.parquet")
    assert {"lesion_id", "fold", "features", "probe", "label", "score", "predicted"} <= set(scores)
    assert (scores.groupby(["features", "probe", "fraction"])["lesion_id"].nunique() == NUM).all()


def test_labels_of_several_readers_and_features_side_by_side(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = FeatureTable.read(features)
    other = FeatureTable(other.lesions, other.features[:, :2] ** 2, {**other.provenance, "name": "other"})
    path = other.write(tmp_path / "other.parquet")
    done = evaluate(
        capsys, f"features={features},{path},{features}+{path}", "label=spiculation", "readers=majority",
        "threshold=>=2", "num_bootstrap=100", "baselines=false", "folds=3", f"output={tmp_path / 'results'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lesions by target: mean 120, share 120, majority 120, unanimous" in done.stdout
    assert "ceiling: AUC" in done.stdout
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {row["features"] for row in results["rows"]} >= {"made", "other", "made + other"}
    assert {row["features"] for row in results["readers"]["rows"]} >= {"one reader", "made", "made + other"}
    assert results["label"]["name"] == "majority of spiculation>=2"


def test_a_shared_patient_refuses_unless_it_is_allowed_and_then_there_are_both_numbers(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"features={features}", "label=texture", "threshold=<5", "split=side", "num_bootstrap=50", "baselines=false",
        f"output={tmp_path / 'results'}",
    ]  # fmt: skip
    refused = evaluate(capsys, *arguments)
    assert "1 patients are on more than one side of the split, such as p40" in refused.stdout
    assert "allow_leakage=patients" in refused.stderr
    assert not (tmp_path / "results").exists()
    allowed = evaluate(capsys, *arguments, "allow_leakage=patients")
    assert allowed.returncode == 0, allowed.stderr
    told = json.loads((tmp_path / "results" / "results.json").read_text())
    sizes = {(row["split"], row["num_train"], row["num_test"]) for row in told["rows"]}
    assert sizes == {("column side", 81, 39), ("column side, without shared patients", 80, 39)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label=textur"], "label=textur: no such column"),
        (["label=texture", "group=patient"], "group=patient: no such column"),
        (["label=texture", "task=lung2"], "task=lung2: neither a kind of label nor a published task"),
        (["task=luna16_malignancy"], "needs tables="),
        (["label=texture", "readers=mean"], "needs the columns texture_1, texture_2 and so on"),
        (["label=spiculation", "readers=share"], "counts votes: say with threshold="),
        (["label=texture", "allow_leakage=all"], "'patients', 'duplicates' or 'padding'"),
        (["label=texture", "probe=svm"], "'logistic', 'knn', 'ridge' or 'cox'"),
        (["label=texture", "fractions=1,1.5"], "fractions.1 is '1.5': Input should be less than or equal to 1"),
        (["label=texture", "probe=cox"], "probe=cox cannot learn binary labels; logistic, knn, attention can"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    done = evaluate(capsys, f"features={features}", f"out={tmp_path}", "folds=2", "baselines=false", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
