"""Fine-tuning on the way of `train.py`, on lesions that are bright or dark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from stores import make_store, reseal
from tiny_runs import assert_equal_weights, composed

import fmcib_ssl
from fmcib_ssl.models.encoders import small_resnet
from fmcib_ssl.models.export import export_encoder
from fmcib_ssl.run import finetune
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.run_folder import RunFolderError
from fmcib_ssl.types import Preprocessing, UserError

NUM_PATIENTS, SIDE = 16, 16
ENCODER = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patient with odd number has two bright lesions, an even one two dark ones; `texture` is 3 and 5."""
    rng, scans = np.random.default_rng(0), {}
    patients = np.arange(NUM_PATIENTS).repeat(2)
    for patient in range(NUM_PATIENTS):
        scans[f"scan_{patient:02}"] = hu = rng.integers(-60, 60, (24, 40, 60)).astype(np.int16)
        for x in (16, 44):
            hu[8:16, 16:24, x - 4 : x + 4] += 700 if patient % 2 else -700
    columns = {
        "lesion_id": [f"lesion_{number}" for number in range(len(patients))],
        "PatientID": [f"p{patient}" for patient in patients],
        "texture": np.where(patients % 2, 3, 5),
        "grade": 1 + patients % 4,
        "side": np.repeat(["train", "train", "val", "test"], NUM_PATIENTS // 2),
    }
    lesions = [(f"scan_{patient:02}", 12.0, 20.0, x) for patient in range(NUM_PATIENTS) for x in (16.0, 44.0)]
    return make_store(tmp_path_factory.mktemp("labelled") / "store", scans, lesions, **columns).path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    export_encoder(small_resnet(ENCODER["widths"]), ENCODER, Preprocessing((SIDE,) * 3), path)
    return path


def run_finetuning(store: Path, run: Path, *overrides: str) -> Path:
    options = [
        "+experiment=finetune", f"data.store={store}", "data.patch_size=[16,16,16]", f"paths.run={run}",
        "hardware=cpu", "hardware.num_workers=0", "+trainer.enable_progress_bar=false", "data.batch_size=4",
        "encoder=small", "encoder.widths=[4,4,8,8]", "finetune.label=texture", "finetune.threshold='<5'",
        "finetune.folds=2", "finetune.num_bootstrap=100",
    ]  # fmt: skip
    finetune(read_settings(composed(*options, *overrides)))
    return run


def results_of(run: Path) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in json.loads((run / "results.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def supervised(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_finetuning(store, tmp_path_factory.mktemp("supervised"), "trainer.max_epochs=12", "finetune.patience=12")


def test_every_lesion_is_tested_once_by_folds_without_its_patient(supervised: Path) -> None:
    predictions = pd.read_parquet(supervised / "predictions.parquet")
    test = predictions[predictions["split"] == "test"]
    assert sorted(test["lesion_id"]) == sorted(f"lesion_{number}" for number in range(2 * NUM_PATIENTS))
    by_number = test["lesion_id"].str.removeprefix("lesion_").astype(int)
    assert (test["label"] == (by_number // 2 % 2)).all()
    assert (test["patient"] == "p" + (by_number // 2).astype(str)).all()
    for _, fold in predictions.groupby("fold"):
        assert fold.groupby("patient")["split"].nunique().max() == 1


def test_the_metric_is_scikit_learns_over_the_folds(supervised: Path) -> None:
    predictions = pd.read_parquet(supervised / "predictions.parquet")
    test = predictions[predictions["split"] == "test"]
    aucs = [roc_auc_score(fold["label"], fold["score"]) for _, fold in test.groupby("fold")]
    result = results_of(supervised)["AUC"]
    assert result["value"] == pytest.approx(np.mean(aucs)) and result["value"] > 0.95  # what can be learned is learned
    assert result["low"] <= result["value"] <= result["high"]


def test_the_best_checkpoint_is_kept_and_exported(supervised: Path) -> None:
    fold = supervised / "fold_0"
    exported = fmcib_ssl.load_encoder(fold / "encoder.safetensors")
    assert [path.name for path in (fold / "checkpoints").iterdir()] == ["best.ckpt"]
    assert_equal_weights(exported.state_dict(), fmcib_ssl.load_encoder(fold / "checkpoints" / "best.ckpt").state_dict())


def test_a_stopped_run_goes_on_with_the_fold_that_is_missing(store: Path, tmp_path: Path) -> None:
    options = ["trainer.max_epochs=2", "data.batch_size=8"]
    run_finetuning(store, tmp_path, *options)
    before = pd.read_parquet(tmp_path / "predictions.parquet")
    kept = (tmp_path / "fold_0" / "checkpoints" / "best.ckpt").stat().st_mtime_ns
    (tmp_path / "fold_1" / "predictions.parquet").unlink()
    run_finetuning(store, tmp_path, *options)
    assert (tmp_path / "fold_0" / "checkpoints" / "best.ckpt").stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "predictions.parquet"), before)


@pytest.mark.slow
def test_other_weights_or_labels_are_another_run(store: Path, weights: Path, tmp_path: Path) -> None:
    """One part of two is done; what it would be put together with has changed since, under the same names."""
    shutil.copytree(store, tmp_path / "store")
    shutil.copy(weights, tmp_path / "weights.safetensors")
    options = ["trainer.max_epochs=1", "data.batch_size=8", f"finetune.weights={tmp_path / 'weights.safetensors'}"]
    run = run_finetuning(tmp_path / "store", tmp_path / "run", *options)
    state = json.loads((run / "run.json").read_text())
    assert state["finished"]["step"] == 2 and [start["step"] for start in state["starts"]] == [0]
    (run / "fold_1" / "predictions.parquet").unlink()
    before = (run / "run.json").read_bytes(), (run / "config.yaml").read_bytes()
    torch.manual_seed(1)
    export_encoder(
        small_resnet(ENCODER["widths"]), ENCODER, Preprocessing((SIDE,) * 3), tmp_path / "weights.safetensors"
    )
    with pytest.raises(RunFolderError, match=r"trained on other lesions.*run=new"):
        run_finetuning(tmp_path / "store", run, *options)
    shutil.copy(weights, tmp_path / "weights.safetensors")
    lesions = pd.read_parquet(tmp_path / "store" / "lesions.parquet")
    lesions.assign(texture=8 - lesions["texture"]).to_parquet(tmp_path / "store" / "lesions.parquet", index=False)
    reseal(tmp_path / "store")
    with pytest.raises(RunFolderError, match=r"trained on other lesions.*run=new"):
        run_finetuning(tmp_path / "store", run, *options)
    assert ((run / "run.json").read_bytes(), (run / "config.yaml").read_bytes()) == before


@pytest.mark.parametrize(
    ("depth", "changed"),
    [
        pytest.param("head", (), marks=pytest.mark.slow),
        ("last_stage", ("layer4.",)),
        pytest.param("all", ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."), marks=pytest.mark.slow),
    ],
)
def test_only_what_is_trained_changes(
    depth: str, changed: tuple[str, ...], store: Path, weights: Path, tmp_path: Path
) -> None:
    options = [f"finetune.train={depth}", f"finetune.weights={weights}", "finetune.split=side", "trainer.max_epochs=2"]
    run = run_finetuning(store, tmp_path, *options)
    before = fmcib_ssl.load_encoder(weights).state_dict()
    after = fmcib_ssl.load_encoder(run / "split" / "encoder.safetensors").state_dict()
    for name, value in before.items():
        assert value.equal(after[name]) == (not name.startswith(changed or ("none",))), name
    predictions = pd.read_parquet(run / "predictions.parquet")
    assert predictions["split"].value_counts().to_dict() == {"val": 8, "test": 8}


@pytest.mark.slow
def test_it_stops_when_the_validation_score_rises_no_more(store: Path, tmp_path: Path) -> None:
    # Grades have nothing to do with what can be seen, so that little is learned but by heart.
    options = ["finetune.label=grade", "finetune.threshold='>2'", "finetune.split=side", "finetune.patience=2"]
    run = run_finetuning(store, tmp_path, *options, "trainer.max_epochs=60", "optimizer.base_lr=1")
    scores = pd.read_csv(run / "split" / "metrics.csv")["val/score"].dropna().to_numpy()
    assert len(scores) == scores.argmax() + 2 + 1
    assert len(scores) < 60
    # The weights that were kept are those of the best epoch.
    val = pd.read_parquet(run / "predictions.parquet").query("split == 'val'")
    assert roc_auc_score(val["label"], val["score"]) == pytest.approx(scores.max())


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("multiclass", "AUC"),
        pytest.param("ordinal", "Spearman", marks=pytest.mark.slow),
        pytest.param("continuous", "MAE", marks=pytest.mark.slow),
    ],
)
def test_other_tasks(task: str, metric: str, store: Path, tmp_path: Path) -> None:
    options = [f"finetune.task={task}", "finetune.label=grade", "finetune.threshold=null", "trainer.max_epochs=1"]
    run = run_finetuning(store, tmp_path, *options)
    assert np.isfinite(results_of(run)[metric]["value"])
    predictions = pd.read_parquet(run / "predictions.parquet")
    if task == "multiclass":
        scores = predictions[[f"score_{grade}" for grade in range(1, 5)]].to_numpy()
        np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
    else:
        assert predictions["score"].between(0, 6).all()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.label=null"], ["finetune.label=COLUMN"]),
        (["finetune.label=textur"], ["textur", "PatientID"]),
        (["finetune.threshold=null", "finetune.label=grade"], ["4 different values", "threshold"]),
        (["finetune.group=Patient"], ["finetune.group=Patient", "no such column"]),
        (["finetune.split=PatientID"], ["'train', 'val' and 'test'"]),
        (["finetune.group=texture", "finetune.split=side"], ["more than one side", "finetune.group=null"]),
        (["hardware.devices=2"], ["hardware.devices=1"]),
        (["finetune.weights=none.safetensors"], ["finetune.weights", "none.safetensors", "no such file"]),
        (["finetune.weights={weights}", "data.patch_size=[20,20,20]"], ["data.patch_size=[16,16,16]"]),
        (["finetune.weights={weights}", "data.spacing_mm=2"], ["data.spacing_mm=1"]),
        (["finetune.train=last_stage", "data.batch_size=1"], ["data.batch_size to 2"]),
    ],
    ids=lambda value: value[0][:40],
)
def test_refusals(overrides: list[str], words: list[str], store: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_finetuning(store, tmp_path, *(override.format(weights=weights) for override in overrides))
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
