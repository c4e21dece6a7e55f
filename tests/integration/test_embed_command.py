"""`scripts/embed.py` as a user runs it."""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import NUM_SCANS, REPO, tiny_settings

import fmcib_ssl
from fmcib_ssl.data import LesionPatches, importers
from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.models import export_encoder, small_resnet
from fmcib_ssl.run import pretrain
from fmcib_ssl.types import Preprocessing

SMALL = {"_target_": "fmcib_ssl.models.encoders.small_resnet"}


SCRIPT = REPO / "scripts" / "embed.py"


class Result(NamedTuple):
    """How a command ended."""

    status: int | str | None
    out: str
    err: str


Embed = Callable[..., Result]


@pytest.fixture
def embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Embed:
    """The command in this process, in an empty folder; `environment` is what a launcher sets."""
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, environment: dict[str, str] | None = None) -> Result:
        status: int | str | None = 0
        with monkeypatch.context() as patch:
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            try:
                main([*arguments, "device=cpu"])
            except SystemExit as end:
                status = end.code
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


def embed_apart(folder: Path, *arguments: str, start: tuple[str, ...] = (str(SCRIPT),)) -> str:
    """The command in a process of its own; gives what it prints."""
    result = subprocess.run(
        [sys.executable, *start, *arguments, "device=cpu"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def store(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "store"
    prepare_store(read_annotations(phantom_table), folder, num_workers=0)  # at 1 mm, as the encoders of these tests
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    export_encoder(small_resnet(), SMALL, Preprocessing((16, 16, 16)), file)
    return file


def test_a_run_its_checkpoint_and_its_export(
    embed: Embed, phantom_table: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training with repeated edges, then embedding as it says: from its folder, finished or not, and both files."""
    run = tmp_path / "run"
    options = ("encoder=small", "trainer.max_steps=1", "data.batch_size=2", f"data.store={store}", "data.padding=edge")
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        pretrain(tiny_settings(phantom_table, run, *options))
    assert "done       1 steps, loss " in caplog.text
    assert f"fmcib-ssl embed checkpoint={run} store={store} output={run / 'features.parquet'}" in caplog.text
    (tmp_path / "unfinished").mkdir()
    for name in ("checkpoints", "run.json"):
        (tmp_path / "unfinished" / name).symlink_to(run / name)
    tables = {}
    for source, message in (
        ("run/encoder.safetensors", "a second"),
        ("run/checkpoints/last.ckpt", "a second"),
        ("run", "lesions"),
        ("unfinished", "after 1 steps"),
    ):
        result = embed(f"checkpoint={source}", f"store={store}", "output=f.parquet", "restart=true")
        assert result.status == 0 and message in result.out + caplog.text, result.status
        tables[source] = FeatureTable.read(tmp_path / "f.parquet")
    export, checkpoint, finished, unfinished = tables.values()
    for table, weights in ((checkpoint, checkpoint), (finished, export), (unfinished, checkpoint)):
        np.testing.assert_array_equal(table.features, export.features)
        assert table.provenance["sha256"] == weights.provenance["sha256"]
        assert table.provenance["preprocessing"]["padding"] == "edge"
    result = embed("checkpoint=.", f"store={store}", "output=none.parquet")
    assert "no folder of a run" in str(result.status) and "run.json" in str(result.status)

    encoder = fmcib_ssl.load_encoder(run / "encoder.safetensors")
    patches = LesionPatches(store, encoder.preprocessing.patch_size_zyx, padding="edge")  # type: ignore[union-attr]
    hu = torch.stack([patches.positive(i) for i in range(len(patches))])
    with torch.no_grad():
        expected = encoder(encoder.preprocessing.normalize(hu)).numpy()  # type: ignore[operator, union-attr]
    np.testing.assert_allclose(export.features, expected, rtol=1e-4, atol=1e-6)
    assert export.lesions["PatientID"].nunique() == NUM_SCANS
    assert set(pd.read_csv(phantom_table)) <= set(export.lesions)


@pytest.mark.parametrize(
    "environments",
    [
        [{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}],
        [{"SLURM_PROCID": str(k), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"} for k in range(2)],
    ],
    ids=["torchrun", "srun"],
)
def test_processes_of_a_launcher(
    embed: Embed, store: Path, weights: Path, tmp_path: Path, environments: list[dict[str, str]]
) -> None:
    """One shard is all that so small a table has; a process without one says so, and spoils nothing."""
    one = [f"weights={weights}", f"store={store}"]
    assert embed(*one, "out=one.parquet").status == 0
    last, first = (embed(*one, "out=two.parquet", environment=e) for e in reversed(environments))
    assert last.status == first.status == 0
    assert "are with other processes" in last.out and "features  two.parquet" in first.out
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_baselines_by_name(embed: Embed, store: Path, weights: Path, tmp_path: Path) -> None:
    shared = (f"store={store}", "select={PatientID: [phantom_0000, phantom_0001]}")
    commands = {
        "random": ("weights=random", f"like={weights}", "seed=3"),
        "voxels": ("weights=raw_voxels", f"like={weights}"),
        "statistics": ("weights=hu_statistics", f"like={weights}"),
    }
    for name, arguments in commands.items():
        result = embed(*arguments, *shared, f"out={name}.parquet")
        assert result.status == 0, result.status
    random, voxels, statistics = (FeatureTable.read(tmp_path / f"{name}.parquet") for name in commands)
    assert set(random.lesions["PatientID"]) == {"phantom_0000", "phantom_0001"}
    assert random.provenance["kind"] == "random_weights" and voxels.provenance["kind"] == "raw_voxels"
    assert voxels.features.shape == (len(random), 16**3)
    assert random.provenance["seed"] == 3
    assert statistics.features.shape == (len(random), 230)


@pytest.mark.slow
def test_a_store_needs_no_reader_of_scans(store: Path, weights: Path, tmp_path: Path) -> None:
    without = (
        f"import sys, runpy; sys.modules['SimpleITK'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    embed_apart(tmp_path, f"weights={weights}", f"store={store}", "out=f.parquet", start=("-c", without))


REFUSED = [
    ("out=f.parquet store=s", 2, "checkpoint is missing"),
    ("weights=w.safetensors out=f.parquet", 2, "store=DIR or annotations=FILE.csv"),
    ("weights=w.safetensors out=f.parquet store=s annotations=t.csv", 2, "store=DIR or annotations=FILE.csv"),
    ("weights=random store=s out=f.parquet", 2, "like="),
    ("weights=raw_voxels store=s out=f.parquet", 2, "whose network and patches"),
    ("weights=w.safetensors store=s out=f.parquet views=3", 2, "views"),
    ("weights=w.safetensors checkpoint=w.ckpt store=s out=f.parquet", 2, "given twice"),
    ("weights=w.safetensors store=s out=f.parquet shard=3/2", 2, "shard=3/2: there are 2 parts"),
    ("weights=w.safetensors store=s out=f.parquet precison=bf16", 2, "do you mean 'precision'"),
    ("weights=absent.safetensors store=s out=f.parquet", 1, "there is no such file"),
]


@pytest.mark.parametrize(("line", "status", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_cannot_be_is_refused(embed: Embed, line: str, status: int, message: str, tmp_path: Path) -> None:
    result = embed(*line.split())
    said = result.err + str(result.status)
    assert message in said
    assert result.status == 2 if status == 2 else said.endswith(str(result.status)) and "error: " in said
    assert list(tmp_path.iterdir()) == []


def test_real_nodules_as_a_user_would(embed: Embed, real_data: Path, weights: Path, tmp_path: Path) -> None:
    """Two whole CTs, and nodules that come as a file each, from their table and from a store."""
    crops = real_data / "lidc_crops"
    importers.lidc_crops(crops / "voi_index.csv").iloc[:8].to_csv(tmp_path / "lidc.csv", index=False)
    prepare_store(read_annotations(tmp_path / "lidc.csv", crops), tmp_path / "store", image_root=crops, num_workers=0)
    sources = {
        "store": ("store=store",),
        "files": ("annotations=lidc.csv", f"image_root={crops}"),
        "scans": (f"annotations={real_data / 'ct' / 'annotations.csv'}", f"image_root={real_data}"),
    }
    tables = {}
    for name, arguments in sources.items():
        result = embed(f"weights={weights}", *arguments, f"out={name}.parquet")
        assert result.status == 0, result.status
        tables[name] = FeatureTable.read(tmp_path / f"{name}.parquet")
    assert [len(table) for table in tables.values()] == [8, 8, 2]
    stored = tables["store"].aligned(tables["files"].lesions["lesion_id"])
    np.testing.assert_allclose(stored.features, tables["files"].features, rtol=1e-4, atol=1e-6)
    assert stored.lesions["malignancy"].tolist() == pd.read_csv(tmp_path / "lidc.csv")["malignancy"].tolist()
