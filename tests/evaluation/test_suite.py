"""A suite of tasks on small scans: what stands in its results, what is made again, and what speaks against a task."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from embedded_archive import make_encoder

from fmcib_ssl.evaluation import suite as module
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.report_suite import write_suite
from fmcib_ssl.evaluation.suite import CONDITIONS_SHOWN, Suite, TaskResult, contenders, run_suite
from fmcib_ssl.evaluation.tasks import Task

NUM = 36
TASKS = {
    "bright": Task(title="Bright or not", kind="binary", label="bright", tables={"all": "lesions.csv"}, folds=3),
    "hu": Task(title="HU", kind="continuous", label="hu", tables={"all": "lesions.csv"}, folds=3, size=()),
    "survival": Task(
        title="Survival", kind="survival", time="days", event="died", tables={"all": "lesions.csv"}, folds=2,
        patients="max",
    ),
    "shared": Task(
        title="Patients on two sides", kind="binary", label="bright", tables={"all": "lesions.csv"}, split="side",
        note="A note.", published=({"method": "theirs", "metric": "AUC", "value": 0.7, "source": "a paper"},),
    ),
}  # fmt: skip


pytestmark = pytest.mark.slow  # test_ranking.py, test_tasks.py and test_patients.py are what it is made of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Two lesions a scan in 18 scans, brighter where `bright`; dark lesions are followed by an early death."""
    folder, rng = tmp_path_factory.mktemp("suite"), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for scan in range(NUM // 2):
        voxels, bright = rng.integers(-900, 300, (24, 30, 32)).astype(np.int16), scan % 2
        voxels += np.int16(200 * bright + rng.integers(0, 80))
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(folder / f"scan{scan}.nii.gz"))
        lesion = {
            "image_path": f"scan{scan}.nii.gz", "coordY": 15, "coordZ": 12, "PatientID": f"p{scan}", "bright": bright,
            "hu": float(voxels.mean()), "days": 10 + 30 * bright + scan, "died": int(scan % 5 > 0),
        }  # fmt: skip
        rows += [
            {
                **lesion,
                "coordX": x,
                "diameter_mm": rng.normal(8, 2),
                "side": "test" if scan < 7 + (x == 20) else "train",
            }
            for x in (12, 20)
        ]
    pd.DataFrame(rows).to_csv(folder / "lesions.csv", index=False)
    make_encoder(folder / "enc.safetensors")
    models = contenders({"ours": folder / "enc.safetensors"}, ["random", "hu_statistics", "raw_voxels"])
    return Suite(models, TASKS, folder, folder, folder / "out", num_bootstrap=50)


@pytest.fixture(scope="module")
def found(made: Suite) -> dict[str, TaskResult]:
    return run_suite(made)[0]


def test_every_model_has_a_row_on_every_task_beside_its_rivals(made: Suite, found: dict[str, TaskResult]) -> None:
    values = json.loads((made.output / "results.json").read_text())
    rows = pd.DataFrame(values["rows"])
    assert list(rows) == ["model", "task", "probe", "metric", "value", "low", "high"]
    models = {"ours", "random weights (ours)", "HU statistics", "raw voxels"}
    first = {"bright": "AUC", "hu": "Spearman", "survival": "C-index", "shared": "AUC"}
    for task, metric in first.items():
        own = rows[(rows["task"] == task) & (rows["metric"] == metric)]
        probes = {"bright": 2, "hu": 2, "survival": 1, "shared": 2}[task]
        assert own.groupby("model").size().loc[sorted(models)].eq(probes).all()
        assert ("size" in set(own["model"])) == (task != "hu")
        assert own["value"].between(-1, 1).all()
    statistics = rows[(rows["model"] == "HU statistics") & (rows["metric"] == "AUC") & (rows["probe"] == "logistic")]
    assert (statistics["value"] > 0.9).all()  # brightness is what they are made of
    against = {row["against"] for row in found["bright"].differences if row["features"] == "ours"}
    assert against == {"random weights (ours)", "HU statistics", "raw voxels", "size"}
    shown = {f"AUC, {title}" for title in CONDITIONS_SHOWN.values()} | {"AUC, within thirds of size"}
    assert shown <= set(rows[(rows["task"] == "bright") & (rows["model"] == "ours")]["metric"])
    assert values["ranking"]["verdict"]
    assert values["ranking"]["tasks"] == list(TASKS)


def test_lesions_are_embedded_once_and_patients_are_pooled_and_never_shared(
    made: Suite, found: dict[str, TaskResult]
) -> None:
    assert len(list((made.output / "features").glob("*/*.parquet"))) == len(made.models)
    assert "18 patients, whose lesions are pooled: max" in found["survival"].notes
    assert "tested patients are left out of training and of the choice of a setting" in found["shared"].notes
    patients = next(one for one in found["shared"].leakage if one["check"] == "patients")
    assert patients["found"]
    assert not found["shared"].refused


def test_the_same_command_makes_nothing_again(
    made: Suite, found: dict[str, TaskResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [file for part in ("features", "tasks") for file in (made.output / part).rglob("*.parquet")]
    before = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setattr(module, "_evaluated", None)  # would fail if it were called
    again, _ = run_suite(made)
    assert [file.stat().st_mtime_ns for file in files] == before
    for name, one in again.items():
        assert one.rows == found[name].rows
        np.testing.assert_array_equal(one.drawn["ours"], found[name].drawn["ours"])


def test_a_model_that_cannot_embed_is_missing_and_the_others_go_on(made: Suite, tmp_path: Path) -> None:
    models = {"statistics": made.models["HU statistics"], "gone": {**made.models["ours"], "weights": "/no/file"}}
    some = replace(made, models=models, tasks={"bright": TASKS["bright"]}, output=tmp_path, robustness=False)
    results, ranking = run_suite(some)
    (missing,) = (one for one in results["bright"].missing if one["features"] == "gone")
    assert "/no/file" in missing["reason"]
    assert {row["model"] for row in ranking.rows} == {"statistics", "size"}


def test_a_leak_that_is_not_allowed_takes_a_task_out_of_the_ranking(made: Suite, tmp_path: Path) -> None:
    table = pd.read_csv(made.tables / "lesions.csv")
    for file in made.tables.glob("*.nii.gz"):
        shutil.copy(file, tmp_path / file.name)
        shutil.copy(file, tmp_path / f"twin_{file.name}")
    twins = {name: "twin_" + table[name] for name in ("image_path", "PatientID")}  # the same image under two patients
    pd.concat([table, table.assign(**twins)]).to_csv(tmp_path / "twice.csv", index=False)
    task = TASKS["bright"].model_copy(update={"tables": {"all": "twice.csv"}})
    models = {"HU statistics": made.models["HU statistics"], "raw voxels": made.models["raw voxels"]}
    options: dict[str, Any] = {"tables": tmp_path, "images": tmp_path, "output": tmp_path / "out", "robustness": False}
    results, ranking = run_suite(replace(made, models=models, tasks={"twice": task}, **options))
    assert results["twice"].refused == ["duplicates"]
    assert not ranking.rows
    page = write_suite(results, {"twice": task}, ranking, tmp_path / "suite.html").read_text()
    assert "twice does not count: duplicates" in page


def test_the_page_says_what_can_be_told_apart_and_what_was_published(
    made: Suite, found: dict[str, TaskResult], tmp_path: Path
) -> None:
    _, ranking = run_suite(made)
    page = write_suite(found, TASKS, ranking, tmp_path / "suite.html").read_text()
    for text in (ranking.verdict, "Published: theirs: AUC 0.700", "A note.", "within thirds of size", "3 mm beside"):
        assert text in page
    assert page.count("data:image/") >= 2 * len(TASKS)
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_baselines_of_each_patch_and_network_are_made_once(made: Suite, tmp_path: Path) -> None:
    file = made.tables / "enc.safetensors"
    networks = {"resnet10": {"_target_": "fmcib_ssl.models.encoders.monai_resnet", "depth": 10}}
    models = contenders({"a": file, "b": file}, ["random", "hu_statistics"], networks)
    assert list(models) == ["a", "b", "random weights (a)", "random weights (resnet10)", "HU statistics"]
    alone = contenders({}, ["hu_statistics"])
    assert alone["HU statistics"]["preprocessing"] is None
    task = TASKS["bright"].model_copy(update={"patch": {"patch_size_zyx": [4, 6, 6]}})
    some = replace(made, models=alone, tasks={"bright": task}, output=tmp_path, robustness=False)
    run_suite(some)
    (features,) = (tmp_path / "features").glob("*/*.parquet")
    assert FeatureTable.read(features).provenance["preprocessing"]["patch_size_zyx"] == [4, 6, 6]


def test_the_command(made: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("title: Mine\nkind: binary\nlabel: bright\ntables: {all: lesions.csv}\nfolds: 2\n")
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    models = f"models=[net={made.tables / 'enc.safetensors'},random:small,hu_statistics]"
    options = [models, f"tasks={task}", f"tables={made.tables}", f"output={tmp_path / 'out'}", "num_bootstrap=20"]
    runpy.run_path(str(scripts / "suite.py"))["main"]([*options, "robustness=false", "patients=mean"])
    rows = pd.DataFrame(json.loads((tmp_path / "out" / "results.json").read_text())["rows"])
    assert set(rows["model"]) == {"net", "net + size", "random weights (small)", "HU statistics", "size"}
    assert set(rows["task"]) == {"mine"}
    assert f"page      {tmp_path / 'out' / 'suite.html'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: task=yours: neither"):
        runpy.run_path(str(scripts / "suite.py"))["main"]([models, "tasks=yours", *options[2:]])
