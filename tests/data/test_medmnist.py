"""MedMNIST on the usual way: the patches from the store of its table are the volumes of the file."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fmcib_ssl.data.importers import DATASETS, import_medmnist
from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.prepare import store_for_table
from fmcib_ssl.data.store import StoreSettings
from fmcib_ssl.data.tables import AnnotationsError

REPO = Path(__file__).resolve().parents[2]
NUM = {"train": 4, "val": 2, "test": 3}


def write_npz(folder: Path, name: str = "nodulemnist3d", size: int = 28, **changed: Any) -> Path:
    """A file as MedMNIST lays it out; the classes take turns."""
    rng = np.random.default_rng(size)
    arrays: dict[str, Any] = {}
    for split, num in NUM.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (num, size, size, size)).astype(np.uint8)
        arrays[f"{split}_labels"] = (np.arange(num) % 2)[:, None].astype(np.uint8)
    np.savez(
        folder / f"{name}.npz", **{key: value for key, value in {**arrays, **changed}.items() if value is not None}
    )
    return folder / f"{name}.npz"


@pytest.mark.parametrize("dataset", DATASETS)
def test_from_the_file_to_the_patches(dataset: str, tmp_path: Path) -> None:
    file = write_npz(tmp_path, dataset)
    table = import_medmnist(file, tmp_path / "out", edge_mm=28)
    summary = store_for_table(tmp_path / "out" / "lesions.csv", tmp_path / "stores", StoreSettings())
    patches = LesionPatches(summary.store, (28, 28, 28), negatives_per_lesion=0)
    assert patches.lesions["volume"].tolist() == table["volume"].tolist()
    assert patches.lesions["volume"].iloc[NUM["train"]] == f"{dataset}_28/val/0000"
    with np.load(file) as arrays:
        place = 0
        for split in NUM:
            own = patches.lesions[patches.lesions["split"] == split]
            assert own["label"].tolist() == arrays[f"{split}_labels"][:, 0].tolist()
            assert own["label_name"].tolist() == [DATASETS[dataset].classes[label] for label in own["label"]]
            for volume in arrays[f"{split}_images"]:
                expected = np.interp(volume, [0, 255], DATASETS[dataset].window_hu)
                np.testing.assert_allclose(patches.positive(place)[0].numpy(), expected, atol=0.501)
                place += 1


def test_a_volume_fills_the_patch_that_is_named(tmp_path: Path) -> None:
    """28 voxels on an edge of 50 mm, in voxels of 1 mm: linear between the centres, which `np.interp` gives too."""
    import_medmnist(write_npz(tmp_path), tmp_path / "out", window_hu=(-510, 510))
    summary = store_for_table(tmp_path / "out" / "lesions.csv", tmp_path / "stores", StoreSettings())
    patch = LesionPatches(summary.store, negatives_per_lesion=0).positive(0)[0].numpy()
    with np.load(tmp_path / "nodulemnist3d.npz") as arrays:
        expected = arrays["train_images"][0] * 4.0 - 510
    for axis in range(3):
        at = (np.arange(50) + 0.5) * 28 / 50 - 0.5
        expected = np.apply_along_axis(lambda row, at=at: np.interp(at, np.arange(28), row), axis, expected)
    np.testing.assert_allclose(patch, expected, atol=0.51)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": None}, "val_labels"),
        ({"test_images": np.zeros((3, 28, 28, 28), np.float32)}, "no 8-bit cubes"),
        ({"test_images": np.zeros((3, 28, 28, 3), np.uint8)}, "no 8-bit cubes"),
        ({"train_labels": np.full((4, 1), 2)}, "of 0 to 1"),
        ({"train_labels": np.array([[{}]] * 4, object)}, "pickle"),
    ],
)
def test_a_file_that_is_not_medmnists_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationsError, match=rf"damaged, or not one of MedMNIST's: .*{message}"):
        import_medmnist(write_npz(tmp_path, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(REPO / "scripts" / "import_medmnist.py"))["main"]
    main([f"file={write_npz(tmp_path, 'organmnist3d_64', 64)}", f"output={tmp_path / 'out'}", "window_hu=-160,240"])
    assert "task=multiclass split=split group=null" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "out" / "lesions.csv")) == 9
    for name, message in (("brainmnist", "is none of nodulemnist3d.npz"), ("nodulemnist3d", "there is no such file")):
        with pytest.raises(SystemExit, match=message):
            main([f"file={tmp_path / name}.npz", f"output={tmp_path / 'out'}"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_is_said_of_a_data_set_is_what_the_package_says(dataset: str) -> None:
    info = pytest.importorskip("medmnist.info").INFO[dataset]
    assert dict(enumerate(DATASETS[dataset].classes)) == {int(number): name for number, name in info["label"].items()}
    assert {"binary-class": "binary", "multi-class": "multiclass"}[info["task"]] == DATASETS[dataset].task
