"""Lesions are the same by what they are, not by how their files are written or called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from tiny_runs import tiny_settings

from fmcib_ssl.data.annotations import read_annotations
from fmcib_ssl.data.prepare import prepare_store
from fmcib_ssl.data.store import StoreSettings
from fmcib_ssl.training.lesions import open_lesions
from fmcib_ssl.training.settings import ConfigError


@pytest.fixture
def archive(phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(phantom_table.parent, tmp_path / "archive")
    monkeypatch.chdir(tmp_path)
    return Path("archive") / phantom_table.name


def of_table(table: Path, *overrides: str) -> str:
    return open_lesions(tiny_settings(table, Path("run"), *overrides), main_process=True)[1]


def of_store(table: Path, *overrides: str, spacing_mm: float = 1.5) -> str:
    store = Path(f"store_{spacing_mm}")
    prepare_store(read_annotations(table), store, StoreSettings(spacing_mm), num_workers=0)
    options = [f"data.store={store}", "data.annotations=null", "data.spacing_mm=null", *overrides]
    return open_lesions(tiny_settings(table, Path("run"), *options), main_process=True)[1]


def test_how_the_table_is_called_and_written_and_where_scans_lie_does_not_count(archive: Path) -> None:
    first = of_table(archive)
    assert of_table(archive.absolute()) == first
    rows = pd.read_csv(archive)
    rows.assign(note="seen twice").to_csv(archive, index=False, sep=";")
    assert of_table(archive) == first
    shutil.copytree(archive.parent, "moved")
    assert of_table(Path("moved") / archive.name) == first


@pytest.mark.parametrize("edit", ["a point", "the order", "one fewer"])
def test_which_lesions_they_are_does(edit: str, archive: Path) -> None:
    rows, before = pd.read_csv(archive), of_table(archive)
    if edit == "a point":
        rows.loc[2, "coordZ"] += 1.0
    rows = {"a point": rows, "the order": rows.iloc[::-1], "one fewer": rows.iloc[1:]}[edit]
    rows.to_csv(archive, index=False)
    assert of_table(archive) != before


def test_so_do_a_choice_of_them_and_a_stores_voxels(archive: Path) -> None:
    rows = pd.read_csv(archive)
    rows.assign(fold=[0, *[1] * (len(rows) - 1)]).to_csv(archive, index=False)
    whole = of_store(archive)
    assert len({whole, of_store(archive, "+data.select.fold=1"), of_store(archive, spacing_mm=2.0)}) == 3
    with pytest.raises(ConfigError, match=r"data\.spacing_mm=1, but .* was prepared with 1\.5"):
        of_store(archive, "data.spacing_mm=1")
