"""The commands as they are typed, and as they are killed."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from prepared import content

from fmcib_ssl.data import annotations
from fmcib_ssl.data.store import Store
from fmcib_ssl.evaluation import report

REPO = Path(__file__).resolve().parents[2]


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPO / "scripts" / script), *map(str, arguments)]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(script, *arguments), capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scans of some size, a row that is bad, all under a path with blanks and umlauts."""
    folder = tmp_path_factory.mktemp("scans") / "Ärchive of scans"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        hu = rng.integers(-1000, 400, (60, 120, 120)).astype(np.int16)
        image = sitk.GetImageFromArray(hu)
        image.SetSpacing((1.5, 1.5, 3.0))
        sitk.WriteImage(image, str(folder / f"scan {number}.nii.gz"))
    rows = [f"scan {number}.nii.gz,90,90,{30 * number}" for number in range(6)] + ["scan 9.nii.gz,1,1,1"]
    (folder / "lesions.csv").write_text("\n".join(["image_path,coordX,coordY,coordZ", *rows]))
    return folder


@pytest.fixture(scope="module")
def prepared(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store made without interruption, and what was printed."""
    store = tmp_path_factory.mktemp("stores") / "störe 1"
    return store, run("prepare.py", f"annotations={archive / 'lesions.csv'}", f"store={store}", "num_workers=2")


def finished(store: Path) -> list[Path]:
    return [p for p in store.glob("scans/*.json") if not p.name.endswith(".rejected.json")]


def index_and_scans(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(store).items() if not name.startswith("contact_sheet")}


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 250
    while not condition() and time.monotonic() < until:
        time.sleep(0.002)
    assert condition()


def test_prepare_with_its_page(prepared: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    store, ended = prepared
    assert ended.returncode == 0, ended.stderr
    assert "scans     6 of 7 finished, 6 of them now" in ended.stdout
    assert "rejected  1 rows; scans as a whole: 1" in ended.stdout
    assert "Preparing: 100%" in ended.stderr
    assert len(Store(store).lesions) == 6
    page = (store / "contact_sheet.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "scan 9.nii.gz" in page
    assert (store / "contact_sheet.png").stat().st_size > 20_000
    assert pd.read_csv(store / "rejected.csv")["row"].tolist() == [7]


def test_killed_at_any_moment_the_same_command_goes_on(
    archive: Path, tmp_path: Path, prepared: tuple[Path, object]
) -> None:
    store = tmp_path / "store"
    arguments = (f"annotations={archive / 'lesions.csv'}", f"store={store}", "sheet_lesions=0", "num_workers=1")
    process = subprocess.Popen(command("prepare.py", *arguments), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(finished(store)) >= 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it was in the middle
    before = len(finished(store))
    ended = run("prepare.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert f"6 of 7 finished, {6 - before} of them now" in ended.stdout
    assert index_and_scans(store) == index_and_scans(prepared[0])


def test_ctrl_c_ends_it_quietly(archive: Path, tmp_path: Path) -> None:
    arguments = (f"annotations={archive / 'lesions.csv'}", f"store={tmp_path / 'store'}", "num_workers=1")
    process = subprocess.Popen(
        command("prepare.py", *arguments),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it runs in the background deaf to Ctrl-C, and the tests may run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    wait_for(lambda: finished(tmp_path / "store"))
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the workers as well
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 130, errors
    assert "stopped; the same command resumes" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_check_data_shows_the_same_without_a_store(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "checked"
    ended = run("check_data.py", f"annotations={archive / 'lesions.csv'}", f"output={out}", "sheet_lesions=2")
    assert ended.returncode == 0, ended.stderr
    assert "rows      6 of 7 can be used, in 6 scans" in ended.stdout
    points = pd.read_csv(out / "coordinates.csv")
    np.testing.assert_allclose(points[["file_i", "file_j", "file_k"]].to_numpy() * (1.5, 1.5, 3.0),
                               points[["x_lps_mm", "y_lps_mm", "z_lps_mm"]], atol=0.02)  # fmt: skip
    assert pd.read_csv(out / "rejected.csv")["row"].tolist() == [7]
    scans = pd.read_csv(out / "scans.csv")
    assert (scans["hu_min"].tolist(), scans["size_xyz"].tolist()) == ([-1000] * 6, ["120 x 120 x 60"] * 6)
    assert {p.name for p in out.iterdir()} == {
        "rejected.csv", "coordinates.csv", "scans.csv", "contact_sheet.png", "contact_sheet.html",
        "checked_scans.jsonl",
    }  # fmt: skip


def test_check_data_resumes(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A usable scan is read once, unless an interrupt tore its line, or its file changed."""
    folder, out = Path(shutil.copytree(archive, tmp_path / "scans")), tmp_path / "out"
    main = runpy.run_path(str(REPO / "scripts" / "check_data.py"))["main"]
    read_scan, read = annotations.read_scan, list[str]()

    def reading(path: Path, *options: object) -> object:
        read.append(path.name)
        if len(read) == stop_at:
            raise KeyboardInterrupt
        return read_scan(path, *options)

    def names_read() -> list[str]:
        read.clear()
        main([f"annotations={folder / 'lesions.csv'}", f"output={out}", "sheet_lesions=0", "num_workers=0"])
        return [*read]

    monkeypatch.setattr(annotations, "read_scan", reading)
    usable, rejected = [f"scan {number}.nii.gz" for number in range(6)], "scan 9.nii.gz"
    stop_at = 3
    with pytest.raises(SystemExit, match="130"):
        names_read()
    assert "the same command resumes" in capsys.readouterr().err
    stop_at = 0
    assert names_read() == [*usable[2:], rejected]
    scans, lines = (out / "scans.csv").read_bytes(), (out / "checked_scans.jsonl").read_bytes()
    assert names_read() == [rejected]
    (out / "checked_scans.jsonl").write_bytes(lines[:-20])
    os.utime(folder / usable[0], ns=(0, 0))
    assert names_read() == [usable[0], usable[5], rejected]
    assert names_read() == [rejected]
    assert (out / "scans.csv").read_bytes() == scans


@pytest.mark.parametrize("script", ["check_data.py", "prepare.py"])
def test_a_page_without_the_names_of_scans(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    titles: list[str] = []
    drawn = report.lesion_sheet
    monkeypatch.setattr(
        report,
        "lesion_sheet",
        lambda shown, *rest: titles.extend(one.title for one in shown) or drawn(shown, *rest),
    )
    out = {"check_data.py": "output", "prepare.py": "store"}[script]
    runpy.run_path(str(REPO / "scripts" / script))["main"]([
        f"annotations={archive / 'lesions.csv'}", f"{out}={tmp_path / 'out'}", "sheet_lesions=2", "num_workers=0",
        "identifiers=hash",
    ])  # fmt: skip
    page = (tmp_path / "out" / "contact_sheet.html").read_text(encoding="utf-8")
    assert hashlib.sha256(b"scan 9.nii.gz").hexdigest()[:8] in page
    assert len(titles) == 2
    assert all(re.fullmatch(r"[0-9a-f]{8}, row [16]", title) for title in titles), titles
    if script == "check_data.py":
        assert titles[0] == f"{hashlib.sha256(b'scan 0.nii.gz').hexdigest()[:8]}, row 1"
    assert "scan 9" not in page
    assert str(archive) not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["annotations=a.csv", "store=s", "shard=2"], "shard is '2'"),
        (["annotations=a.csv", "store=s", "shard=1/2", "merge=true"], "run all shards first"),
        (["annotations=no such table.csv", "store=s"], "no such table.csv: cannot be opened"),
    ],
)
def test_what_is_typed_wrong_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "scripts" / "prepare.py"))["main"](arguments)
    assert message in f"{end.value}{capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())
