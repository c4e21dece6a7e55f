"""MedMNIST 3D from a file of its layout: never downloaded here."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from embedded_archive import make_encoder
from scipy.ndimage import zoom

from fmcib_ssl.evaluation.embedding import baseline_tables, embed_source
from fmcib_ssl.evaluation.embedding_sources import FrozenEncoder, Inference, open_patches, raw_voxels
from fmcib_ssl.evaluation.feature_table import FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.medmnist_source import DATASETS, SPLITS, download_medmnist, medmnist_source
from fmcib_ssl.types import Preprocessing

REPO = Path(__file__).resolve().parents[2]
NUM = {"train": 24, "val": 4, "test": 16}


def write_npz(folder: Path, dataset: str = "nodulemnist3d", size: int = 28, **changed: Any) -> Path:
    """A file as MedMNIST lays it out: class 1 is a brighter ball than class 0; the classes take turns."""
    rng = np.random.default_rng(size)
    inside = (np.indices((size, size, size)) - size // 2 < size // 4).all(axis=0)
    arrays: dict[str, Any] = {}
    for split, num in NUM.items():
        labels = (np.arange(num) % len(DATASETS[dataset].classes))[:, None].astype(np.uint8)
        noise = rng.integers(0, 60, (num, size, size, size))
        arrays[f"{split}_images"] = (noise + inside * (60 + 60 * (labels[:, :, None, None] > 0))).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    arrays |= changed
    file = folder / f"{dataset}{'' if size == 28 else f'_{size}'}.npz"
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
    return file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medmnist")
    write_npz(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenEncoder:
    return make_encoder(tmp_path_factory.mktemp("run") / "encoder.safetensors")


def test_rows_are_those_of_the_file_in_its_splits(root: Path) -> None:
    patches = open_patches(medmnist_source("nodulemnist3d", 28, root))
    lesions, preprocessing = patches.lesions, patches.preprocessing
    assert preprocessing.patch_size_zyx == (28, 28, 28)
    with np.load(root / "nodulemnist3d.npz") as file:
        for split in SPLITS:
            there = lesions[lesions["split"] == split]
            assert there["label"].tolist() == file[f"{split}_labels"][:, 0].tolist()
            for place in (there.index[0], there.index[-1]):
                grey = file[f"{split}_images"][place - there.index[0]].astype(np.float64)
                expected = np.interp(grey, [0, 255], [-1024, 400])
                np.testing.assert_allclose(patches[place][0].numpy(), expected, atol=0.501)
    assert lesions["lesion_id"].is_unique
    assert lesions["lesion_id"].iloc[NUM["train"]] == "nodulemnist3d_28/val/0000"
    assert set(zip(lesions["label"], lesions["label_name"], strict=True)) == {(0, "benign"), (1, "malignant")}
    assert patches[0].dtype == torch.int16


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_is_said_of_a_data_set_is_what_the_package_says(dataset: str) -> None:
    info = pytest.importorskip("medmnist.info").INFO[dataset]
    known = DATASETS[dataset]
    assert known.python_class == info["python_class"]
    assert dict(enumerate(known.classes)) == {int(number): name for number, name in info["label"].items()}
    assert dict(zip(SPLITS, known.num_volumes, strict=True)) == info["n_samples"]
    assert {"binary-class": "binary", "multi-class": "multiclass"}[info["task"]] == known.task


@pytest.mark.parametrize("size", [28, 64])
def test_the_package_reads_the_same_from_the_same_file(tmp_path: Path, size: int) -> None:
    package = pytest.importorskip("medmnist.dataset")
    few = np.zeros((1, size, size, size), np.uint8)
    labels = np.zeros((1, 1), np.uint8)
    write_npz(
        tmp_path, "organmnist3d", size, train_images=few + 7, train_labels=labels, test_images=few, test_labels=labels,
        val_images=np.random.default_rng(0).integers(0, 256, few.shape).astype(np.uint8), val_labels=labels + 9,
    )  # fmt: skip
    patches = open_patches(medmnist_source("organmnist3d", size, tmp_path, window_hu=(0, 255)))
    lesions = patches.lesions
    for place, split in enumerate(SPLITS):
        theirs = package.OrganMNIST3D(split=split, root=str(tmp_path), size=size)
        np.testing.assert_array_equal(patches[place][0].numpy(), np.round(theirs[0:1][0][0, 0] * 255))
        assert [lesions["label"].iloc[place]] == theirs.labels[0].tolist()
    assert lesions["label_name"].tolist() == ["liver", "spleen", "liver"]


def test_resizing_is_trilinear_between_the_centres_of_voxels(root: Path) -> None:
    patch_zyx = (40, 33, 50)
    grown = open_patches(medmnist_source("nodulemnist3d", 28, root), Preprocessing(patch_zyx))
    plain = open_patches(medmnist_source("nodulemnist3d", 28, root))
    volume = plain[3][0].numpy().astype(np.float64)
    scale = [n / 28 for n in patch_zyx]
    expected = zoom(volume, scale, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(grown[3][0].numpy(), expected, atol=1.5)


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((1, 64, 64, 64), np.uint8)
    stripes[..., ::2] = 200  # finer than a patch of 24 can show: grey, not moire
    one = np.zeros((1, 1), np.uint8)
    write_npz(tmp_path, size=64, **{f"{s}_images": stripes for s in SPLITS}, **{f"{s}_labels": one for s in SPLITS})
    source = medmnist_source("nodulemnist3d", 64, tmp_path, window_hu=(0, 255))
    patches = open_patches(source, Preprocessing((24, 24, 24)))
    inner = patches[0][0, 2:-2, 2:-2, 2:-2].float()
    assert inner.mean() == pytest.approx(100, abs=2)
    assert inner.std() < 20  # the stripes themselves: 100


def test_padding_keeps_voxels_and_repeats_the_edge(root: Path) -> None:
    source = medmnist_source("nodulemnist3d", 28, root, fit="pad")
    patches = open_patches(source, Preprocessing((32, 28, 20)))
    volume = open_patches(medmnist_source("nodulemnist3d", 28, root))[5][0].numpy()
    expected = np.pad(volume, [(2, 2), (0, 0), (0, 0)], mode="edge")[:, :, 4:24]
    np.testing.assert_array_equal(patches[5][0].numpy(), expected)


def test_baselines_are_made_of_the_same_volumes(root: Path, encoder: FrozenEncoder) -> None:
    table = embed_source(encoder, medmnist_source("nodulemnist3d", 28, root), Inference(device="cpu"))
    made = baseline_tables(table, device="cpu")
    assert made["random weights"].features.shape == table.features.shape
    assert not np.allclose(made["random weights"].features, table.features)
    same = embed_source(
        raw_voxels(encoder.preprocessing), medmnist_source("nodulemnist3d", 28, root), Inference(device="cpu")
    )
    np.testing.assert_array_equal(made["raw voxels"].features, same.features)
    assert json.loads(json.dumps(table.provenance["source"]))["window_hu"] == [-1024, 400]


def test_the_fingerprint_is_of_the_file_and_of_how_it_is_read(root: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, **given: Any) -> str:
        return open_patches(medmnist_source("nodulemnist3d", 28, folder, **given)).fingerprint

    write_npz(tmp_path, train_images=np.zeros((NUM["train"], 28, 28, 28), np.uint8))
    prints = [fingerprint(root), fingerprint(tmp_path), fingerprint(root, fit="pad")]
    assert len({*prints, fingerprint(root, window_hu=(-160, 240))}) == 4
    assert fingerprint(root) == prints[0]


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"val_images": np.zeros((4, 28, 28, 28), np.float32)}, "val_images is float32"),
    "size": ({"val_images": np.zeros((4, 14, 14, 14), np.uint8)}, r"val_images is uint8 \(4, 14, 14, 14\)"),
    "flat": ({"val_labels": np.zeros(4, np.uint8)}, r"val_labels, \(4,\)"),
    "class": ({"test_labels": np.full((16, 1), 2)}, "0 to 1: is it of another data set"),
    "key": ({"test_labels": None}, "test_labels"),
    "pickle": ({"test_labels": np.array([{}] * 16, dtype=object)}, "download it again"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_not_medmnists_is_refused(tmp_path: Path, case: str) -> None:
    changed, message = BAD_FILES[case]
    write_npz(tmp_path, **changed)
    with pytest.raises(FeatureTableError, match=message):
        open_patches(medmnist_source("nodulemnist3d", 28, tmp_path))


def test_half_a_file_or_none_is_refused(tmp_path: Path) -> None:
    source = medmnist_source("nodulemnist3d", 28, tmp_path)
    with pytest.raises(FeatureTableError, match=r"nodulemnist3d\.npz: there is no such file; download=true"):
        open_patches(source)
    file = write_npz(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(FeatureTableError, match="damaged"):
        open_patches(source)
    assert medmnist_source("organmnist3d", 64)["root"] == str(Path.home() / ".medmnist")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "pathmnist"}, "nodulemnist3d, organmnist3d, adrenalmnist3d"),
        ({"size": 32}, "28, 64"),
        ({"window_hu": (400, -1024)}, "give the HU of 0 and of 255"),
        ({"fit": "crop"}, "resize, pad"),
    ],
)
def test_what_cannot_be_asked_for(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureTableError, match=message):
        medmnist_source(**{"dataset": "nodulemnist3d", "size": 28, **given})


def test_another_number_of_volumes_than_the_official_split_is_said(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_patches(medmnist_source("nodulemnist3d", 28, root))
    assert "24 volumes in train, the official split has 1158" in caplog.text


def test_the_download_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def package(**given: Any) -> None:
        asked.append(given)
        if given["size"] == 64:
            raise RuntimeError("Automatic download failed! Please download it manually")

    module = SimpleNamespace(NoduleMNIST3D=package)
    monkeypatch.setitem(sys.modules, "medmnist", ModuleType("medmnist"))
    monkeypatch.setitem(sys.modules, "medmnist.dataset", module)
    folder = tmp_path / "new"
    assert download_medmnist(medmnist_source("nodulemnist3d", 28, folder)) == folder / "nodulemnist3d.npz"
    assert asked == [{"split": "test", "root": str(folder), "size": 28, "download": True}]
    assert folder.is_dir()
    with pytest.raises(FeatureTableError, match=r"nodulemnist3d_64\.npz could not be downloaded: Automatic"):
        download_medmnist(medmnist_source("nodulemnist3d", 64, folder))
    monkeypatch.setitem(sys.modules, "medmnist.dataset", None)  # as where it is not installed
    with pytest.raises(FeatureTableError, match=r"pip install 'fmcib_ssl\[medmnist\]'; or put nodulemnist3d.npz"):
        download_medmnist(medmnist_source("nodulemnist3d", 28, folder))


@pytest.fixture
def embed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    main = runpy.run_path(str(REPO / "scripts" / "embed_medmnist.py"))["main"]

    def run(*arguments: str) -> tuple[Any, str]:
        status: Any = 0
        try:
            main(["dataset=nodulemnist3d", f"root={root}", "device=cpu", *arguments])
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_the_tables_go_into_evaluate(
    embed: Callable[..., tuple[Any, str]], encoder: FrozenEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = encoder.about["weights"]
    status, said = embed(f"checkpoint={weights}", f"output={tmp_path / 'trained.parquet'}")
    assert status == 0
    (command,) = [line.split()[2:] for line in said.splitlines() if line.startswith("next ")]
    embed("checkpoint=random", f"like={weights}", "seed=3", f"output={tmp_path / 'random.parquet'}")
    embed("checkpoint=raw_voxels", f"output={tmp_path / 'raw.parquet'}")
    kinds = {name: FeatureTable.read(tmp_path / f"{name}.parquet").provenance["kind"] for name in ("random", "raw")}
    assert kinds == {"random": "random_weights", "raw": "raw_voxels"}
    assert FeatureTable.read(tmp_path / "raw.parquet").features.shape == (44, 28**3)

    script, *settings = command
    features = ",".join(str(tmp_path / f"{name}.parquet") for name in ("trained", "random", "raw"))
    settings = [s for s in settings if not s.startswith(("features=", "output="))]
    main = runpy.run_path(str(REPO / script))["main"]
    main([*settings, f"features={features}", f"output={tmp_path / 'results'}", "num_bootstrap=50"])
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    aucs = {row["features"]: row["value"] for row in rows if row["metric"] == "AUC"}
    assert set(aucs) >= {"trained", "random", "raw"}
    assert aucs["raw"] > 0.95  # the classes are as bright as day and night
    scored = pd.read_parquet(tmp_path / "results" / "predictions.parquet")
    assert set(scored["lesion_id"]) == {f"nodulemnist3d_28/test/{number:04d}" for number in range(NUM["test"])}


def test_the_command_refuses_with_a_message(embed: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    output = f"output={tmp_path / 'features.parquet'}"
    status, _ = embed("checkpoint=raw_voxels", "size=64", output)
    assert status.startswith("error: ")
    assert "nodulemnist3d_64.npz: there is no such file" in status
    assert embed("checkpoint=random", output)[0] == 2
    status, said = embed("checkpoint=raw_voxels", "window_hu=1,x", output)
    assert status == 2
    assert "window_hu" in said


def test_the_script_does_not_hide_the_package() -> None:
    code = "import importlib.util as u; s = u.find_spec('medmnist'); print(s.origin if s else None)"
    environment = {"PYTHONPATH": str(REPO / "scripts"), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert str(REPO / "scripts") not in found.stdout
