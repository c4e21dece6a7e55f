"""A store that is damaged, or contradicts itself: named when it is opened, read or looked through, and mended."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pandas as pd
import pytest
from prepared import content, run, three_scans
from stores import as_before_check_sums, body, make_store, reseal

from fmcib_ssl.data import prepare
from fmcib_ssl.data.patches import LesionPatches
from fmcib_ssl.data.scan_file import OpenScan, ScanSums
from fmcib_ssl.data.store import DamagedStoreError, Store, StoreError
from fmcib_ssl.data.store_files import verify

REPO = Path(__file__).resolve().parents[2]
#: More than one chunk, so that a head of a chunk and blocks in several lie between its bytes.
SHAPE = (40, 140, 60)


@pytest.fixture(scope="module")
def two_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lesions = [("a", 16.0, 20.0, 20.0), ("a", 10.0, 130.0, 14.0), ("b", 15.0, 18.0, 25.0)]
    folder = tmp_path_factory.mktemp("two") / "store"
    make_store(folder, {"a": body(SHAPE), "b": body(SHAPE, seed=1)}, lesions)
    return folder


@pytest.fixture
def store(two_scans: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_scans, tmp_path / "store"))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)


ZYX, YZX = [[f"center_{axis}" for axis in axes] for axes in ("zyx", "yzx")]
CHANGES: dict[str, tuple[str, str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "a lesion outside its scan": ("lesions", "outside its scan", lambda t: t.assign(center_z=[16.0, 10.0, 41.0])),
    "a lesion below its scan": ("lesions", "outside its scan", lambda t: t.assign(center_x=[20.0, -0.6, 25.0])),
    "axes exchanged": (
        "lesions",
        "outside",
        lambda t: t.rename(columns={"center_z": "center_y", "center_y": "center_z"}),
    ),
    "rows doubled": ("lesions", "duplicate lesion_id", lambda t: pd.concat([t, t])),
    "a lesion_id twice": ("lesions", "duplicate lesion_id in 1 rows", lambda t: t.assign(lesion_id=["x", "x", "y"])),
    "no such scan": ("lesions", "not in the index of scans", lambda t: t.assign(scan_id=["a", "a", "c"])),
    "scans doubled": ("scans", "duplicate scan_id a", lambda t: pd.concat([t, t])),
    "no file name": ("scans", "no file name", lambda t: t.assign(scan_id=["a", "../b"])),
    "no voxels": ("scans", r"shape_zyx has \[0, 140, 60\]", lambda t: t.assign(shape_zyx=[[0, 140, 60]] * 2)),
    "a shape of two numbers": ("scans", "shape_zyx is not three", lambda t: t.assign(shape_zyx=[[40, 140]] * 2)),
    "no shapes": ("scans", "lacks the columns 'shape_zyx'", lambda t: t.drop(columns="shape_zyx")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_contradicts_itself_is_refused_when_opened(change: str, store: Path) -> None:
    name, problem, how = CHANGES[change]
    how(pd.read_parquet(store / f"{name}.parquet")).to_parquet(store / f"{name}.parquet", index=False)
    with pytest.raises(DamagedStoreError, match=r"its digest differs"):
        LesionPatches(store, (8, 8, 8))
    reseal(store)  # as a program would that knows of digests, or an older store has none
    with pytest.raises(DamagedStoreError, match=rf"{name}\.parquet is damaged.*{problem}.*fmcib-ssl prepare again"):
        LesionPatches(store, (8, 8, 8))


def test_other_voxels_than_the_points_were_placed_in(tmp_path: Path) -> None:
    run(three_scans(tmp_path), tmp_path / "store")
    as_before_check_sums(tmp_path / "store")  # nothing but the numbers themselves tells
    assert len(LesionPatches(tmp_path / "store", (8, 8, 8))) == 4
    values = json.loads((tmp_path / "store" / "store.json").read_text())
    values["settings"]["spacing_mm"] = 1.5
    (tmp_path / "store" / "store.json").write_text(json.dumps(values))
    with pytest.raises(DamagedStoreError, match=r"voxel and point in mm differ, at 1\.5 mm"):
        LesionPatches(tmp_path / "store", (8, 8, 8))


@pytest.mark.parametrize("suffixes", [("b2nd",), ("cells",), ("b2nd", "cells", "sums")], ids=" ".join)
def test_scans_that_changed_places(suffixes: tuple[str, ...], store: Path) -> None:
    for suffix in suffixes:
        one, other = store / "scans" / f"a.{suffix}", store / "scans" / f"b.{suffix}"
        one.rename(store / "x")
        other.rename(one)
        (store / "x").rename(other)
    with pytest.raises(DamagedStoreError, match=r"a\.(b2nd|cells)"):
        LesionPatches(store, (8, 8, 8))[0]


@pytest.mark.parametrize("suffix", ["b2nd", "cells"])
def test_a_scan_of_another_shape(suffix: str, store: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "other", {"a": body((48, 40, 40))}, [("a", 16.0, 20.0, 20.0)])
    shutil.copy(tmp_path / "other" / "scans" / f"a.{suffix}", store / "scans" / f"a.{suffix}")
    as_before_check_sums(store)
    with pytest.raises(DamagedStoreError, match=r"48, 40, 40"):
        LesionPatches(store, (8, 8, 8))[0]


@pytest.mark.parametrize("file", ["scans/a.b2nd", "scans/a.cells", "scans/a.sums", "lesions.parquet", "store.json"])
def test_a_pipe_in_place_of_a_file_does_not_wait(file: str, store: Path) -> None:
    (store / file).unlink()
    os.mkfifo(store / file)
    with pytest.raises(StoreError, match="not a regular file"):
        LesionPatches(store, (8, 8, 8))[0]


def test_check_sums_that_are_lost_are_missed(store: Path) -> None:
    (store / "scans" / "a.sums").unlink()
    with pytest.raises(DamagedStoreError, match="check sums are missing"):
        LesionPatches(store, (8, 8, 8))[0]


def test_a_patch_needs_its_own_blocks_and_no_others(store: Path) -> None:
    """With Blosc2's own decoding of each block as the oracle of which voxels are whose."""
    file, sums = store / "scans" / "a.b2nd", ScanSums.open(store / "scans" / "a.sums", "a")
    hu = blosc2.open(str(file), mode="r")[:]
    rng = np.random.default_rng(0)
    blocks = np.unique(sums.blocks[sums.blocks != sums.heads[:, None]])
    assert sums.starts[0] == 0 and sums.starts[-1] == file.stat().st_size and (np.diff(sums.starts) > 0).all()
    for part in rng.choice(blocks, 6, replace=False).tolist():
        chunk, within = map(int, np.argwhere(sums.blocks == part)[0])
        start = np.array(np.unravel_index(chunk, (1, 2, 1))) * 128 + np.array(np.unravel_index(within, (4, 4, 4))) * 32
        if (start >= hu.shape).any():
            continue  # padding of the array to whole chunks
        whole = file.read_bytes()
        flip(file, int(sums.starts[part]) * 8 + int(rng.integers(8 * (sums.starts[part + 1] - sums.starts[part]))))
        scan = Store(store)
        with pytest.raises(DamagedStoreError, match=r"a\.b2nd is damaged .*check sum of its bytes"):
            scan.read_patch("a", (start + 1).tolist(), (2, 2, 2))
        for corner in np.ndindex(2, 5, 2):
            other = np.array(corner) * 32
            if (other != start).any() and (other < hu.shape).all():
                patch = scan.read_patch("a", other.tolist(), (4, 4, 4))
                np.testing.assert_array_equal(patch, hu[tuple(slice(a, a + 4) for a in other.tolist())])
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", ["air", "zeros", "noise"])
def test_sums_cover_every_byte_of_every_kind_of_chunk(kind: str, tmp_path: Path) -> None:
    """Chunks of one value stand in the index, those that do not compress are copied."""
    hu = np.full((10, 140, 30), {"air": -1024, "zeros": 0, "noise": 1}[kind], np.int16)
    if kind == "noise":
        hu = np.random.default_rng(0).integers(-32768, 32767, hu.shape).astype(np.int16)
    store = make_store(tmp_path / "store", {"a": hu}, [("a", 5.0, 135.0, 15.0)])
    file, sums = store.path / "scans" / "a.b2nd", ScanSums.open(store.path / "scans" / "a.sums", "a")
    scan = OpenScan(file, sums)
    np.testing.assert_array_equal(scan.read([(0, n) for n in hu.shape]), hu)
    needed = {0, len(sums.sums) - 1, *sums.parts_of([(0, n) for n in hu.shape])}
    padding = set(range(len(sums.sums))) - needed
    assert all(sums.starts[part + 1] - sums.starts[part] < 4096 for part in padding)  # empty blocks beyond the scan


def test_a_scan_that_is_made_anew_while_it_is_open(store: Path, tmp_path: Path) -> None:
    reader = Store(store)
    before = reader.read_patch("a", (0, 0, 0), (8, 8, 8))
    other = make_store(tmp_path / "other", {"a": body(SHAPE, seed=7)}, [("a", 16.0, 20.0, 20.0)])
    for suffix in ("b2nd", "sums"):
        (other.path / "scans" / f"a.{suffix}").replace(store / "scans" / f"a.{suffix}")
    after = reader.read_patch("a", (0, 0, 0), (8, 8, 8))
    assert (after == body(SHAPE, seed=7)[:8, :8, :8]).all() and (after != before).any()


def test_a_reader_keeps_few_files_open(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(12)]
    reader = make_store(tmp_path / "store", {name: body((20, 20, 20)) for name in names}, [(names[0], 9.0, 9.0, 9.0)])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in names:
        reader.read_patch(name, (0, 0, 0), (8, 8, 8))
        reader.coarse_map(name)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


@pytest.mark.parametrize("suffix", ["b2nd", "cells", "sums"])
def test_training_stops_or_lets_another_lesion_stand_in(suffix: str, store: Path) -> None:
    size = (store / "scans" / f"a.{suffix}").stat().st_size
    flip(store / "scans" / f"a.{suffix}", 8 * size - 20)  # in the index, so every patch of the scan meets it
    with pytest.raises(DamagedStoreError, match=r"a\.(b2nd|cells).*lesion a, row 1"):
        LesionPatches(store, (8, 8, 8))[0]
    with pytest.warns(UserWarning, match=r"Skipping lesions of a damaged scan: .*a\.(b2nd|cells)"):
        patches = LesionPatches(store, (8, 8, 8), on_bad_row="skip")
        sample = patches[0]
    assert sample["lesion"] == 2 and not sample["negative_from_other_scan"]
    assert (sample["positive"] == LesionPatches(store, (8, 8, 8))[2]["positive"]).all()


def test_every_scan_is_damaged(store: Path) -> None:
    for scan in "ab":
        flip(store / "scans" / f"{scan}.cells", 500)
    with pytest.warns(UserWarning, match="Skipping"), pytest.raises(StoreError, match="every one of its scans"):
        LesionPatches(store, (8, 8, 8), on_bad_row="skip")[0]


FILES = [
    "scans/*.b2nd",
    "scans/*.cells",
    "scans/*.sums",
    "scans/*.json",
    "lesions.parquet",
    "scans.parquet",
    "store.json",
]


@pytest.mark.parametrize("pattern", FILES)
def test_verify_names_a_damaged_file_and_prepare_mends_it(pattern: str, tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    whole = content(tmp_path / "store")
    assert verify(tmp_path / "store") == (3, {})
    assert content(tmp_path / "store") == whole  # looking changes nothing
    file = sorted((tmp_path / "store").glob(pattern))[0]
    flip(file, 4 * file.stat().st_size)
    _, damaged = verify(tmp_path / "store")
    assert len(damaged) == 1 and file.name.partition(".")[0] in str(damaged)
    summary = run(table, tmp_path / "store")
    assert summary.num_made == ("scans/" in pattern)  # the others are kept as they are
    assert content(tmp_path / "store") == whole


def test_a_damaged_scan_whose_source_is_gone_is_named_and_its_files_stay(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    scan_id = Store(tmp_path / "store").scans.index[0]
    file = tmp_path / "store" / "scans" / f"{scan_id}.b2nd"
    flip(file, 4 * file.stat().st_size)
    (tmp_path / "a.nrrd").unlink()
    summary = run(table, tmp_path / "store")
    assert summary.num_rejected_scans == 1 and file.is_file()
    assert len(Store(tmp_path / "store").lesions) == 2


def test_a_store_from_before_check_sums_is_read_and_given_them(tmp_path: Path) -> None:
    table = three_scans(tmp_path)
    run(table, tmp_path / "store")
    whole = content(tmp_path / "store")
    as_before_check_sums(tmp_path / "store")
    old = LesionPatches(tmp_path / "store", (8, 8, 8))[0]["positive"]
    assert verify(tmp_path / "store")[1] == {
        "store.json": "it is of an earlier version, and its scans have no check sums"
    }
    assert run(table, tmp_path / "store").num_made == 0
    assert (LesionPatches(tmp_path / "store", (8, 8, 8))[0]["positive"] == old).all()
    assert content(tmp_path / "store") == whole
    as_before_check_sums(tmp_path / "store")
    run(table, tmp_path / "store", merge=True)
    assert content(tmp_path / "store") == whole
    as_before_check_sums(tmp_path / "store")
    file = sorted((tmp_path / "store" / "scans").glob("*.b2nd"))[0]
    file.write_bytes(file.read_bytes()[:-40] + bytes(40))
    assert run(table, tmp_path / "store").num_made == 1  # what cannot be decoded is made anew
    assert content(tmp_path / "store") == whole


def test_a_scan_that_is_rewritten_while_the_store_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, prepare_scan = three_scans(tmp_path), prepare.prepare_scan

    def rewriting(*arguments: Any) -> Any:
        problem = prepare_scan(*arguments)
        if arguments[-1].scan.source.path.name == "b.nrrd":
            shutil.copy(tmp_path / "c.nrrd", tmp_path / "b.nrrd")
        return problem

    monkeypatch.setattr(prepare, "prepare_scan", rewriting)
    summary = run(table, tmp_path / "store")
    assert summary.rejected["reason"].tolist() == ["its files have changed while the store was made"]
    assert summary.num_lesions == 3 and summary.rejected["row"].tolist() == [2]
    monkeypatch.undo()
    again = run(table, tmp_path / "store")
    assert again.num_made == 1 and again.num_lesions == 4 and not len(again.rejected)


@pytest.mark.parametrize(
    ("file", "text"),
    [("scans/patient.nii.gz", ""), (".notes.tmp", ""), ("store.json", '{"version": 1, "name": "a shop"}')],
)
def test_a_folder_of_others_is_left_as_it_is(file: str, text: str, tmp_path: Path) -> None:
    (folder := tmp_path / "other" / "scans").mkdir(parents=True)
    (folder / ".half.tmp").write_text("theirs")
    (tmp_path / "other" / file).write_text('{"version": 1, "name": "a shop"}')
    before = content(tmp_path / "other")
    with pytest.raises(StoreError, match=r"is not a store and not empty|store\.json is damaged"):
        run(three_scans(tmp_path), tmp_path / "other")
    assert content(tmp_path / "other") == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(REPO / "scripts" / "prepare.py"))["main"]
    run(three_scans(tmp_path), tmp_path / "store")
    main([f"verify={tmp_path / 'store'}"])
    assert "every file is as it was written" in capsys.readouterr().out
    file = sorted((tmp_path / "store" / "scans").glob("*.cells"))[0]
    flip(file, 300)
    with pytest.raises(SystemExit) as end:
        main([f"verify={tmp_path / 'store'}"])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and f"damaged   scans/{file.stem}: the check sum" in printed and "again" in printed
    with pytest.raises(SystemExit, match="is not a store"):
        main([f"verify={tmp_path}"])
    with pytest.raises(SystemExit):
        main([f"verify={tmp_path / 'store'}", "merge=true"])
    assert "stands alone" in capsys.readouterr().err
