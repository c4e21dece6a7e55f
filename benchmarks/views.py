"""Time of a view: batched views against chains of MONAI's transforms that make one view after the other.

    python benchmarks/views.py                      # this machine's CPU, one core
    python benchmarks/views.py accelerator=gpu      # the first GPU: views a second, peak memory

On the CPU the contenders take turns; a figure is the median over rounds of the process's CPU time, so that other work
on the machine counts little, and a ratio is the median of the rounds' ratios. MONAI's chains hold the same kinds of
transforms with the same probabilities and ranges; thick slices and surroundings are left out of them, since MONAI has
no such transforms. The published recipe is also compared voxel by voxel, with the same parameters.

On the GPU int16 patches lie on the device and float32 views come out, drawing included; the clock is the wall's.
The cost of a transform is that of applying it alone to every view.

Prints Markdown tables and writes its part of benchmarks/results/views.json; the other part stays as it is. Expected
before measuring: 3 times MONAI's speed for the published recipe on a CPU; 20,000 views of 50³ a second on an H100.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import monai
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from measure import REPO, RESULTS, add_results, machine, now
from monai import transforms as mt
from omegaconf import OmegaConf
from pydantic import Field, PositiveInt
from torch import Tensor

from fmcib_ssl import augment
from fmcib_ssl.augment import BatchedViews, MonaiViews, PublishedViews, RandomGeometry, RandResizedCrop
from fmcib_ssl.io import Command, parse_command

SIZES = (50, 32)
RECIPES = ("batched_published", "ct_strong", "nodule")
GOAL_VIEWS_PER_S = 20_000


class Views(Command):
    """Time of a view, batched and by MONAI's transforms.

    python benchmarks/views.py [accelerator=gpu]
    """

    accelerator: Literal["cpu", "gpu"] = Field(default="cpu", description="cpu or gpu")
    rounds: PositiveInt = Field(default=7, description="turns that each contender has")
    views: PositiveInt | None = Field(default=None, description="views of a batch; null: 32, on a GPU 256")
    output: Path = Field(default=RESULTS / "views.json", description="results, JSON")


def shipped(recipe: str, size: int) -> BatchedViews:
    """A recipe of configs/augment for patches of a size."""
    section = yaml.safe_load((REPO / "configs" / "augment" / f"{recipe}.yaml").read_text())
    config = OmegaConf.create({"augment": section, "data": {"patch_size": [size] * 3}})
    views: BatchedViews = instantiate(config.augment, _convert_="object")
    return views


def by_monai(recipe: str, size: int) -> MonaiViews:
    """The same kinds of transforms as in a recipe, of MONAI, for one view at a time."""
    cube, turn = (size,) * 3, 20 * np.pi / 180
    flips = [mt.RandFlip(prob=0.5, spatial_axis=axis) for axis in range(3)]
    chains: dict[str, list[Any]] = {
        "ct_strong": [
            RandResizedCrop(cube, (0.6, 1.0)), *flips, mt.RandRotate90(prob=0.5),
            # Rotation or zoom in 51 % of the views; in ours in 30 % each.
            mt.RandAffine(prob=0.51, rotate_range=(turn,) * 3, scale_range=(0.16,) * 3, padding_mode="border"),
            mt.Rand3DElastic((5, 7), (50, 150), prob=0.2, padding_mode="border"),
            mt.RandSimulateLowResolution(prob=0.15, zoom_range=(0.5, 1.0)),
            mt.RandGaussianSmooth((0.25, 1.0), (0.25, 1.0), (0.25, 1.0), prob=0.3),
            mt.RandScaleIntensity(0.05, prob=0.5), mt.RandShiftIntensity(20.0, prob=0.5),
            mt.RandAdjustContrast(prob=0.2, gamma=(0.85, 1.18)),
            mt.RandGaussianNoise(prob=0.5, std=40.0),
            mt.RandCoarseDropout(1, max(1, size // 10), max_holes=3, max_spatial_size=3 * size // 10, prob=0.2),
        ],
        "nodule": [
            RandResizedCrop(cube, (0.85, 1.0)), *flips, mt.RandRotate90(prob=0.75),
            mt.RandAffine(prob=1.0, scale_range=((-0.25, 0.35),) * 3, padding_mode="border"),
            mt.RandGaussianSmooth((0.4, 0.8), (0.4, 0.8), (0.4, 0.8), prob=0.3),
            mt.RandGaussianNoise(prob=1.0, std=25.0),
        ],
    }  # fmt: skip
    return PublishedViews(cube) if recipe == "batched_published" else MonaiViews(chains[recipe])


def alone() -> dict[str, BatchedViews]:
    """Each transform alone, applied to every view."""
    still: dict[str, Any] = {"crop_edge": (1.0, 1.0), "flip_prob": 0.0}
    transforms = {
        "nothing": augment.RandomNoise(0.0),
        "crop and resize": RandomGeometry(crop_edge=(0.5, 1.0), flip_prob=0.0),
        "right angles and flips": RandomGeometry(crop_edge=(1.0, 1.0), flip_prob=1.0, rotate90_prob=1.0),
        "zoom": RandomGeometry(**still, zoom_prob=1.0),
        "rotation by any angle": RandomGeometry(**still, rotate_prob=1.0),
        "elastic shift": RandomGeometry(**still, elastic_prob=1.0),
        "slice thickness": augment.RandomSliceThickness(1.0),
        "low resolution": augment.RandomLowResolution(1.0),
        "Gaussian smoothing": augment.RandomGaussianSmooth(1.0),
        "histogram shift": augment.RandomHistogramShift(1.0),
        "scale and shift": augment.RandomScaleShift(1.0),
        "gamma": augment.RandomGamma(1.0),
        "noise": augment.RandomNoise(1.0),
        "cut-out": augment.RandomCutout(1.0),
        "surroundings": augment.RandomContextRemoval(1.0),
    }
    return {name: BatchedViews({name: transform}) for name, transform in transforms.items()}


def patches_hu(num: int, size: int) -> Tensor:
    """int16 HU: smooth structure and noise; every 64 patches the same again."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(-300, 400, (min(num, 64), 1, 6, 6, 6)))
    fine = F.interpolate(coarse, size=(size,) * 3, mode="trilinear")
    hu = (fine + torch.from_numpy(rng.normal(0, 40, fine.shape))).clamp(-1024, 3071).to(torch.int16)
    return hu.repeat(-(-num // 64), 1, 1, 1, 1)[:num]


def largest_difference_hu(patches: Tensor, seeds: Tensor) -> float:
    """Between batched views of the published recipe and MONAI's transforms with the same parameters."""
    views, size = shipped("batched_published", patches.shape[-1]), tuple(patches.shape[2:])
    params = views.draw(seeds, size)
    geometry, histogram, smooth = params["geometry"], params["histogram_shift"], params["smooth"]
    expected = []
    for i, patch in enumerate(patches.float()):
        ends = zip(geometry["box_start"][i].tolist(), geometry["box_size"][i].tolist(), strict=True)
        image = F.interpolate(patch[None, :, *(slice(s, s + n) for s, n in ends)], size=size, mode="trilinear")[0]
        if geometry["flip"][i].any():
            image = mt.Flip(spatial_axis=geometry["flip"][i].nonzero()[:, 0].tolist())(image)
        if histogram["active"][i]:
            shift = mt.RandHistogramShift(prob=1.0)
            shift.randomize()
            shift.floating_control_points = histogram["mapped"][i].double().numpy()
            image = shift(image, randomize=False)
        if smooth["active"][i]:
            image = mt.GaussianSmooth(smooth["sigma_zyx"][i].tolist())(image)
        expected.append(torch.as_tensor(image).as_subclass(Tensor))
    return float((views(patches, seeds) - torch.stack(expected)).abs().max())


def in_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, num: int, *, gpu: bool
) -> dict[str, list[float]]:
    """Milliseconds for each of `num` views by contender and round: of a core, or of the clock until the GPU is done."""
    for work in contenders.values():
        work()
        work()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            began = now(gpu=gpu)
            work()
            found[name].append((now(gpu=gpu) - began) / num * 1e3)
    return found


def each_transform(size: int, num: int, rounds: int, *, gpu: bool) -> dict[str, float]:
    """Milliseconds a view of each transform alone."""
    patches, seeds = patches_hu(num, size).to("cuda" if gpu else "cpu"), torch.arange(num)
    work = {name: (lambda views=views: views(patches, seeds)) for name, views in alone().items()}
    return {name: statistics.median(times) for name, times in in_turns(work, rounds, num, gpu=gpu).items()}


def on_cpu(size: int, num: int, rounds: int) -> dict[str, Any]:
    """The recipes on one core, MONAI's chain and the batch in turns."""
    patches, seeds = patches_hu(num, size), torch.arange(num)
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        monai_views, batched = by_monai(recipe, size), shipped(recipe, size)
        contenders: dict[str, Work] = {
            "monai": lambda views=monai_views: views(patches, seeds),
            "batched": lambda views=batched: views(patches, seeds),
        }
        times = in_turns(contenders, rounds, num, gpu=False)
        faster = [one / other for one, other in zip(times["monai"], times["batched"], strict=True)]
        found[recipe] = {
            **{f"{name}_ms": statistics.median(its) for name, its in times.items()},
            "times_faster": statistics.median(faster),
            "times_faster_by_round": faster,
        }
    return found


def on_gpu(size: int, num: int, rounds: int) -> dict[str, Any]:
    """Views a second of the recipes, their memory, and how far they are from those of the CPU."""
    patches, seeds = patches_hu(num, size).cuda(), torch.arange(num)
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        views = shipped(recipe, size)
        times = in_turns({recipe: lambda views=views: views(patches, seeds)}, rounds, num, gpu=True)[recipe]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = views(patches, seeds)
        peak = torch.cuda.max_memory_allocated() - before
        there = views(patches[:32].cpu(), seeds[:32])
        found[recipe] = {
            "views_per_s": 1e3 / statistics.median(times),
            "ms_by_round": times,
            "peak_mb_beside_the_patches": peak / 1e6,
            "difference_to_cpu_hu": float((made[:32].cpu() - there).abs().max()) * 3072,
        }
    return found


def cpu_tables(found: dict[str, Any]) -> list[str]:
    """Rows of the docs."""
    lines = ["| one core, ms a view | MONAI, one by one | batched | times faster |", "| --- | ---: | ---: | ---: |"]
    for size, recipes in found["recipes"].items():
        for name, row in recipes.items():
            times = f"{row['monai_ms']:.2f} | {row['batched_ms']:.2f} | {row['times_faster']:.1f}"
            lines.append(f"| `{name}`, {size}³ | {times} |")
    return lines


def gpu_tables(found: dict[str, Any]) -> list[str]:
    """Rows of the docs."""
    lines = [
        f"| {found['machine']['device']} | views/s | peak MB | from the CPU's, HU |",
        "| --- | ---: | ---: | ---: |",
    ]
    for size, recipes in found["recipes"].items():
        for name, row in recipes.items():
            figures = f"{row['peak_mb_beside_the_patches']:.0f} | {row['difference_to_cpu_hu']:.2g}"
            lines.append(f"| `{name}`, {size}³ | {row['views_per_s']:,.0f} | {figures} |")
    reached = found["recipes"]["50"]["batched_published"]["views_per_s"] >= GOAL_VIEWS_PER_S
    return [*lines, "", f"the goal of {GOAL_VIEWS_PER_S:,} views/s of 50³ is {'reached' if reached else 'missed'}"]


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    command = parse_command(Views, arguments)
    gpu = command.accelerator == "gpu"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("accelerator=gpu: torch sees no GPU on this machine")
    torch.set_num_threads(1)
    num, measure = command.views or (256 if gpu else 32), on_gpu if gpu else on_cpu
    found: dict[str, Any] = {
        "machine": {
            "device": machine(gpu=gpu),
            "load": None if gpu else round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
            "monai": monai.__version__,
        },
        "views": num,
        "rounds": command.rounds,
        "recipes": {str(size): measure(size, num, command.rounds) for size in SIZES},
        "transforms_ms": each_transform(50, num, max(3, command.rounds // 2), gpu=gpu),
    }
    lines = gpu_tables(found) if gpu else cpu_tables(found)
    lines += ["", "| one transform on every view of 50³ | ms a view |", "| --- | ---: |"]
    print("\n".join([*lines, *(f"| {name} | {ms:.3f} |" for name, ms in found["transforms_ms"].items())]))
    if not gpu:
        differences = {size: largest_difference_hu(patches_hu(32, size), torch.arange(32)) for size in SIZES}
        found["difference_to_monai_hu"] = differences
        print(f"\nlargest difference to MONAI's chain with the same parameters, HU: {differences}")
    add_results(command.output, {command.accelerator: found})


if __name__ == "__main__":
    main(sys.argv[1:])
