"""Looking at every scan: on several processes as on one, each scan once, and not again unless its files changed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from odd_images import AFFINE_RAS as AFFINE
from odd_images import chest, moved, write_nifti

from fmcib_ssl.data import annotations
from fmcib_ssl.data.annotations import ScanReport, inspect_scans
from fmcib_ssl.data.scans import ScanSource, read_scan
from fmcib_ssl.types import ScanError


@pytest.fixture
def sources(tmp_path: Path) -> list[ScanSource]:
    """Four scans, one that contradicts itself, one not in HU, one that is not there."""
    for number in range(4):
        write_nifti(tmp_path / f"{number}.nii.gz")
    write_nifti(tmp_path / "conflict.nii.gz", sform=(moved(AFFINE, x=15), 1))
    write_nifti(tmp_path / "raw.nii.gz", chest() + 1024)
    names = [*(f"{number}.nii.gz" for number in range(4)), "conflict.nii.gz", "raw.nii.gz", "none.nii.gz"]
    return [ScanSource(tmp_path / name) for name in names]


def texts(results: dict[ScanSource, annotations.Result]) -> dict[str, str]:
    return {scan.path.name: repr(result) for scan, result in results.items()}


def test_reports_and_errors(sources: list[ScanSource]) -> None:
    results = inspect_scans(sources, "full")
    scan = read_scan(sources[0].path)
    assert results[sources[0]] == ScanReport(scan.geometry, scan.summary)
    errors = {s.path.name: r.reason for s, r in results.items() if isinstance(r, ScanError)}
    assert set(errors) == {"conflict.nii.gz", "raw.nii.gz", "none.nii.gz"}
    headers = inspect_scans(sources, "headers")
    assert headers[sources[0]] == ScanReport(scan.geometry)
    assert isinstance(headers[sources[5]], ScanReport)  # only decoding tells


def test_processes_give_the_same(sources: list[ScanSource], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = inspect_scans(sources, "full")
    monkeypatch.setattr(annotations, "_ALONE_S", 0.0)
    monkeypatch.setattr(annotations, "_CHUNK_SCANS", {"full": 2})
    assert texts(inspect_scans(sources, "full", num_workers=2)) == texts(alone)


def killed_by_one(_: str, sources: list[ScanSource]) -> list[annotations.Result]:
    if any(source.path.name == "2.nii.gz" for source in sources):
        os.kill(os.getpid(), signal.SIGKILL)
    return [ScanReport(read_scan(*source).geometry) for source in sources]


def test_a_scan_that_kills_its_process_is_one_scan(sources: list[ScanSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "_ALONE_S", 0.0)
    monkeypatch.setattr(annotations, "_inspect_chunk", killed_by_one)
    results = dict(annotations._inspected("headers", [tuple(sources[1:3])], 2))
    failed = [source for source, result in results.items() if isinstance(result, ScanError)]
    assert (len(results), failed) == (2, [sources[2]])


def test_what_was_found_is_kept_and_read_again_only_if_changed(
    sources: list[ScanSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt after some scans, then the same again; a last line cut off; a file that changes."""
    cache, read = tmp_path / "cache.jsonl", []

    def reading(path: Path, *how: object) -> object:
        read.append(path.name)
        if len(read) == stop_at:
            raise KeyboardInterrupt
        return read_scan(path, *how)

    monkeypatch.setattr(annotations, "read_scan", reading)
    monkeypatch.setattr(annotations, "_CHUNK_SCANS", {"full": 1})
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        inspect_scans(sources, "full", cache=cache)
    assert read == ["0.nii.gz", "1.nii.gz", "2.nii.gz"]
    cache.write_text(cache.read_text() + '\n{"source": ["cut')
    read.clear()
    stop_at = 0
    resumed = inspect_scans(sources, "full", cache=cache)
    assert read == ["2.nii.gz", "3.nii.gz", "conflict.nii.gz", "none.nii.gz", "raw.nii.gz"]
    read.clear()
    assert texts(inspect_scans(sources, "full", cache=cache)) == texts(resumed)
    assert texts(inspect_scans(sources, "full")) == texts(resumed)
    read.clear()
    write_nifti(sources[1].path, sform=(moved(AFFINE, x=5), 1), qform=None)
    changed = inspect_scans(sources, "full", cache=cache)
    assert read == ["1.nii.gz", "none.nii.gz"]  # what is not there is asked for again
    assert changed[sources[1]] != resumed[sources[1]]
