"""A small archive of synthetic chest CTs, written as real files.

The scans go through the same reader as a hospital's: NIfTI, anisotropic spacing, stored along different axes.
Each holds lesions of two classes that differ in texture and margin and in nothing else: diameter, mean HU and
place are drawn from the same distributions, so a probe that tells them apart has seen how a lesion looks.

Everything about scan `n` is a function of `(seed, n)`: a longer archive begins with the scans of a shorter one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from tqdm import tqdm

from fmcib_ssl.data.phantom_chest import Chest, PhantomLesion, draw_lesions, render

VERSION = 1  # of what is drawn: scans of two versions are not mixed in one archive
HELD_OUT = (2, 4)  # scan numbers modulo 5 that are the test set: two fifths of the patients


def draw_scan(seed: int, number: int, lesions_per_scan: tuple[int, int]) -> tuple[Chest, list[PhantomLesion]]:
    """What scan `number` of an archive shows; nothing is rendered yet."""
    rng = np.random.default_rng([seed, number, 0])
    chest = Chest.draw(rng)
    return chest, draw_lesions(chest, int(rng.integers(*lesions_per_scan, endpoint=True)), rng)


def make_archive(
    folder: Path | str,
    num_scans: int = 120,
    lesions_per_scan: tuple[int, int] = (1, 3),
    seed: int = 0,
    *,
    num_workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write an archive of phantom scans and its table of lesions, or finish one that was begun.

    Scans that are there already are left as they are.

    Args:
        folder: where the scans go; made if absent.
        num_scans: one scan a patient.
        lesions_per_scan: fewest and most, both inclusive.
        seed: of everything that is drawn.
        num_workers: processes; 1 works in this one. More are spawned, so the calling script needs the
            usual `if __name__ == "__main__":`.
        progress: show a progress bar.

    Returns:
        The table, `annotations.csv`: `image_path` (relative to it), `PatientID`, `coordX`, `coordY`, `coordZ`
        (LPS mm), `diameter_mm`, `label` (0 or 1), `split` ("train" or "test", by patient).

    Raises:
        ValueError: the numbers make no archive, or the folder holds something else: an archive made with
            other parameters, or a table that no phantom made.
    """
    few, many = lesions_per_scan
    if num_scans < 1 or not 1 <= few <= many:
        raise ValueError(
            f"a phantom archive needs num_scans >= 1 and 1 <= fewest <= most lesions a scan, "
            f"got num_scans={num_scans}, lesions_per_scan={tuple(lesions_per_scan)}"
        )
    folder = Path(folder)
    table = folder / "annotations.csv"
    _claim(folder, {"version": VERSION, "num_scans": num_scans, "lesions_per_scan": [few, many], "seed": seed})
    (folder / "scans").mkdir(exist_ok=True)
    missing = [n for n in range(num_scans) if not (folder / _scan_name(n)).is_file()]
    write = partial(_write_scan, folder, seed, (few, many))
    with ExitStack() as stack:
        done: Iterator[None] = map(write, missing)
        if num_workers > 1 and len(missing) > num_workers:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(num_workers, mp_context=spawn))
            done = pool.map(write, missing, chunksize=2)
        hidden, interval_s = not (progress and missing), 0.5 if sys.stderr.isatty() else 30
        for _ in tqdm(done, "phantom scans", len(missing), unit="scan", disable=hidden, mininterval=interval_s):
            pass
    if not table.is_file():
        rows = [row for n in range(num_scans) for row in _table_rows(seed, n, (few, many))]
        pd.DataFrame(rows).to_csv(_partial(table), index=False)
        _partial(table).replace(table)
    return table


def _claim(folder: Path, parameters: dict[str, object]) -> None:
    """Mark the folder as this archive's, or refuse one that is not."""
    manifest = folder / "phantom.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text())
        if found != parameters:
            raise ValueError(
                f"{folder} holds a phantom archive made with {found}, not {parameters}: "
                "delete that folder or give another one"
            )
        return
    if (folder / "annotations.csv").exists():
        raise ValueError(
            f"{folder} has an annotations.csv but no phantom.json: it is no phantom archive; give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _partial(manifest).write_text(json.dumps(parameters))
    _partial(manifest).replace(manifest)


def _scan_name(number: int) -> str:
    return f"scans/phantom_{number:04d}.nii.gz"


def _partial(path: Path) -> Path:
    """Where a file is written before it is renamed: an interrupted run leaves no half file under its name."""
    return path.with_name(f".{os.getpid()}.{path.name}")


def _write_scan(folder: Path, seed: int, lesions_per_scan: tuple[int, int], number: int) -> None:
    chest, lesions = draw_scan(seed, number, lesions_per_scan)
    path = folder / _scan_name(number)
    sitk.WriteImage(render(chest, lesions, np.random.default_rng([seed, number, 1])), str(_partial(path)))
    _partial(path).replace(path)


def _table_rows(seed: int, number: int, lesions_per_scan: tuple[int, int]) -> Iterator[dict[str, object]]:
    chest, lesions = draw_scan(seed, number, lesions_per_scan)
    for lesion in lesions:
        where = np.round(np.add(lesion.center_lps_mm, chest.origin_lps), 3).tolist()
        yield {
            "image_path": _scan_name(number),
            "PatientID": f"phantom_{number:04d}",
            **dict(zip(("coordX", "coordY", "coordZ"), where, strict=True)),
            "diameter_mm": round(lesion.diameter_mm, 1),
            "label": lesion.label,
            "split": "test" if number % 5 in HELD_OUT else "train",
        }
