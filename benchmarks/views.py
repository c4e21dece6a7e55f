"""Time of a view: MONAI's transforms one view at a time against batched views, the same recipe on the same patches.

    python benchmarks/views.py [--rounds 7] [--views 64] [--output FILE.json]

Without a GPU the contenders take turns on one core; a figure is the median over rounds of the CPU time of the process,
so that other work on the machine counts little, and the ratio is the median of the rounds' ratios. With a GPU the
batched views are also timed there, in batches of `--gpu-views`: int16 patches on the device in, float32 views out.
The batched views are also compared with MONAI's chain of transforms run with the same parameters.
The cost of a transform is that of applying it alone to every view, drawing its parameters included.

Prints Markdown tables and writes benchmarks/results/views.json. Expected before measuring: 2.8 ms a published view of
50³ by MONAI, 0.9 ms batched (3 times); at 32³ more, as there MONAI's overhead counts more; 20,000 views/s on an H100.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from monai.transforms import Flip, GaussianSmooth, RandHistogramShift
from omegaconf import OmegaConf
from torch import Tensor

from fmcib_ssl.augment import (
    BatchedPublishedViews,
    BatchedViews,
    PublishedViews,
    RandomCutout,
    RandomGamma,
    RandomGaussianSmooth,
    RandomGeometry,
    RandomHistogramShift,
    RandomLowResolution,
    RandomNoise,
    RandomScaleShift,
    RandomSliceThickness,
)
from fmcib_ssl.types import Preprocessing

REPO = Path(__file__).resolve().parents[1]
SIZES = (50, 32)


def strong(size: int) -> BatchedViews:
    """The recipe of configs/augment/ct_strong.yaml."""
    section = yaml.safe_load((REPO / "configs" / "augment" / "ct_strong.yaml").read_text())
    config = OmegaConf.create({"augment": section, "data": {"patch_size": [size] * 3}})
    views: BatchedViews = instantiate(config.augment, _convert_="object")
    return views


def transforms() -> dict[str, BatchedViews]:
    """Each transform alone, applied to every view."""
    still: dict[str, Any] = {"crop_edge": (1.0, 1.0), "flip_prob": 0.0}
    alone = {
        "nothing (normalisation only)": RandomNoise(0.0),
        "crop and resize": RandomGeometry(crop_edge=(0.5, 1.0), flip_prob=0.0),
        "right angles and flips": RandomGeometry(crop_edge=(1.0, 1.0), flip_prob=1.0, rotate90_prob=1.0),
        "zoom": RandomGeometry(**still, zoom_prob=1.0),
        "rotation by any angle": RandomGeometry(**still, rotate_prob=1.0),
        "elastic shift": RandomGeometry(**still, elastic_prob=1.0),
        "slice thickness": RandomSliceThickness(1.0),
        "low resolution": RandomLowResolution(1.0),
        "Gaussian smoothing": RandomGaussianSmooth(1.0),
        "histogram shift": RandomHistogramShift(1.0),
        "scale and shift": RandomScaleShift(1.0),
        "gamma": RandomGamma(1.0),
        "noise": RandomNoise(1.0),
        "cut-out": RandomCutout(1.0),
    }
    return {name: BatchedViews({name: transform}) for name, transform in alone.items()}


def patches_hu(num: int, size: int) -> Tensor:
    """int16 HU: smooth structure and noise."""
    rng = np.random.default_rng(0)
    coarse = F.interpolate(
        torch.from_numpy(rng.normal(-300, 400, (num, 1, 6, 6, 6))), size=(size,) * 3, mode="trilinear"
    )
    return (coarse + torch.from_numpy(rng.normal(0, 40, coarse.shape))).clamp(-1024, 3071).to(torch.int16)


def largest_difference_hu(views: BatchedPublishedViews, patches: Tensor, seeds: Tensor) -> float:
    """Between batched views and MONAI's transforms with the same parameters."""
    size = tuple(patches.shape[2:])
    params = views.draw(seeds, size)
    geometry, histogram, smooth = params["geometry"], params["histogram_shift"], params["smooth"]
    expected = []
    for i, patch in enumerate(patches.float()):
        ends = zip(geometry.box_start[i].tolist(), geometry.box_size[i].tolist(), strict=True)
        image = F.interpolate(patch[None, :, *(slice(s, s + n) for s, n in ends)], size=size, mode="trilinear")[0]
        if geometry.flip[i].any():
            image = Flip(spatial_axis=geometry.flip[i].nonzero()[:, 0].tolist())(image)
        if histogram.active[i]:
            shift = RandHistogramShift(prob=1.0)
            shift.randomize()
            shift.floating_control_points = histogram.mapped[i].double().numpy()
            image = shift(image, randomize=False)
        if smooth.active[i]:
            image = GaussianSmooth(smooth.sigma_zyx[i].tolist())(image)
        expected.append(Preprocessing().normalize(torch.as_tensor(image).as_subclass(Tensor)))
    return float((views.views(patches, seeds) - torch.stack(expected)).abs().max()) * 3072


def cpu_ms(work: Callable[[], object], num: int) -> float:
    """Milliseconds of a core for each of `num` views."""
    start = time.process_time()
    work()
    return (time.process_time() - start) / num * 1e3


def gpu_ms(work: Callable[[], object], num: int) -> float:
    """Milliseconds of the clock for each of `num` views, until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / num * 1e3


def recipes(size: int, num: int, rounds: int) -> dict[str, Any]:
    """Whole recipes on one core, in turns."""
    patches, seeds = patches_hu(num, size), torch.arange(num)
    monai, ours, more = PublishedViews((size,) * 3), BatchedPublishedViews((size,) * 3), strong(size)
    contenders: dict[str, Callable[[], object]] = {
        "published, MONAI one by one": lambda: [monai(patch, i) for i, patch in enumerate(patches)],
        "published, batched": lambda: ours.views(patches, seeds),
        "ct_strong, batched": lambda: more.views(patches, seeds),
    }
    for work in contenders.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            found[name].append(cpu_ms(work, num))
    base, *_ = found.values()
    return {
        "ms_per_view": {name: statistics.median(times) for name, times in found.items()},
        "times_faster": {
            name: statistics.median(b / t for b, t in zip(base, times, strict=True)) for name, times in found.items()
        },
        "ms_by_round": found,
        "largest_difference_hu": largest_difference_hu(ours, patches[:32], seeds[:32]),
    }


def each_transform(size: int, num: int, rounds: int, device: str) -> dict[str, float]:
    """Milliseconds a view of each transform alone."""
    patches, seeds = (
        patches_hu(min(num, 64), size).repeat(-(-num // 64), 1, 1, 1, 1)[:num].to(device),
        torch.arange(num),
    )
    clock = cpu_ms if device == "cpu" else gpu_ms
    found = {}
    for name, views in transforms().items():
        views.views(patches, seeds)
        found[name] = statistics.median(
            clock(lambda views=views: views.views(patches, seeds), num) for _ in range(rounds)
        )
    return found


def on_gpu(size: int, num: int, rounds: int) -> dict[str, Any]:
    """Views a second and memory of whole recipes on the GPU."""
    patches = patches_hu(64, size).repeat(-(-num // 64), 1, 1, 1, 1)[:num].cuda()
    seeds = torch.arange(num)
    found: dict[str, Any] = {}
    for name, views in (
        ("published, batched", BatchedPublishedViews((size,) * 3)),
        ("ct_strong, batched", strong(size)),
    ):
        for _ in range(3):
            views.views(patches, seeds)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = [gpu_ms(lambda views=views: views.views(patches, seeds), num) for _ in range(rounds)]
        found[name] = {
            "views_per_s": 1e3 / statistics.median(times),
            "ms_by_round": times,
            "peak_mb_beside_the_patches": (torch.cuda.max_memory_allocated() - before) / 1e6,
        }
    return found


def markdown(results: dict[str, Any]) -> str:
    """The tables for the docs."""
    names = list(results["recipes"]["50"]["ms_per_view"])
    lines = [
        "| one core | " + " | ".join(f"{s}³, ms a view (x)" for s in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for name in names:
        cells = (f"{r['ms_per_view'][name]:.2f} ({r['times_faster'][name]:.1f})" for r in results["recipes"].values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    devices = list(results["transforms"])
    lines += [
        "",
        "| one transform, 50³, ms a view | " + " | ".join(devices) + " |",
        "| --- |" + " ---: |" * len(devices),
    ]
    for name in results["transforms"]["cpu"]:
        lines.append(f"| {name} | " + " | ".join(f"{results['transforms'][d][name]:.3f}" for d in devices) + " |")
    if "gpu" in results:
        lines += ["", f"| {results['machine']['gpu']} | views/s | peak MB |", "| --- | ---: | ---: |"]
        for size, rows in results["gpu"].items():
            for name, row in rows.items():
                lines.append(
                    f"| {name}, {size}³ | {row['views_per_s']:,.0f} | {row['peak_mb_beside_the_patches']:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--views", type=int, default=64, help="views of a batch on the CPU")
    parser.add_argument("--gpu-views", type=int, default=256, help="views of a batch on the GPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "views.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, num = arguments.rounds, arguments.views
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "recipes": {str(size): recipes(size, num, rounds) for size in SIZES},
        "transforms": {"cpu": each_transform(50, num, max(3, rounds // 2), "cpu")},
    }
    if torch.cuda.is_available():
        results["gpu"] = {str(size): on_gpu(size, arguments.gpu_views, rounds) for size in SIZES}
        results["transforms"]["gpu"] = each_transform(50, arguments.gpu_views, rounds, "cuda")
    print(markdown(results))
    differences = {size: found["largest_difference_hu"] for size, found in results["recipes"].items()}
    print(f"\nlargest difference to MONAI's chain with the same parameters, HU: {differences}")
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
