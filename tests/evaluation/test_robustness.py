"""Robustness against published and simulated ICCs, and against a probe that is fitted fold by fold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from embedded_archive import Archive, make_archive, make_encoder
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from fmcib_ssl.command import robustness as command
from fmcib_ssl.evaluation import robustness
from fmcib_ssl.evaluation.conditions import CLEAN, CONDITIONS
from fmcib_ssl.evaluation.embedding import embed_source
from fmcib_ssl.evaluation.embedding_sources import Inference, random_encoder, raw_voxels, statistics_encoder
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.labels import Labels, cross_validation
from fmcib_ssl.evaluation.probes import PROBES, Inputs, Protocol, score
from fmcib_ssl.evaluation.readers import icc
from fmcib_ssl.evaluation.robustness import (
    FLIPS,
    MEDIAN_ICC,
    Robustness,
    embed_conditions,
    encoder_of,
    feature_iccs,
    measure_robustness,
)
from fmcib_ssl.types import Array

CPU = Inference(device="cpu")
NUM = 120
MOVED, NOISY = "point moved by 3 mm", "noise of 30 HU"


def test_icc_of_a_published_example() -> None:
    """Six targets by four judges: Shrout and Fleiss, 1979, tables 2 and 4."""
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert round(icc(np.array(ratings, dtype=float)), 2) == 0.17


@pytest.mark.parametrize(("noise", "shift"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 1.0), (0.0, 2.0)])
def test_icc_of_simulated_features(noise: float, shift: float) -> None:
    """A feature of variance 1, noise of that deviation in both images, and a shift that all lesions share."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3000, 3))
    clean, draw = (truth + noise * rng.normal(size=truth.shape) for _ in range(2))
    expected = (1 - shift**2 / 4) / (1 + noise**2 + shift**2 / 4)  # from the expected mean squares
    constant = np.zeros((3000, 1))
    values = feature_iccs(np.hstack([clean, constant]), [np.hstack([draw + shift, constant])] * 2)
    np.testing.assert_allclose(values, [expected] * 3, atol=0.04)


def features_of(seed: int = 0) -> tuple[Protocol, dict[str, list[Array]]]:
    """Labels, clean features that tell them, and the same under two conditions, of which one has two draws."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, NUM)
    clean = rng.normal(size=(NUM, 6)) + labels[:, None] * np.array([1.5, 1, 0, 0, 0, 0])
    moved = [clean + 0.5 * rng.normal(size=clean.shape) for _ in range(2)]
    by_condition = {CLEAN: [clean], MOVED: moved, NOISY: [clean + 2 * rng.normal(size=clean.shape)]}
    patients = np.array([f"p{k // 2}" for k in range(NUM)])
    splits = cross_validation("binary", labels, patients, num_folds=2)
    protocol = Protocol(Labels("y", "binary", labels, np.arange(NUM), ("0", "1")), patients, splits, "folds")
    return protocol, by_condition


def value(result: Robustness, features: str, condition: str, metric: str) -> float:
    (row,) = (r for r in result.rows if (r["features"], r["condition"], r["metric"]) == (features, condition, metric))
    if row["low"] is not None:
        assert row["low"] <= row["value"] <= row["high"]
    return float(row["value"])


def test_decisions_equal_a_probe_for_each_condition() -> None:
    """The test rows of each fold are replaced by those under a condition, and scored by themselves."""
    protocol, by_condition = features_of()
    result = measure_robustness({"a": by_condition}, protocol, num_bootstrap=50)
    (clean,) = by_condition[CLEAN]

    def scored(changed: Array) -> tuple[list[Array], float]:
        chosen, aucs = [], []
        for split in protocol.splits:
            x = clean.copy()
            x[split.test] = changed[split.test]
            alone = Protocol(protocol.labels, protocol.patients, [split], "one")
            (scores,) = score(PROBES["logistic"], Inputs("a", x), alone)
            assert scores.chosen is not None
            chosen.append(scores.chosen)
            aucs.append(roc_auc_score(protocol.labels.values[split.test], scores.scores))
        return chosen, float(np.mean(aucs))

    before, auc = scored(clean)
    np.testing.assert_allclose(value(result, "a", CLEAN, "AUC"), auc)
    for condition, draws in by_condition.items():
        results = [scored(draw) for draw in draws]
        flips = [[np.mean(a != b) for a, b in zip(chosen, before, strict=True)] for chosen, _ in results]
        np.testing.assert_allclose(value(result, "a", condition, FLIPS), np.mean(flips))
        changed = np.mean([one for _, one in results])
        np.testing.assert_allclose(value(result, "a", condition, "AUC"), changed)
        np.testing.assert_allclose(value(result, "a", condition, "AUC less clean"), changed - auc)
    assert value(result, "a", MOVED, FLIPS) < value(result, "a", NOISY, FLIPS)


def test_what_does_not_change_and_what_is_reversed() -> None:
    protocol, by_condition = features_of()
    (clean,) = by_condition[CLEAN]
    steady = {CLEAN: [clean], MOVED: [clean, clean]}
    reversed_ = {CLEAN: [clean], MOVED: [2 * clean.mean(0) - clean]}  # mirrored at the mean
    result = measure_robustness({"steady": steady, "reversed": reversed_}, protocol, num_bootstrap=50)
    assert value(result, "steady", MOVED, FLIPS) == 0
    assert value(result, "steady", MOVED, "AUC less clean") == 0
    assert value(result, "steady", MOVED, MEDIAN_ICC) == 1
    assert value(result, "reversed", MOVED, FLIPS) > 0.9
    np.testing.assert_allclose(value(result, "reversed", MOVED, "AUC"), 1 - value(result, "reversed", CLEAN, "AUC"))
    (flips,) = (r for r in result.differences if (r["metric"], r["condition"]) == (FLIPS, MOVED))
    assert (flips["features"], flips["against"]) == ("steady", "reversed")
    assert -1 <= flips["low"] <= flips["value"] <= flips["high"] < -0.9


def test_a_value_has_no_decision_and_without_labels_features_are_compared() -> None:
    protocol, by_condition = features_of()
    values = Labels("size", "continuous", by_condition[CLEAN][0][:, 0], np.arange(NUM))
    result = measure_robustness(
        {"a": by_condition}, Protocol(values, protocol.patients, protocol.splits, "folds"), num_bootstrap=50
    )
    assert {row["metric"] for row in result.rows if row["low"] is not None} == {"Spearman", "Spearman less clean"}
    assert value(result, "a", CLEAN, "Spearman") > 0.99 > value(result, "a", NOISY, "Spearman")
    alone = measure_robustness({"a": by_condition})
    assert {row["condition"] for row in alone.rows} == {CLEAN, MOVED, NOISY}
    assert all(row["low"] is None for row in alone.rows) and not alone.differences


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Only some of the conditions, so that less has to be embedded."""
    names = [CLEAN, MOVED, NOISY, "voxels shuffled"]
    monkeypatch.setattr(robustness, "CONDITIONS", {name: CONDITIONS[name] for name in names})
    return names


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive") / "ct")


@pytest.fixture(scope="module")
def files(archive: Archive) -> dict[str, Path]:
    """Tables of features of each kind, as scripts/embed.py writes them."""
    encoder = make_encoder(archive.table.parent / "encoder.safetensors")
    cut = encoder.preprocessing
    encoders = {
        "encoder": encoder,
        "random": random_encoder(encoder.about["encoder"], cut, 3),
        "statistics": statistics_encoder(cut),
        "voxels": raw_voxels(cut),
    }
    return {
        name: embed_source(one, archive.store_source, CPU).write(archive.table.parent / f"{name}.parquet")
        for name, one in encoders.items()
    }


def test_every_kind_of_features_is_embedded_again(files: dict[str, Path], few: list[str]) -> None:
    for file in files.values():
        embedded, table = embed_conditions([file], device="cpu"), FeatureTable.read(file)
        assert {name: len(draws) for name, draws in embedded.items()} == {
            name: CONDITIONS[name].num_draws for name in few
        }
        ids = table.lesions["lesion_id"]
        np.testing.assert_allclose(embedded[CLEAN][0].aligned(ids).features, table.features, rtol=1e-4, atol=1e-5)
        for condition, draws in embedded.items():
            assert (condition == CLEAN) == np.allclose(draws[0].aligned(ids).features, table.features, atol=1e-5)
    beside = embed_conditions([files["encoder"], files["statistics"]], device="cpu")
    widths = [FeatureTable.read(files[name]).features.shape[1] for name in ("encoder", "statistics")]
    assert beside[MOVED][2].features.shape[1] == sum(widths)


def test_what_is_embedded_is_kept_and_missing_tables_are_made_again(files: dict[str, Path], few: list[str]) -> None:
    embed_conditions([files["voxels"]], device="cpu")
    (folder,) = files["voxels"].parent.glob("voxels.conditions-*")
    kept = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(kept) == sum(CONDITIONS[name].num_draws for name in few)
    (folder / "clean_0.parquet").unlink()
    embed_conditions([files["voxels"]], device="cpu")
    changed = {file.name for file in folder.iterdir() if file.stat().st_mtime_ns != kept[file.name]}
    assert changed == {"clean_0.parquet"}


def test_tables_that_cannot_be_embedded_again(files: dict[str, Path], archive: Archive, tmp_path: Path) -> None:
    table = FeatureTable.read(files["encoder"])
    weights = tmp_path / "other.safetensors"
    weights.write_bytes(Path(table.provenance["weights"]).read_bytes())
    about = {**table.provenance, "weights": str(weights)}
    encoder_of(FeatureTable(table.lesions, table.features, about))
    with pytest.raises(FeatureTableError, match=r"other\.safetensors has changed since"):
        encoder_of(FeatureTable(table.lesions, table.features, {**about, "sha256": "0" * 64}))
    with pytest.raises(FeatureTableError, match="was not made by an encoder"):
        encoder_of(FeatureTable(table.lesions, table.features, {**about, "kind": "columns"}))
    with pytest.raises(FeatureTableError, match=r"embed them with fmcib-ssl embed"):
        encoder_of(FeatureTable(table.lesions, table.features, {**about, "source": None}))


def run(*arguments: object) -> object:
    """The command in this process; what ends it."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command(
    files: dict[str, Path],
    few: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = f"features={files['encoder']},{files['statistics']}"
    arguments = (features, f"output={tmp_path / 'out'}", "label=label", "folds=3", "num_bootstrap=40", "device=cpu")
    assert run(*arguments) == 0
    assert "7 lesions of 3 patients" in capsys.readouterr().out
    page = (tmp_path / "out" / "robustness.md").read_text()
    for text in (f"## {FLIPS}", "| *voxels shuffled* |", "encoder less statistics", "![](conditions.png)"):
        assert text in page
    results = json.loads((tmp_path / "out" / "robustness.json").read_text())
    rows = pd.read_csv(tmp_path / "out" / "robustness.csv")
    assert len(rows) == len(results["rows"]) and results["provenance"]["arguments"]["label"] == "label"
    assert set(rows["condition"]) == set(few) and set(rows["features"]) == {"encoder", "statistics"}
    for name in ("robustness.png", "robustness.svg", "conditions.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


@pytest.mark.usefixtures("few")
def test_the_command_without_a_label(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(f"features={files['voxels']}", f"output={tmp_path}", "device=cpu") == 0
    page = (tmp_path / "robustness.md").read_text()
    assert "7 lesions; without a label" in page and f"## {MEDIAN_ICC}" in page and FLIPS not in page


@pytest.mark.usefixtures("few")
def test_a_patient_on_both_sides_is_refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = FeatureTable.read(files["voxels"])
    sides = table.lesions.assign(side=["train", "test"] * 3 + ["train"])[["lesion_id", "side"]]
    sides.to_csv(tmp_path / "sides.csv", index=False)
    arguments = ("label=label", f"labels={tmp_path / 'sides.csv'}", "split=side", f"output={tmp_path / 'out'}")
    message = run(f"features={files['voxels']}", *arguments, "device=cpu")
    assert "patients are on more than one side of the split" in str(message)


@pytest.mark.usefixtures("few")
def test_the_page_needs_no_display_and_draws_every_condition(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[Figure]
) -> None:
    assert run(f"features={files['encoder']}", f"output={tmp_path}", "device=cpu") == 0
    chart, sheet = drawn
    assert [axes.get_title("left") for axes in chart.axes] == [MEDIAN_ICC] * 2
    shown = {text.get_text() for axes in sheet.axes for text in axes.texts}
    assert set(CONDITIONS) <= shown
