"""A second run on a store, several at once, and whatever goes wrong: what is done again, rejected or refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from prepared import (
    claimed_by_another_process,
    content,
    decoded,
    direct_patch,
    run,
    scan_image,
    store_patch,
    three_scans,
    write_table,
)

from fmcib_ssl.data import prepare, prepare_scan, store_files
from fmcib_ssl.data.annotations import BadRowsError, read_annotations
from fmcib_ssl.data.scans import read_scan
from fmcib_ssl.data.store import Store, StoreError, StoreSettings, read_settings_file
from fmcib_ssl.data.store_files import claim_store


def test_names_outlive_a_move_of_the_archive(tmp_path: Path) -> None:
    for root in ("here", "there"):
        (tmp_path / root / "deep").mkdir(parents=True)
        sitk.WriteImage(scan_image(), str(tmp_path / root / "deep" / "a.nrrd"))
    write_table(tmp_path, ["deep/a.nrrd,1,2,3"])
    stores = []
    for root in ("here", "there"):
        table = read_annotations(tmp_path / "lesions.csv", image_root=tmp_path / root)
        run(table, tmp_path / f"store of {root}", image_root=tmp_path / root)
        stores.append(Store(tmp_path / f"store of {root}").lesions[["lesion_id", "scan_id"]])
    pd.testing.assert_frame_equal(stores[0], stores[1])


def test_the_second_run_reads_no_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = three_scans(tmp_path)
    first = run(table, tmp_path / "store")
    before = content(tmp_path / "store")

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a finished scan is opened")

    monkeypatch.setattr(prepare_scan, "read_scan", refuse)
    monkeypatch.setattr(prepare, "check_annotations", refuse)
    again = run(table, tmp_path / "store")
    assert (first.num_made, again.num_made, again.num_scans, again.num_lesions) == (3, 0, 3, 4)
    assert content(tmp_path / "store") == before


def test_a_changed_source_is_made_anew_and_a_touched_one_is_not(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    patches = [store_patch(Store(tmp_path / "store"), i) for i in range(4)]
    sitk.WriteImage(scan_image(99), str(tmp_path / "b.nrrd"))  # other voxels, the same size
    os.utime(tmp_path / "a.nrrd")
    assert run(table, tmp_path / "store").num_made == 1
    decoded.cache_clear()
    store = Store(tmp_path / "store")
    assert [np.array_equal(store_patch(store, i), patches[i]) for i in range(4)] == [True, False, True, True]
    assert np.abs(store_patch(store, 1).astype(int) - direct_patch(store, 1, table.scan_of(1))).max() <= 1
    assert run(table, tmp_path / "store").num_made == 0
    (tmp_path / "c.nrrd").rename(tmp_path / "to tape.nrrd")
    assert run(table, tmp_path / "store").num_lesions == 4  # a source that is gone is no reason to lose a scan

    sitk.WriteImage(scan_image(0), str(tmp_path / "a.mhd"))
    table, header = write_table(tmp_path, ["a.mhd,1,2,3"]), (tmp_path / "a.mhd").read_bytes()
    run(table, tmp_path / "store")
    sitk.WriteImage(scan_image(1), str(tmp_path / "a.mhd"))  # its voxels are in another file
    assert (tmp_path / "a.mhd").read_bytes() == header
    assert run(table, tmp_path / "store").num_made == 1


def test_changed_rows_change_the_index_and_no_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(three_scans(tmp_path), tmp_path / "store")
    monkeypatch.setattr(prepare_scan, "read_scan", None)
    table = write_table(tmp_path, ["b.nrrd,-4,0,5", "a.nrrd,1,2,4", "a.nrrd,999,0,0"])
    summary = run(table, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert (summary.num_made, summary.num_scans, summary.num_lesions) == (0, 2, 2)
    assert store.lesions["coordZ"].tolist() == [5, 4]
    assert len(store.scans) == 2
    assert summary.rejected["row"].tolist() == [3]


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    with pytest.raises(StoreError, match=r"other settings \(spacing_mm=1.0, not 2.0\): use the same"):
        run(table, tmp_path / "store", settings=StoreSettings(2.0))
    with pytest.raises(StoreError, match=r"not a store and not empty \(it has 'a.nrrd'\): choose another"):
        run(table, tmp_path)
    with pytest.raises(StoreError, match=r"lesions.csv.* cannot be written: .*choose another store=DIR"):
        run(table, tmp_path / "lesions.csv")


def test_shards_and_merge_give_what_one_run_gives(tmp_path: Path) -> None:
    for seed in range(7):
        sitk.WriteImage(scan_image(seed, (12, 12, 12)), str(tmp_path / f"{seed}.nrrd"))
    rows = [f"{i % 8}.nrrd,{i},0,0" for i in range(5)] + ["5.nrrd,0,0,0", "6.nrrd,500,0,0", "7.nrrd,0,0,0", ",1,2,3"]
    table = write_table(tmp_path, rows)
    whole = run(table, tmp_path / "whole")
    shards = [run(table, tmp_path / "parts", shard=(i, 3)) for i in (1, 2)]
    with pytest.raises(StoreError, match=r"is not complete.*merge=true"):
        Store(tmp_path / "parts")
    with pytest.raises(StoreError, match=r"(?s)\d of 8 scans are not finished:.*not prepared\nRun their shards again"):
        run(table, tmp_path / "parts", merge=True)
    shards.append(run(table, tmp_path / "parts", shard=(3, 3)))
    assert sum(shard.num_scans for shard in shards) == whole.num_scans == 8
    merged = run(table, tmp_path / "parts", merge=True)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert (merged.num_lesions, merged.num_rejected_scans) == (6, 2) == (whole.num_lesions, whole.num_rejected_scans)
    pd.testing.assert_frame_equal(merged.rejected, whole.rejected)
    assert whole.rejected["row"].tolist() == [7, 8, 9]

    sitk.WriteImage(scan_image(50, (12, 12, 12)), str(tmp_path / "0.nrrd"))
    with pytest.raises(StoreError, match=r"1 of 8 scans are not finished:\n.*0\.nrrd: its files have changed"):
        run(table, tmp_path / "parts", merge=True)
    with pytest.raises(StoreError, match=r"shard=4/3: the first of 3 is 1/3, there is no 4"):
        run(table, tmp_path / "parts", shard=(4, 3))


def test_two_runs_on_one_store_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_files, "PATIENCE_S", 0.0)
    table, store = three_scans(tmp_path), tmp_path / "store"
    with claimed_by_another_process(store) as process:
        for shard in (None, (1, 2)):
            with pytest.raises(StoreError, match=rf"being written by another run \(process {process} on"):
                run(table, store, shard=shard)
    with claimed_by_another_process(store, (1, 2)):
        with pytest.raises(StoreError, match="being written by another run"):
            run(table, store, shard=(1, 2))
        with pytest.raises(StoreError, match="being written by another run"):
            run(table, store, merge=True)
        run(table, store, shard=(2, 2))
    run(table, store)


def test_another_shard_is_just_writing_the_settings(tmp_path: Path) -> None:
    """Shards of a job array start at the same moment; the file is renamed when it is whole."""
    (tmp_path / ".store.json.7958.tmp").write_text('{"sett')
    with claim_store(tmp_path, StoreSettings(), (1, 3)):
        about = read_settings_file(tmp_path)
    assert not about["complete"]


def test_bad_rows_may_refuse_the_whole_table(tmp_path: Path) -> None:
    three_scans(tmp_path)
    table = write_table(tmp_path, ["a.nrrd,1,2,3", "nothing.nrrd,0,0,0", ",1,1,1"])
    with pytest.raises(BadRowsError, match=r"(?s)2 of 3 rows.*row 2: nothing.nrrd.*row 3.*image_path is empty"):
        run(table, tmp_path / "store", on_bad_row="refuse")
    assert pd.read_csv(tmp_path / "store" / "rejected.csv")["row"].tolist() == [2, 3]
    assert not list((tmp_path / "store" / "scans").iterdir())
    with pytest.raises(BadRowsError, match=r"no row can be used; see .*rejected\.csv"):
        run(write_table(tmp_path, ["nothing.nrrd,0,0,0"]), tmp_path / "store")
    assert len(pd.read_csv(tmp_path / "store" / "rejected.csv")) == 1


def test_whatever_a_scan_does_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = three_scans(tmp_path)
    errors = {"a.nrrd": MemoryError(), "b.nrrd": ZeroDivisionError("from some library")}

    def read(path: Path, *args: Any, **options: Any) -> Any:
        if path.name in errors:
            raise errors[path.name]
        return read_scan(path, *args, **options)

    monkeypatch.setattr(prepare_scan, "read_scan", read)
    summary = run(table, tmp_path / "store")
    assert (summary.num_made, summary.num_rejected_scans, summary.num_lesions) == (1, 2, 1)
    reasons = dict(zip(summary.rejected["row"], summary.rejected["reason"], strict=True))
    assert set(reasons) == {1, 2, 3}
    assert "more memory than there is" in reasons[1]
    assert "ZeroDivisionError: from some library" in reasons[2]
    errors.clear()  # the next night
    summary = run(table, tmp_path / "store")
    assert (summary.num_made, summary.num_rejected_scans, summary.num_lesions) == (2, 0, 4)
    assert not list((tmp_path / "store" / "scans").glob("*.rejected.json"))


def test_a_full_disk_stops_the_run_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, store = three_scans(tmp_path), tmp_path / "store"
    fsync = os.fsync

    def full_after_one_scan(descriptor: int) -> None:
        if list((store / "scans").glob("*.json")):
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full_after_one_scan)
    with pytest.raises(StoreError, match="cannot be written: No space left on device; make room, then run"):
        run(table, store)
    finished = list((store / "scans").glob("*.json"))
    assert len(finished) == 1
    monkeypatch.undo()
    assert run(table, store).num_made == 2
    assert not list(store.rglob("*.tmp"))


def write_bad_inputs(folder: Path) -> dict[str, str]:
    """Files that are bad in several ways (more of them: test_odd_scans.py), and what is to be said of each."""
    hu = sitk.GetArrayFromImage(scan_image())
    with_nan = hu.astype(np.float32)
    with_nan[3, 4, 5] = np.nan
    for name, values in {"nan.nrrd": with_nan, "mr.nrrd": np.abs(hu), "flat.nii": hu[0]}.items():
        sitk.WriteImage(sitk.GetImageFromArray(values), str(folder / name))
    sitk.WriteImage(scan_image(), str(folder / "good.nii.gz"))
    whole = (folder / "good.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii.gz").touch()
    (folder / "no slices").mkdir()
    return {
        "missing.nii.gz": "cannot be opened: No such file",
        "truncated.nii.gz": "cut off or damaged",
        "empty.nii.gz": r"is empty \(0 bytes\)",
        "flat.nii": "is a 2D image",
        "nan.nrrd": "NaN or Inf",
        "mr.nrrd": "not CT in HU",
        "no slices": "without DICOM slices",
    }


def test_every_bad_input_is_named_with_row_file_and_remedy(tmp_path: Path) -> None:
    expected = write_bad_inputs(tmp_path)
    rows = [f"{name},0,0,0" for name in expected]
    outside, doubled, text, nan = (len(rows) + k for k in (2, 3, 4, 5))
    rows += [
        "good.nii.gz,0,0,0",
        "good.nii.gz,0,0,80",
        "good.nii.gz,0,0,0",
        'good.nii.gz,"1,5",0,0',
        "good.nii.gz,0,,0",
    ]
    summary = run(write_table(tmp_path, rows), tmp_path / "store")
    assert summary.num_lesions == 1
    written = pd.read_csv(tmp_path / "store" / "rejected.csv").set_index("row")
    assert written.index.tolist() == [row for row in range(1, len(rows) + 1) if row != outside - 1]
    for row, (name, reason) in enumerate(expected.items(), start=1):
        assert written["image_path"][row] == name
        assert str(tmp_path / name) == written["value"][row]
        assert re.search(reason, written["reason"][row]), (name, written["reason"][row])
    assert "62.0 mm outside the scan" in written["reason"][outside]
    assert "same scan and point as row" in written["reason"][doubled]
    assert "is not a finite number" in written["reason"][text]
    assert "is missing" in written["reason"][nan]
    assert written["remedy"].str.len().min() > 10
    assert Store(tmp_path / "store").lesions["row"].tolist() == [outside - 1]
