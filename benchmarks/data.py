"""How fast patches come: from a store, and the ways of the peers, on the same scans in the same run, one core each.

    python benchmarks/data.py [--scans 3] [--rounds 5] [--workspace DIR] [--table FILE.csv]

Synthetic chest-like scans of 512 x 512 x 60 (5 mm slices) and 512 x 512 x 250 (1.25 mm), uncompressed NIfTI, which is
what the loaders that read whole scans like best. A sample is a positive and a negative patch of 50 x 50 x 50 voxels of
1 mm. The contenders take turns, a round of each after the other; a figure is the median over rounds. Seconds are those
of one core (CPU time of the process, all on one thread), so that other work on the machine does not count; wall times
are in the JSON too. Files are in the page cache for all alike; the store opens its files anew for every patch.

Written to benchmarks/results/data.json, and printed as a Markdown table. Noted before the first run: the loader that
reads the scan anew at 2 and 0.7 samples/s, the store at 600 for both, so 300 and 850 times; MONAI's PersistentDataset
at about 10 and 4, since it reads the whole resampled scan; CacheDataset faster than the store, as it only slices
memory, for as long as all scans fit in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    Spacingd,
    SpatialCrop,
    Transform,
)
from scipy import ndimage

from fmcib_ssl.data import LesionPatches, Store, StoreSettings, prepare_store, read_annotations
from fmcib_ssl.types import SampleKey

RESULTS = Path(__file__).parent / "results" / "data.json"
SIZE = 50
SHAPES = {"512 x 512 x 60": (60, 5.0), "512 x 512 x 250": (250, 1.25)}
LESIONS_PER_SCAN = 4
IN_PLANE_MM = 0.75


def write_scan(path: Path, num_slices: int, slice_mm: float, seed: int) -> list[tuple[float, float, float]]:
    """A trunk with lungs and correlated noise; gives points in it, LPS mm."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((512, 512), dtype=np.float32)
    trunk = ((y - 256) / 170) ** 2 + ((x - 256) / 220) ** 2 < 1
    lungs = sum((((y - 250) / 110) ** 2 + ((x - 256 - side * 100) / 75) ** 2 < 1) for side in (-1, 1)) > 0
    plain = np.where(lungs, -820, np.where(trunk, 45, -1000)).astype(np.float32)
    slices = [
        plain + ndimage.gaussian_filter(rng.normal(0, 90, (512, 512)).astype(np.float32), 0.8)
        for _ in range(num_slices)
    ]
    image = sitk.GetImageFromArray(np.clip(np.rint(slices), -1024, 3071).astype(np.int16))
    image.SetSpacing((IN_PLANE_MM, IN_PLANE_MM, slice_mm))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # as NIfTI converters leave it: to be turned to LPS
    sitk.WriteImage(image, str(path))
    places = rng.uniform((130, 170, 0.2 * num_slices), (380, 340, 0.8 * num_slices), (LESIONS_PER_SCAN, 3))
    return [image.TransformContinuousIndexToPhysicalPoint(place) for place in places.tolist()]


class ReadEverySample:
    """The published way: read, resample to 1 mm, turn and crop the whole scan for each sample."""

    def __init__(self, table: pd.DataFrame, folder: Path) -> None:
        self.table, self.folder = table, folder

    def __getitem__(self, key: SampleKey) -> list[np.ndarray]:
        """Both patches of a lesion."""
        row = self.table.iloc[key.index]
        image = sitk.ReadImage(str(self.folder / row["image_path"]))
        size = [round(n * s) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
        image = sitk.Resample(
            image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [1.0] * 3, image.GetDirection(),
            -1024, image.GetPixelID(),
        )  # fmt: skip
        image = sitk.DICOMOrient(image, "LPS")
        point = tuple(map(float, row[["coordX", "coordY", "coordZ"]]))
        center = np.array(image.TransformPhysicalPointToIndex(point))
        rng = np.random.default_rng(key)
        half = SIZE // 2
        negative = [int(rng.integers(half, max(half + 1, n - half))) for n in image.GetSize()]
        return [self._crop(image, place) for place in (center, np.array(negative))]

    @staticmethod
    def _crop(image: sitk.Image, center: np.ndarray) -> np.ndarray:
        low = np.clip(center - SIZE // 2, 0, np.array(image.GetSize()) - SIZE)
        return sitk.GetArrayFromImage(sitk.RegionOfInterest(image, [SIZE] * 3, low.tolist()))


class FindVoxels(Transform):
    """MONAI: the lesions' voxels on the grid that is cropped; caches keep them with the scan."""

    def __call__(self, data: dict) -> dict:  # type: ignore[type-arg]  # noqa: D102
        affine = np.linalg.inv(data["image"].affine.numpy())
        points_ras = np.array(data["points"]) * (-1, -1, 1)  # MONAI's affine is in RAS
        return {**data, "voxels": (points_ras @ affine[:3, :3].T + affine[:3, 3]).round().astype(int).tolist()}


class WholeScans:
    """A lesion's patch and one at a random place, cropped from the resampled scans that a MONAI dataset gives."""

    def __init__(self, scans: Dataset) -> None:
        self.scans = scans

    def __getitem__(self, key: SampleKey) -> list[torch.Tensor]:
        """Both patches of a lesion."""
        number, lesion = divmod(key.index, LESIONS_PER_SCAN)
        data, half = self.scans[number], SIZE // 2
        rng = np.random.default_rng(key)
        negative = [int(rng.integers(half, max(half + 1, n - half))) for n in data["image"].shape[1:]]
        places = (data["voxels"][lesion], negative)
        return [SpatialCrop(roi_center=place, roi_size=[SIZE] * 3)(data["image"]) for place in places]


def monai_datasets(table: pd.DataFrame, folder: Path, cache: Path) -> dict[str, Dataset]:
    """MONAI's three datasets over the same transforms; whole scans are what its caches keep."""
    items = [
        {"image": str(folder / path), "points": rows[["coordX", "coordY", "coordZ"]].to_numpy().tolist()}
        for path, rows in table.groupby("image_path", sort=False)
    ]
    whole = Compose([
        LoadImaged("image", reader="ITKReader" if _has_itk() else "NibabelReader"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="LPS", labels=(("R", "L"), ("A", "P"), ("I", "S"))),
        Spacingd("image", pixdim=1.0, mode="bilinear"),
        FindVoxels(),
    ])  # fmt: skip
    return {
        "MONAI Dataset, whole scan each sample": Dataset(items, whole),
        "MONAI PersistentDataset, resampled scans on disk": PersistentDataset(items, whole, cache),
        "MONAI CacheDataset, resampled scans in memory": CacheDataset(items, whole, num_workers=1, progress=False),
    }


def _has_itk() -> bool:
    try:
        import itk  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def cpu_s(self) -> float:
        """Of a core, for this process."""
        return time.process_time() - self._cpu

    def wall_s(self) -> float:
        """Of the clock."""
        return time.perf_counter() - self._wall


def one_shape(name: str, num_scans: int, rounds: int, folder: Path) -> dict[str, object]:
    """Samples per second of every contender on scans of one shape."""
    num_slices, slice_mm = SHAPES[name]
    folder.mkdir()
    rows = []
    for number in range(num_scans):
        for x, y, z in write_scan(folder / f"{number}.nii", num_slices, slice_mm, seed=number):
            rows.append({"image_path": f"{number}.nii", "coordX": x, "coordY": y, "coordZ": z})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "lesions.csv", index=False)
    lesions = read_annotations(folder / "lesions.csv")
    watch = Stopwatch()
    prepare_store(lesions, folder / "store", StoreSettings(), num_workers=0)
    prepare_s, prepare_wall_s = watch.cpu_s() / num_scans, watch.wall_s() / num_scans

    published = ReadEverySample(table, folder)
    contenders: dict[str, tuple[Callable[[SampleKey], object], int]] = {
        "read, resample, turn and crop the scan each sample": (published.__getitem__, 1)
    }
    for mining in ("background", "near", "hard", "uniform"):
        contenders[f"store, mining={mining}"] = (LesionPatches(folder / "store", mining=mining).__getitem__, 200)
    for label, dataset in monai_datasets(table, folder, folder / "monai").items():
        contenders[label] = (WholeScans(dataset).__getitem__, 1 if "each" in label else 10)
    for label, (sample, _) in contenders.items():
        for index in range(0, len(table), LESIONS_PER_SCAN if "Persistent" in label else len(table)):
            sample(SampleKey(0, index))  # files are in the page cache, caches filled, before anything is timed

    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    wall_seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for turn in range(rounds):
        for label, (sample, num) in contenders.items():
            keys = [SampleKey(turn, i) for i in np.random.default_rng(turn).integers(0, len(table), num).tolist()]
            watch = Stopwatch()
            for key in keys:
                sample(key)
            seconds[label].append(watch.cpu_s() / num)
            wall_seconds[label].append(watch.wall_s() / num)
    medians = {label: statistics.median(found) for label, found in seconds.items()}
    base = medians["read, resample, turn and crop the scan each sample"]
    store_files = [file for file in (folder / "store" / "scans").iterdir() if file.suffix == ".b2nd"]
    return {
        "samples_per_s": {label: 1 / s for label, s in medians.items()},
        "times_published": {label: base / s for label, s in medians.items()},
        "seconds_by_round": seconds,
        "wall_seconds_by_round": wall_seconds,
        "prepare_wall_s_per_scan": prepare_wall_s,
        "prepare_s_per_scan": prepare_s,
        "prepare_in_published_samples": prepare_s / base,
        "store_mb_per_scan": sum(file.stat().st_size for file in store_files) / len(store_files) / 1e6,
        "source_mb_per_scan": (folder / "0.nii").stat().st_size / 1e6,
    }


MEMORY_PROBE = """
import sys
from fmcib_ssl.data import LesionPatches
from fmcib_ssl.types import SampleKey
def private_mb():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024
imports = private_mb()
data = LesionPatches(sys.argv[1])
index = private_mb() - imports
step = max(1, len(data) // 2000)
for i in range(0, len(data) // 10, step): data[i]
before = private_mb()
num = 0
for i in range(len(data) // 10, len(data), step): data[i]; num += 1
print(len(data), index, private_mb() - before, num)
"""


def memory(store: Path, folder: Path, scans_of_rows: list[str]) -> dict[str, float]:
    """Private memory of a process that reads patches of very many scans: hard links to one, each a file of its own."""
    (folder / "scans").mkdir(parents=True)
    template = Store(store)
    scan_id = str(template.scans.index[0])
    scan_ids = sorted(set(scans_of_rows))
    for suffix in (".b2nd", ".cells"):
        for other in scan_ids:
            os.link(store / "scans" / f"{scan_id}{suffix}", folder / "scans" / f"{other}{suffix}")
    scans = template.scans.reset_index().iloc[[0] * len(scan_ids)].assign(scan_id=scan_ids)
    scans.to_parquet(folder / "scans.parquet", index=False)
    own = template.lesions[template.lesions["scan_id"] == scan_id]
    lesions = own.iloc[np.arange(len(scans_of_rows)) % len(own)].assign(scan_id=scans_of_rows)
    lesions.to_parquet(folder / "lesions.parquet", index=False)
    (folder / "store.json").write_bytes((store / "store.json").read_bytes())
    done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, folder], check=True, capture_output=True, text=True)
    rows, index_mb, grown_mb, num_read = map(float, done.stdout.split())
    return {
        "rows": rows, "scans": len(scan_ids), "index_mb": index_mb, "grown_mb": grown_mb, "samples_read": num_read,
        "store_gb": len(scan_ids) * (store / "scans" / f"{scan_id}.b2nd").stat().st_size / 1e9,
    }  # fmt: skip


def markdown(results: dict[str, dict[str, object]]) -> Iterator[str]:
    """The table for the docs."""
    names = list(SHAPES)
    yield (
        "| one positive and one negative 50³ patch, one core | "
        + " | ".join(f"{n}, samples/s (x)" for n in names)
        + " |"
    )
    yield "| --- |" + " ---: |" * len(names)
    for label in results[names[0]]["samples_per_s"]:  # type: ignore[attr-defined]
        cells = []
        for name in names:
            rate = results[name]["samples_per_s"][label]  # type: ignore[index]
            cells.append(f"{rate:.3g} ({results[name]['times_published'][label]:.3g})")  # type: ignore[index]
        yield f"| {label} | " + " | ".join(cells) + " |"
    for label, key in (
        ("to prepare a scan, in samples of the first row", "prepare_in_published_samples"),
        ("to prepare a scan, s", "prepare_s_per_scan"),
        ("a scan in the store, MB", "store_mb_per_scan"),
        ("the scan's file, MB", "source_mb_per_scan"),
    ):
        yield f"| {label} | " + " | ".join(f"{results[name][key]:.3g}" for name in names) + " |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=3, help="scans of each shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workspace", type=Path, help="where scans are written, about 1 GB for three; else temporary")
    parser.add_argument("--table", type=Path, help="a table of lesions whose image_path column gives scans and rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.workspace) as name:
        for number, shape in enumerate(SHAPES):
            results[shape] = one_shape(shape, arguments.scans, arguments.rounds, Path(name) / str(number))
        store = Path(name) / "0" / "store"
        found = [memory(store, Path(name) / "many", [f"{n:05d}" for n in range(10_000)])]
        if arguments.table:
            paths = pd.read_csv(arguments.table)["image_path"].astype(str)
            scans = (paths.rank(method="dense").astype(int)).map("scan{:05d}".format).tolist()
            found.append(memory(store, Path(name) / "table", scans))
    print("\n".join(markdown(results)))
    for case in found:
        print(
            f"\n{case['rows']:.0f} lesions of {case['scans']:.0f} scans ({case['store_gb']:.0f} GB): the index takes "
            f"{case['index_mb']:.1f} MB; reading {case['samples_read']:.0f} samples adds {case['grown_mb']:.1f} MB"
        )
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": sys.version}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "shapes": results, "memory": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
