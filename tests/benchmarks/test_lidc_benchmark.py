"""The benchmark on real nodules: who is trained on, what is kept, and how a stopped run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from sklearn.metrics import roc_auc_score

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import lidc  # noqa: E402
import lidc_data  # noqa: E402
import lidc_methods  # noqa: E402
import lidc_probes  # noqa: E402

from fmcib_ssl.evaluation.labels import Split  # noqa: E402

NUM = 240


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lidc_probes, "PROBE", replace(lidc_probes.PROBE, settings=(1e-3,)))
    monkeypatch.setattr(lidc, "NUM_BOOTSTRAP", 50)
    monkeypatch.setattr(lidc, "FRACTIONS", (0.5,))


def made_up_nodules() -> lidc_data.Nodules:
    """Patches of noise, brighter where the label is 1, of 90 patients."""
    rng = np.random.default_rng(0)
    patients = np.array([f"P{number:03d}" for number in rng.integers(90, size=NUM)])
    label = rng.integers(2, size=NUM)
    hu = rng.normal(-700, 150, (NUM, 1, 8, 24, 24)) + 60 * label[:, None, None, None, None]
    published = rng.choice(["train", "val", "test", ""], NUM)
    return lidc_data.Nodules(
        lesions=pd.DataFrame(
            {"diameter_mm": rng.uniform(4, 20, NUM), **{t: rng.integers(1, 6, NUM) for t in ("texture", "margin")}}
        ),
        patches=torch.from_numpy(hu.astype(np.int16)),
        patients=patients,
        fold=lidc_data.folds_of(patients),
        labels={task: label if task == "texture" else rng.integers(2, size=NUM) for task in lidc_data.TASKS},
        pool=torch.from_numpy(rng.integers(-900, 50, (30, 1, 8, 24, 24)).astype(np.int16)),
        published=published,
        published_malignancy=rng.integers(2, size=NUM),
    )


def command(workspace: Path, **options: object) -> lidc.LidcBenchmark:
    return lidc.LidcBenchmark(data=Path("none"), workspace=workspace, output=workspace / "out.json", **options)  # type: ignore[arg-type]


def test_no_patient_is_on_two_sides_and_none_that_is_tested_is_pretrained_on() -> None:
    nodules = made_up_nodules()
    parts = [*lidc.folds(nodules), lidc.published_part(nodules)]
    for part in parts:
        tested = set(nodules.patients[part.test])
        fitted = set(nodules.patients[part.train])
        chosen = set() if part.val is None else set(nodules.patients[part.val])
        pretrained = set(nodules.patients[lidc.pretraining_rows(nodules.patients, part)])
        assert tested and fitted and not tested & (fitted | chosen | pretrained) and not fitted & chosen
    tested_once = np.concatenate([part.test for part in parts[:-1]])
    assert sorted(tested_once) == list(range(NUM))


def test_folds_follow_from_the_patients_not_from_the_order_of_rows() -> None:
    patients = made_up_nodules().patients
    order = np.random.default_rng(3).permutation(NUM)
    np.testing.assert_array_equal(lidc_data.folds_of(patients[order]), lidc_data.folds_of(patients)[order])
    assert np.ptp(np.bincount(lidc_data.folds_of(np.unique(patients)))) <= 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_what_is_kept_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodules, made = made_up_nodules(), []

    def features(
        contender: lidc_methods.Contender,
        positives: torch.Tensor,
        rows: np.ndarray,
        *_: object,
        seed: int,
        **__: object,
    ) -> np.ndarray:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((contender.name, seed, len(rows)))
        return positives.float().flatten(1)[:, :20].numpy()

    monkeypatch.setattr(lidc, "features", features)
    options = {"methods": "recipe,diameter", "seeds": 1}
    with pytest.raises(KeyboardInterrupt):
        lidc.Benchmark(command(tmp_path, **options), nodules).work()
    assert [name for name, *_ in made] == ["recipe"] * 3
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert not list(tmp_path.rglob("*.tmp.npy"))
    made.append(("a place that is not 3", 0, 0))
    lidc.Benchmark(command(tmp_path, **options), nodules).work()
    assert len(made) == 4 + 3  # two more folds, and the published split
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    results = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["method"], row["task"]): row for row in results["rows"]}
    assert {task for _, task in rows} >= set(lidc_data.TASKS)
    assert rows["recipe", "texture"]["seeds"] == 1
    assert rows["recipe", "texture"]["low"] <= rows["recipe", "texture"]["auc"] <= rows["recipe", "texture"]["high"]
    assert [row["nodules"] for row in results["by_rating"] if row["task"] == "margin"] == [
        (nodules.lesions["margin"] == rating).sum() for rating in range(1, 5)
    ]
    assert {(row["against"], row["task"]) for row in results["differences"]} >= {("diameter", "margin")}


@pytest.mark.slow
def test_an_auc_is_the_mean_over_folds_of_scikit_learns(tmp_path: Path) -> None:
    nodules = made_up_nodules()
    benchmark = lidc.Benchmark(command(tmp_path, methods="raw_voxels"), nodules)
    benchmark.work()
    (row,) = [row for row in benchmark.write()["rows"] if row["task"] == "texture"]
    labels, aucs = nodules.labels["texture"], []
    for job in benchmark.jobs():
        if job.part.name.startswith("fold"):
            found = benchmark.scores(job, job.questions[0])
            assert found is not None
            aucs.append(roc_auc_score(labels[job.part.test], found.scores))
    assert row["auc"] == pytest.approx(np.mean(aucs), abs=1e-4)
    assert row["auc"] > 0.9  # brightness is in the voxels


@pytest.mark.parametrize("name", [c.name for c in lidc_methods.CONTENDERS if c.kind == "trained"])
def test_every_contender_has_the_recipes_budget(name: str) -> None:
    recipe, its = (lidc_methods.BY_NAME[n].settings(0, None) for n in ("recipe", name))
    for settings in (recipe, its):
        assert settings.augment["transforms"].keys() - {"surroundings"} == {"geometry", "smooth", "noise"}
    assert its.trainer == recipe.trainer and its.optimizer == recipe.optimizer and its.schedule == recipe.schedule
    assert its.data.batch_size == recipe.data.batch_size


@pytest.mark.slow
def test_pretraining_sees_only_what_it_is_given_and_is_repeatable() -> None:
    nodules = made_up_nodules()
    rows = lidc.pretraining_rows(nodules.patients, Split("x", np.arange(0), np.arange(100)))[:64]
    mined = lidc_methods.BY_NAME["mined_and_lesions"]
    contender = replace(mined, overrides=(*mined.overrides, "data.batch_size=32"))
    changed = nodules.patches.clone()
    changed[np.setdiff1d(np.arange(NUM), rows)] += 100
    first, again, with_others_changed = (
        lidc_methods.features(contender, patches, rows, nodules.pool, seed=0, epochs=1)
        for patches in (nodules.patches, nodules.patches, changed)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[rows], with_others_changed[rows])


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
    (folder / "fmcib_task2_voi_map.csv").symlink_to(real_data / "lidc_crops" / "fmcib_task2_voi_map.csv")
    nodules = lidc_data.load(tmp_path, tmp_path / "workspace")
    assert len(nodules.patches) == len(flat) and nodules.pool.shape == (lidc_data.POOL_SIZE, 1, 8, 24, 24)
    for patch, image in zip(nodules.patches, nodules.lesions["image_path"], strict=True):
        crop = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / image)))
        # Interpolated or repeated, but never made up: in particular no air where the crop ends.
        assert crop.min() - 1 <= int(patch.min()) and int(patch.max()) <= crop.max() + 1
