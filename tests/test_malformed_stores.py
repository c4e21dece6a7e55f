"""Damaged stores, run folders and settings: refused in our words or used as if whole, and nothing in them is run."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pandas as pd
import pytest
from mutations import changed, damaged, harmful_pickles, seeds
from stores import as_before_check_sums, body, make_store, reseal
from tiny_runs import TINY, composed

from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.store import SCANS_FOLDER, Store, StoreError
from fmcib_ssl.training.run_folder import RunFolder, RunFolderError
from fmcib_ssl.training.settings import ConfigError, settings_of

pytestmark = pytest.mark.attack

LONGEST_S = 30.0  # of this process's computing, however busy the machine is


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    lesions = [("a", 16.0, 20.0, 20.0), ("a", 10.0, 22.0, 14.0), ("b", 15.0, 18.0, 25.0)]
    make_store(folder, {"a": body((32, 40, 40)), "b": body((32, 40, 40), seed=1)}, lesions)
    return folder


def copied(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder / "store")
    return folder / "store"


def use_all(folder: Path) -> None:
    patches = LesionPatches(Store(folder), (8, 8, 8))
    assert all(patches[lesion]["positive"].shape == (1, 8, 8, 8) for lesion in range(len(patches)))


def use(folder: Path) -> None:
    """All lesions of a store, or a refusal in our words; soon."""
    started = time.process_time()
    try:
        use_all(folder)
    except StoreError as error:
        assert str(folder) in str(error) and len(str(error)) > 20, error
    assert time.process_time() - started < LONGEST_S


FILES = ["store.json", "lesions.parquet", "scans.parquet", "scans/a.b2nd", "scans/a.cells"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [b"", bytes(100), b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_other_files(file: str, content: bytes, whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(StoreError):
        use_all(folder)


@pytest.mark.parametrize("seed", seeds(24))
def test_other_settings_of_a_store(seed: int, whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    values = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(changed(values, seed)))
    use(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"scan_id": "../../outside"},
        {"scan_id": "/etc/passwd"},
        {"scan_id": ".."},
        {"scan_id": ""},
        {"scan_id": "a/../b"},
        {"scan_id": "no such scan"},
        {"scan_id": "x" * 5000},
        {"scan_id": "a\0b"},
        {"scan_id": None},
        {"center_z": float("nan")},
        {"center_x": float("inf")},
        {"center_y": 1e300},
        {"center_y": -1e300},
        {"center_z": 2.0**63},
        {"center_z": "ten"},
        {"center_z": None},
    ],
    ids=lambda change: str(change)[:40],
)
def test_lesions_that_make_no_sense(change: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.b2nd"
    shutil.copy(whole / SCANS_FOLDER / "a.b2nd", outside)
    shutil.copy(whole / SCANS_FOLDER / "a.cells", outside.with_suffix(".cells"))
    folder = copied(whole, tmp_path)
    lesions = pd.read_parquet(folder / "lesions.parquet")
    [(column, value)] = change.items()
    lesions = lesions.astype({column: object}).assign(**{column: [value] * len(lesions)})
    lesions.to_parquet(folder / "lesions.parquet", index=False)
    reseal(folder)
    with pytest.raises(StoreError):
        use_all(folder)


def test_an_array_that_is_computed_is_not_opened(whole: Path, tmp_path: Path) -> None:
    """Blosc2 can keep an expression, or the source of a function, where an array should be."""
    folder = copied(whole, tmp_path)
    voxels = blosc2.asarray(np.ones((32, 40, 40), np.int16), urlpath=str(tmp_path / "x.b2nd"), mode="w")
    target = folder / SCANS_FOLDER / "a.b2nd"
    target.unlink()
    (voxels + 1).save(urlpath=str(target))
    as_before_check_sums(folder)
    with pytest.raises(StoreError, match="holds no voxels"):
        use_all(folder)


@pytest.mark.parametrize("name", list(harmful_pickles(Path("canary"))))
def test_pickles_in_a_store_are_not_unpickled(name: str, whole: Path, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", copied(whole, tmp_path)
    for file in FILES:
        (folder / file).write_bytes(harmful_pickles(canary)[name])
        with pytest.raises(StoreError):
            store = Store(folder)
            assert len(store.scans) and LesionPatches(store, (8, 8, 8))[0]
        shutil.copy(whole / file, folder / file)
    assert not canary.exists()


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    from omegaconf import OmegaConf

    config = composed(*TINY, "data.annotations=a.csv", "paths.run=run")
    return dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_other_settings_of_a_run(seed: int, values: dict[str, Any]) -> None:
    try:
        settings_of(changed(values, seed))
    except ConfigError as error:
        assert "not allowed" in str(error)


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_run_folder(seed: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin({}, {}, step=0)
    folder.release()
    file = tmp_path / "run.json"
    text = json.dumps(changed(json.loads(file.read_text()), seed)) if seed % 2 else ""
    file.write_bytes(text.encode() if text else damaged(file.read_bytes(), seed))
    try:
        again = RunFolder(tmp_path)
        assert isinstance(again.run_id, str)
        again.release()
    except RunFolderError as error:
        assert "damaged" in str(error) and "run=new" in str(error)
