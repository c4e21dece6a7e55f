"""The probe in short runs on a small store: what it sees, that it changes nothing, and that devices agree."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from stores import make_store
from tiny_trainer import tiny_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.evaluation import auc, knn_scores, linear_scores, value_of
from fmcib_ssl.training.online_probe import OnlineProbe
from fmcib_ssl.types import Preprocessing

SIZE = (6, 6, 6)
NUM_SCANS, LESIONS_EACH = 9, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy scans; a lesion of class 1 is rougher. The last scan has no label, the one before it is `train`."""
    rng = np.random.default_rng(0)
    scans = {f"s{scan}": rng.integers(-20, 20, (16, 40, 40)).astype(np.int16) for scan in range(NUM_SCANS)}
    numbers = [(scan, lesion) for scan in range(NUM_SCANS) for lesion in range(LESIONS_EACH)]
    labels = [(scan + lesion) % 2 for scan, lesion in numbers]
    for (scan, lesion), label in zip(numbers, labels, strict=True):
        scans[f"s{scan}"][5:11, 5:11, 5 + 10 * lesion : 11 + 10 * lesion] = rng.normal(100, 150 if label else 20, SIZE)
    columns = {
        "rough": [None if n[0] == NUM_SCANS - 1 else f"{label}" for n, label in zip(numbers, labels, strict=True)],
        "split": ["train" if scan == NUM_SCANS - 2 else "val" for scan, _ in numbers],
        "PatientID": [f"p{scan}" for scan, _ in numbers],
    }
    lesions = [(f"s{scan}", 8, 8, 8 + 10 * lesion) for scan, lesion in numbers]
    return make_store(tmp_path_factory.mktemp("probe") / "store", scans, lesions, **columns).path


class Toy(L.LightningModule):
    """An encoder with batch norm and dropout; a training step moves its weights, unless `lr` is 0."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.encoder = nn.Sequential(
            nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveMaxPool3d(2), nn.Flatten()
        )
        self.encoder[1].eval()  # a frozen part stays as it is

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.encoder(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def probe(store: Path, **options: Any) -> OnlineProbe:
    return OnlineProbe(store, "rough", **{"patch_size": SIZE, "select": {"split": ["val"]}, **options})


def fit(folder: Path, callbacks: list[Any], lr: float = 0.1, **options: Any) -> tuple[Toy, L.Trainer]:
    torch.manual_seed(0)
    module = Toy(lr)
    trainer = tiny_trainer(*callbacks, default_root_dir=folder, **options)
    data = TensorDataset(torch.randn(8, 1, *SIZE, generator=torch.Generator().manual_seed(0)))
    trainer.fit(module, DataLoader(data, batch_size=2))
    return module, trainer


def test_it_judges_features_of_the_lesions_that_are_selected(store: Path, tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, [probe(store, every_n_epochs=1)], max_epochs=2)
    patches = LesionPatches(store, SIZE)
    chosen = (patches.lesions["split"] == "val") & patches.lesions["rough"].notna()
    rows = patches.lesions[chosen]
    assert len(rows) == (NUM_SCANS - 2) * LESIONS_EACH
    module.eval()
    with torch.no_grad():
        hu = torch.stack([patches.positive(i) for i in np.flatnonzero(chosen)])
        features = module.encoder(Preprocessing(SIZE).normalize(hu)).numpy()
    labels, patients = rows["rough"].astype(int).to_numpy(), rows["PatientID"].to_numpy()
    for name, scores in (
        ("knn", knn_scores(features, labels, patients, 20)),
        ("linear", linear_scores(features, labels, patients, 5)),
    ):
        assert trainer.callback_metrics[f"online/{name}_auc"] == pytest.approx(value_of(auc, labels, scores))
    assert {"online/rank", "online/uniformity", "online/spread_0", "online/spread_1"} <= trainer.callback_metrics.keys()


def test_training_is_the_same_with_and_without_it(store: Path, tmp_path: Path) -> None:
    with_probe, _ = fit(tmp_path, [probe(store, every_n_epochs=1)], max_epochs=2)
    without, _ = fit(tmp_path, [], max_epochs=2)
    assert [part.training for part in with_probe.modules()] == [part.training for part in without.modules()]
    for name, value in without.state_dict().items():
        torch.testing.assert_close(with_probe.state_dict()[name], value, rtol=0, atol=0)


def test_the_weights_that_training_begins_with_are_judged_first(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fmcib_ssl.training.online_probe")
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="", version="")
    watch = probe(store, every_n_epochs=2)
    fit(tmp_path, [watch], max_epochs=3, logger=logger, lr=0.0)
    metrics = pd.read_csv(tmp_path / "metrics.csv").dropna(subset="online/linear_auc")
    assert metrics["step"].tolist() == [0, 7, 11]  # before training, after epochs 2 and 3 of 4 steps
    assert metrics["online/linear_auc"].nunique() == 1  # nothing was learned at a rate of 0 (nor batch norm's averages)
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("online_probe")]
    assert messages[0].startswith("online probe of rough, before training: linear AUC ")
    assert "epoch 2: linear AUC " in messages[1] and "before training)" in messages[1]
    assert watch.last_result is not None and watch.last_result in messages[-1]


def test_two_devices_get_the_figures_of_one(store: Path, tmp_path: Path) -> None:
    """21 lesions do not split evenly over two."""
    _, one = fit(tmp_path, [probe(store, every_n_epochs=1)], max_epochs=1, lr=0.0)
    _, two = fit(tmp_path, [probe(store, every_n_epochs=1)], max_epochs=1, lr=0.0, devices=2, strategy="ddp_fork")
    keys = [key for key in one.callback_metrics if key.startswith("online/")]
    assert len(keys) == 8
    for key in keys:
        assert float(two.callback_metrics[key]) == pytest.approx(float(one.callback_metrics[key]), abs=1e-5)


def test_lesions_that_are_trained_on_are_told(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Data(L.LightningDataModule):
        dataset = type("Views", (), {"patches": LesionPatches(store, SIZE)})

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.randn(4, 1, *SIZE)), batch_size=2)

    tiny_trainer(probe(store), default_root_dir=tmp_path).fit(Toy(), datamodule=Data())
    assert f"{NUM_SCANS - 2} of its {NUM_SCANS - 2} patients are trained on" in caplog.text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": None}, "set callbacks.online_probe.store=DIR"),
    ({"label": None}, "callbacks.online_probe.label=COLUMN"),
    ({"label": "texture"}, "label=texture: .*rough"),
    ({"select": {"fold": 1}}, "select names the column 'fold'"),
    ({"select": {"split": "test"}}, "no lesion of .* has select={'split': 'test'}"),
    ({"select": {"rough": 1}}, "it is the same for all of them"),
    ({"label": "scan_id"}, "has the value 's0' in one patient only"),
    ({"group": "hospital"}, "group=hospital: .*PatientID"),
    ({"every_n_epochs": 0}, "every_n_epochs=0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_before_training(store: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineProbe(**{"store": store, "label": "rough", "patch_size": SIZE, "select": {"split": "val"}, **options})


def test_more_lesions_than_wanted_are_cut_down_alike_in_every_run(store: Path) -> None:
    few = [probe(store, max_lesions=12).patches.lesions["lesion_id"].tolist() for _ in range(2)]
    assert few[0] == few[1] == sorted(few[0])
    assert len(few[0]) == 12
