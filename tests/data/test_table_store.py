"""A table gets a store of its own: once, found again, brought up to date, by one process at a time."""

from __future__ import annotations

import logging
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import SimpleITK as sitk
from prepared import claimed_by_another_process, scan_image, three_scans

from fmcib_ssl.data import prepare
from fmcib_ssl.data.annotations import BadRowsError
from fmcib_ssl.data.prepare import store_for_table
from fmcib_ssl.data.store import Store, StoreError, StoreSettings


def test_once_and_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = three_scans(tmp_path).source
    with caplog.at_level(logging.INFO):
        first = store_for_table(table, tmp_path / "stores", StoreSettings())
    assert first.num_made == 3 and first.store.parent == tmp_path / "stores" and first.store.name.startswith("lesions-")
    assert f"preparing 3 scans: about 0.1 MB in {first.store}, a minute or less in 1 processes" in caplog.text
    again = store_for_table(table, tmp_path / "stores", StoreSettings())
    assert (again.store, again.num_made, again.num_lesions) == (first.store, 0, 4)
    assert store_for_table(table, tmp_path / "stores", StoreSettings(2.0)).store != first.store


def test_an_edited_table_brings_its_store_up_to_date(tmp_path: Path) -> None:
    table = three_scans(tmp_path).source
    store_for_table(table, tmp_path / "stores", StoreSettings())
    rows = pd.read_csv(table)
    sitk.WriteImage(scan_image(5), str(tmp_path / "d.nrrd"))
    pd.concat([rows.iloc[1:], rows.iloc[:1].assign(image_path="d.nrrd")]).assign(label=1).to_csv(table, index=False)
    summary = store_for_table(table, tmp_path / "stores", StoreSettings())
    assert (summary.num_made, summary.num_lesions) == (1, 4)
    assert Store(summary.store).lesions["label"].tolist() == [1] * 4


def test_bad_rows_are_refused_or_left_out(tmp_path: Path) -> None:
    """Also those that only decoding shows; what is good is kept for the next start."""
    table = three_scans(tmp_path).source
    sitk.WriteImage(sitk.Image([9, 9, 9], sitk.sitkInt16) - 1000, str(tmp_path / "c.nrrd"))  # constant, no CT
    with pytest.raises(BadRowsError, match=r"(?s)1 of 4 rows cannot be used.*c\.nrrd.*on_bad_row=skip") as caught:
        store_for_table(table, tmp_path / "stores", StoreSettings(), on_bad_row="refuse")
    assert caught.value.rejected is not None and caught.value.rejected["row"].tolist() == [4]
    summary = store_for_table(table, tmp_path / "stores", StoreSettings())
    assert (summary.num_made, summary.num_lesions, summary.rejected["row"].tolist()) == (0, 3, [4])


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _folder: usage(1000))
    with pytest.raises(StoreError, match=r"needs about 0\.1 MB for 3 scans, and its disk has 0\.0 GB free: make room"):
        store_for_table(three_scans(tmp_path).source, tmp_path / "stores", StoreSettings())


def made(table: Path) -> int:
    return store_for_table(table, table.parent / "stores", StoreSettings()).num_made


def test_a_run_at_work_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fmcib_ssl.data import store_files

    monkeypatch.setattr(store_files, "PATIENCE_S", 0.0)
    table = three_scans(tmp_path).source
    store = store_for_table(table, tmp_path / "stores", StoreSettings()).store
    with ThreadPoolExecutor() as pool, caplog.at_level(logging.INFO):
        with claimed_by_another_process(store) as process:
            waiting = pool.submit(made, table)
            while f"prepares {store} (process {process} on" not in caplog.text:
                assert not waiting.done()
        assert waiting.result() == 0
