"""The benchmark on real nodules: who is trained on, what is asked, what is kept, and how a stopped run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import lidc  # noqa: E402
import lidc_data  # noqa: E402
import lidc_figures  # noqa: E402
import lidc_methods  # noqa: E402
import lidc_targets  # noqa: E402
import lidc_trials  # noqa: E402

from fmcib_ssl.evaluation import Labels, Protocol, Split, SplitScores, readers  # noqa: E402

NUM = 240


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {kind: replace(probe, settings=probe.settings[1:2]) for kind, probe in lidc_targets.PROBE.items()}
    monkeypatch.setattr(lidc_targets, "PROBE", quick)
    monkeypatch.setattr(lidc_targets, "NUM_BOOTSTRAP", 50)
    monkeypatch.setattr(lidc_targets, "FRACTIONS", (0.5,))
    monkeypatch.setattr(readers, "_NUM_DRAWS", 5)
    monkeypatch.setattr(readers, "_NUM_SIMULATED", 2000)


def simulated_nodules() -> lidc_data.Nodules:
    """Patches of noise, brighter where texture is rated low, of 90 patients; three or four readers."""
    rng = np.random.default_rng(0)
    patients = np.array([f"P{number:03d}" for number in rng.integers(90, size=NUM)])
    lesions = pd.DataFrame({"diameter_mm": rng.uniform(4, 20, NUM)})
    for task in lidc_targets.THRESHOLDS:
        grades = rng.integers(1, 7, size=(NUM, 1)) + rng.integers(-1, 2, size=(NUM, 4))
        grades = np.clip(grades, 1, 6 if task == "calcification" else 5).astype(float)
        grades[rng.random(NUM) < 0.3, 3] = np.nan
        lesions = lesions.join(pd.DataFrame(grades, columns=[f"{task}_{k}" for k in range(1, 5)]))
        lesions[task] = grades[:, 0]
    is_low = lesions["texture"].to_numpy() < 5
    hu = rng.normal(-700, 150, (NUM, 1, 8, 24, 24)) + 60 * is_low[:, None, None, None, None]
    return lidc_data.Nodules(
        lesions=lesions,
        patches=torch.from_numpy(hu.astype(np.int16)),
        patients=patients,
        fold=lidc_data.folds_of(patients),
        pool=torch.from_numpy(rng.integers(-900, 50, (30, 1, 8, 24, 24)).astype(np.int16)),
        published=rng.choice(["train", "val", "test", ""], NUM),
        published_malignancy=rng.integers(2, size=NUM),
    )


def command(workspace: Path, *methods: str, **options: object) -> lidc.LidcBenchmark:
    return lidc.LidcBenchmark(
        data=Path("none"), workspace=workspace, output=workspace / "out.json", methods=methods, seeds=1, **options
    )  # type: ignore[arg-type]


def test_no_patient_is_on_two_sides_and_none_that_is_tested_is_pretrained_on() -> None:
    nodules = simulated_nodules()
    parts = [*lidc_targets.splits_of(nodules), lidc_targets.published_split(nodules)]
    for part in parts:
        tested = set(nodules.patients[part.test])
        fitted = set(nodules.patients[part.train])
        chosen = set() if part.val is None else set(nodules.patients[part.val])
        pretrained = set(nodules.patients[lidc.pretraining_rows(nodules.patients, part)])
        assert tested and fitted and not tested & (fitted | chosen | pretrained) and not fitted & chosen
    tested_once = np.concatenate([part.test for part in parts[:-1]])
    assert sorted(tested_once) == list(range(NUM))


def test_folds_follow_from_the_patients_not_from_the_order_of_rows() -> None:
    patients = simulated_nodules().patients
    order = np.random.default_rng(3).permutation(NUM)
    np.testing.assert_array_equal(lidc_data.folds_of(patients[order]), lidc_data.folds_of(patients)[order])
    assert np.ptp(np.bincount(lidc_data.folds_of(np.unique(patients)))) <= 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_what_is_kept_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodules, pretrained = simulated_nodules(), []

    def features(contender: lidc_methods.Contender, nodules: lidc_data.Nodules, *_: object, **__: object) -> np.ndarray:
        if contender.kind == "trained":
            if len(pretrained) == 3:
                raise KeyboardInterrupt
            pretrained.append(contender.name)
        return nodules.patches.float().flatten(1)[:, :20].numpy()

    monkeypatch.setattr(lidc, "features", features)
    with pytest.raises(KeyboardInterrupt):
        lidc.Benchmark(command(tmp_path, "recipe", "diameter"), nodules).results()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(kept) == 3
    only_cached = lidc.Benchmark(command(tmp_path, "recipe", "diameter", pretrain=False), nodules).results()
    assert {row["method"] for row in only_cached["rows"]} == {"diameter", "one_reader"}
    pretrained.append("a place that is not 3")
    results = lidc.Benchmark(command(tmp_path, "recipe", "diameter"), nodules).results()
    assert pretrained.count("recipe") == 5 + 1  # folds, and the published split
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    keys = ("method", "task", "target", "metric")
    rows = {tuple(row[key] for key in keys): row for row in results["rows"] if "fraction" not in row}
    assert {key[2] for key in rows} == {"mean", "majority", "unanimous", "mode", "published"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert {(target, metric) for method, _, target, metric in rows if method == "one_reader"} == {
        ("mean", "spearman"), ("mean", "pearson"), ("majority", "auc")
    }  # fmt: skip
    pairs = {(row["method"], row["against"]) for row in results["differences"]}
    assert pairs == {("recipe", "diameter"), ("recipe", "one_reader"), ("diameter", "one_reader")}
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- mean -->\n| an older table |\n\nAfter.\n")
    (tmp_path / "out.json").write_text(json.dumps(results))
    lidc_figures.main([f"results={tmp_path / 'out.json'}", f"page={page}"])
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "older" not in text
    assert f"| {rows['recipe', 'margin', 'mean', 'spearman']['value']:.3f} (" in text
    assert len(list((tmp_path / "img").glob("lidc_*.png"))) == 4


def test_an_auc_is_the_mean_over_folds_of_scikit_learns(tmp_path: Path) -> None:
    nodules = simulated_nodules()
    benchmark = lidc.Benchmark(command(tmp_path, "raw_voxels+diameter"), nodules)
    (question,) = [q for q in benchmark.questions if (q.task, q.target) == ("texture", "mode")]
    scored = benchmark.scores(question, "raw_voxels+diameter", 0)
    assert scored is not None
    labels = (nodules.lesions["texture"] < 5).to_numpy()
    expected = np.mean([roc_auc_score(labels[nodules.fold == k], one.scores) for k, one in enumerate(scored)])
    (row,) = lidc_targets.answers(question, {"raw_voxels+diameter": scored})["rows"]
    assert row["value"] == pytest.approx(expected, abs=1e-4)
    assert row["value"] > 0.9  # brightness is in the voxels


def test_side_by_side_only_voxels_are_reduced(tmp_path: Path) -> None:
    nodules = simulated_nodules()
    benchmark = lidc.Benchmark(command(tmp_path), nodules)
    inputs = benchmark.inputs("diameter+raw_voxels", 0, benchmark.splits["fold0"])
    assert inputs is not None and (inputs.num_components, inputs.num_beside) == (lidc.NUM_COMPONENTS, 1)
    np.testing.assert_array_equal(inputs.x[:, -1], nodules.lesions["diameter_mm"].to_numpy(np.float32))
    with pytest.raises(SystemExit, match="methods=nothing: contenders are recipe, "):
        lidc.Benchmark(command(tmp_path, "recipe+nothing"), nodules)


def test_votes_are_counted_without_those_that_are_undecided() -> None:
    nodules = simulated_nodules()
    asked = {(q.task, q.target): q.protocol.labels for q in lidc_targets.questions(nodules) if q.fraction == 1}
    assert ("calcification", "mean") not in asked
    votes = [
        np.array([r > 3 for r in row if r != 3 and np.isfinite(r)])
        for row in nodules.lesions.filter(like="malignancy_").to_numpy()
    ]
    expected = [k for k, own in enumerate(votes) if len(own) > 1 and own.mean() != 0.5]
    assert asked["malignancy", "majority"].rows.tolist() == expected
    assert asked["malignancy", "majority"].values.tolist() == [votes[k].mean() > 0.5 for k in expected]


def test_what_only_size_says_is_worth_nothing_within_sizes() -> None:
    """Classes that follow from the third of the diameter, and a score that knows the class apart from it."""
    rng, num = np.random.default_rng(0), 6000
    diameters = rng.uniform(3, 30, num)
    classes = (rng.random(num) < np.array([0.2, 0.5, 0.8])[np.searchsorted([12, 21], diameters)]).astype(np.int64)
    columns = {
        "size": diameters,
        "class": classes + rng.normal(size=num),
        "both": classes + rng.normal(size=num) + diameters,
    }
    labels = Labels("simulated", "binary", classes, np.arange(num), ("0", "1"))
    splits = [Split(f"fold{k}", np.flatnonzero(np.arange(num) % 2 != k), np.arange(k, num, 2)) for k in range(2)]
    question = lidc_targets.Question("simulated", "majority", Protocol(labels, np.arange(num), splits, "folds"))
    results = {
        name: [SplitScores(s.name, s.test, score[s.test], 0.0, 0) for s in splits] for name, score in columns.items()
    }
    values = {
        (row["method"], row["task"]): row
        for asked, own in [(question, results), *lidc_targets.within_sizes(question, diameters, results)]
        for row in lidc_targets.answers(asked, own)["rows"]
    }
    assert values["size", "simulated"]["value"] > 0.7
    expected = {"size": 0.5, "class": norm.cdf(np.sqrt(0.5))}
    for name, value in expected.items():
        for task in ("within_size", "small", "medium", "large"):
            row = values[name, f"simulated_{task}"]
            assert row["value"] == pytest.approx(value, abs=0.03) and row["seeds"] == 1
    assert values["class", "simulated_within_size"]["low"] > values["both", "simulated_within_size"]["high"]


@pytest.mark.parametrize("name", [c.name for c in lidc_methods.CONTENDERS if c.kind == "trained"])
def test_every_contender_has_the_recipes_budget(name: str) -> None:
    recipe, its = (lidc_methods.BY_NAME[n].settings(0, None) for n in ("recipe", name))
    for settings in (recipe, its):
        assert settings.augment["transforms"].keys() - {"surroundings"} == {"geometry", "smooth", "noise"}
    assert its.trainer == recipe.trainer and its.optimizer == recipe.optimizer and its.schedule == recipe.schedule
    assert its.data.batch_size == recipe.data.batch_size


@pytest.mark.slow
def test_pretraining_sees_only_what_it_is_given_and_is_repeatable() -> None:
    nodules = simulated_nodules()
    rows = lidc.pretraining_rows(nodules.patients, Split("x", np.arange(0), np.arange(100)))[:64]
    mined = lidc_methods.BY_NAME["mined_and_lesions"]
    contender = replace(mined, overrides=(*mined.overrides, "data.batch_size=32"))
    patches = nodules.patches.clone()
    patches[np.setdiff1d(np.arange(NUM), rows)] += 100
    changed = replace(nodules, patches=patches)
    first, again, with_others_changed = (
        lidc_methods.features(contender, some, rows, seed=0, epochs=1) for some in (nodules, nodules, changed)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[rows], with_others_changed[rows])


def test_trials_see_no_patient_of_the_first_fold_nor_of_what_they_are_scored_on() -> None:
    nodules = simulated_nodules()
    splits = lidc_trials.development_splits(nodules)
    for split in splits:
        assert not {*nodules.patients[split.train]} & {*nodules.patients[split.test]}
    tested = np.concatenate([split.test for split in splits])
    np.testing.assert_array_equal(np.sort(tested), np.flatnonzero(nodules.fold != 0))


def test_features_that_are_statistics_have_the_whole_penalty() -> None:
    views = simulated_nodules().patches.float()
    of_hu = SimpleNamespace(encoder=SimpleNamespace(hu_scale=1.0, hu_offset=0.0))
    known = lidc_trials.standardised(views) @ torch.randn(lidc_trials.FIXED, 400)
    for learned, share in ((torch.randn(len(views), 400), 16 / len(views)), (torch.linalg.svd(known)[0][:, :3], 1)):
        assert float(lidc_trials.UnlikeStatistics.auxiliary(of_hu, learned, views, {})) == pytest.approx(
            share, abs=0.05
        )


def test_crops_are_padded_with_their_edge(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "lidc_crops" / "voi_index.csv").is_file():
        pytest.skip(f"no nodule crops in {real_data}")
    crops = pd.read_csv(real_data / "lidc_crops" / "voi_index.csv")
    flat = crops[(crops["nz"] * crops["sz"] < 6) & (crops["sz"] == 1.0) | (crops.index < 2)].head(4)
    folder = tmp_path / "lidc_crops"
    folder.mkdir()
    flat.to_csv(folder / "voi_index.csv", index=False)
    (folder / "image").symlink_to(real_data / "lidc_crops" / "image")
    (tmp_path / "ct").symlink_to(real_data / "ct")
    for name in ("fmcib_task2_voi_map.csv", "readers.csv"):
        (folder / name).symlink_to(real_data / "lidc_crops" / name)
    nodules = lidc_data.load(tmp_path, tmp_path / "workspace")
    assert len(nodules.patches) == len(flat) and nodules.pool.shape == (lidc_data.POOL_SIZE, 1, 8, 24, 24)
    for patch, image in zip(nodules.patches, nodules.lesions["image_path"], strict=True):
        crop = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / image)))
        # Interpolated or repeated, but never made up: in particular no air where the crop ends.
        assert crop.min() - 1 <= int(patch.min()) and int(patch.max()) <= crop.max() + 1
