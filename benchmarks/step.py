"""The published recipe's training step against ours, and what each switch adds, in one run.

    python benchmarks/step.py                                  # a CPU: the demo's encoder, patches and batch
    python benchmarks/step.py encoder=resnet18 lesions=8       # the same with another encoder
    python benchmarks/step.py form=gpu                         # a GPU: the published trunk, 32 lesions of 50³

The first row is the recipe as it was published: float32, uncompiled, four passes through the encoder, views made one by
one by MONAI in three workers. Each row below adds one setting to those above it, on the same patches from memory. The
rows with "and" each change one setting of the last row without. A step is views, embeddings of four views a lesion,
loss, backward and the optimizer's step. Contenders take turns; figures are medians over rounds, ratios medians of the
rounds' ratios.

On a CPU everything runs in this process, in seconds of a core, so other programs count little; data are the views. On a
GPU it is seconds of the clock, views come from workers, and each step is waited for, as in a run that logs every step;
data are what the step waits for. Prints a table and adds it to benchmarks/results/step.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from hydra import compose, initialize_config_dir
from large_batches import peak_mib
from measure import REPO, RESULTS, add_results, machine, now
from pydantic import Field, PositiveInt
from torch import Tensor

from fmcib_ssl.data import LesionDataModule
from fmcib_ssl.io import Command, parse_command
from fmcib_ssl.models import MinedContrast, resolve_precision
from fmcib_ssl.training import (
    CONFIG_NAME,
    Settings,
    accelerate,
    build_module,
    build_views,
    flops_of_lesion,
    read_settings,
)
from fmcib_ssl.types import PatchPair, Preprocessing, SampleKey

#: Each adds to those before it. The first is the published recipe.
LADDER: dict[str, list[str]] = {
    "published": [
        "method.forwards=separate",
        "hardware.precision=32-true",
        "hardware.skip_padded_kernels=false",
        "augment=published",
        "hardware.num_workers=3",
    ],
    "method.forwards=joint": ["method.forwards=joint"],
    "hardware.channels_last=true": ["hardware.channels_last=true"],
    "hardware.skip_padded_kernels=true": ["hardware.skip_padded_kernels=true"],
    "hardware.precision=auto": ["hardware.precision=auto"],  # on a CPU float32, as above
    "augment=batched_published": ["augment=batched_published", "hardware.num_workers=8"],
}
#: Each alone on top of the last above.
ALONE: dict[str, list[str]] = {
    "and hardware.compile=true": ["hardware.compile=true"],
    "and hardware.precision=bf16-mixed": ["hardware.precision=bf16-mixed"],
    "and hardware.gradient_checkpointing=true": ["hardware.gradient_checkpointing=true"],
    "and trainer.accumulate_grad_batches=2, half a batch": ["trainer.accumulate_grad_batches=2"],
}
#: Dense peaks of cards by a part of their names, without sparsity; NVIDIA's data sheets.
PEAK_BF16_FLOPS = {"H200": 989.5e12, "H100 80GB HBM3": 989.5e12, "H100 PCIe": 756e12, "A100": 312e12, "A40": 149.7e12}
#: Batches that workers have ready before a round, and that would cost nothing.
NUM_UNTIMED = 20


class StepBenchmark(Command):
    """Measure the training step: the published recipe's against ours, and each switch."""

    form: Literal["cpu", "gpu"] = Field("cpu", description="cpu: this process alone; gpu: a GPU, and workers")
    encoder: str | None = Field(None, description="of configs/encoder; null: small (cpu), resnet50_wide (gpu)")
    patch: PositiveInt | None = Field(None, description="voxels along an edge; null: 24 (cpu), 50 (gpu)")
    lesions: PositiveInt | None = Field(None, description="of a batch; null: 60 (cpu), 32 (gpu)")
    rounds: PositiveInt = Field(5, description="turns of every contender")
    steps: PositiveInt | None = Field(None, description="of a turn; null: 1 (cpu), 40 (gpu)")
    compile: bool = Field(True, description="false: leave out compilation and its minute or more")
    output: Path = Field(RESULTS / "step.json", description="JSON file that the results are added to")


class Case(NamedTuple):
    """What is measured, with defaults filled in."""

    gpu: bool
    encoder: str
    patch: int
    lesions: int
    steps: int

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return torch.device("cuda" if self.gpu else "cpu")


class Patches:
    """Lesions without end, of a few patches in memory: smooth structure and noise, int16 HU."""

    def __init__(self, num_lesions: int, size: int) -> None:
        rng = torch.Generator().manual_seed(0)
        coarse = torch.randn(64, 1, 6, 6, 6, generator=rng) * 400 - 300
        hu = torch.nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear")
        hu += torch.randn(hu.shape, generator=rng) * 40
        self.patches, self.num_lesions = hu.clamp(-1024, 3071).to(torch.int16), num_lesions

    def __len__(self) -> int:
        """As many as a benchmark needs."""
        return self.num_lesions

    def __getitem__(self, key: SampleKey) -> PatchPair:
        """Two of the patches."""
        positive, negative = (self.patches[(2 * key.index + i) % len(self.patches)] for i in range(2))
        return PatchPair(positive=positive, negative=negative, lesion=key.index, negative_from_other_scan=False)

    def title(self, lesion: int) -> str:
        """What `PatchPairs` asks for."""
        return str(lesion)


class Contender:
    """A step as a configuration asks for it: built by what a run is built by, without the trainer around it.

    Args:
        case: what is measured.
        overrides: of the configuration.
    """

    def __init__(self, case: Case, overrides: Sequence[str]) -> None:
        self.case, settings = case, configured(case, overrides)
        self.accumulate = settings.trainer.accumulate_grad_batches
        size = (case.patch,) * 3
        torch.manual_seed(0)
        per_pass = case.lesions // self.accumulate
        module = build_module(settings, Preprocessing(size), per_pass, num_steps=1000)
        module.to(memory_format=torch.contiguous_format)  # some encoders choose their layout by themselves
        accelerate(module, module.encoder, settings.hardware)
        self.module = cast(MinedContrast, module.to(case.device).train())
        self.optimizer = module.make_optimizer(module.named_parameters())
        precision = resolve_precision(settings.hardware.precision, settings.hardware.accelerator)
        self.autocast = torch.autocast(case.device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
        view_transform = build_views(settings)
        num_batches = case.steps * self.accumulate + NUM_UNTIMED
        self.data = LesionDataModule(
            Patches(num_batches * per_pass, case.patch),
            view_transform,
            batch_size=per_pass,
            num_workers=settings.hardware.num_workers if case.gpu else 0,
            pin_memory=case.gpu,
            augment_on="workers" if getattr(view_transform, "patch_by_patch", False) else "device",
        )
        self.loader = self.data.train_dataloader()

    def step(self, batches: Iterator[Any]) -> float:
        """Take one optimizer step; gives the seconds that data took, as the module says what that is."""
        waited = 0.0
        for _ in range(self.accumulate):
            began = now(gpu=self.case.gpu)
            batch = self.data.on_before_batch_transfer(next(batches), 0)
            waited += now(gpu=self.case.gpu) - began
            began = now(gpu=self.case.gpu)
            batch = self.module.transfer_batch_to_device(batch, self.case.device, 0)
            batch = self.data.on_after_batch_transfer(batch, 0)
            waited += 0.0 if self.case.gpu else now(gpu=self.case.gpu) - began
            with self.autocast:
                loss = self.module.loss(self.module.embed(batch)) / self.accumulate
            cast(Tensor, loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return waited

    def turn(self) -> tuple[float, float]:
        """Seconds a lesion: all, and those for data."""
        batches = iter(self.loader)
        for _ in range(NUM_UNTIMED // self.accumulate if self.case.gpu else 0):
            self.step(batches)
        began = now(gpu=self.case.gpu)
        waited = sum(self.step(batches) for _ in range(self.case.steps))
        num_lesions = self.case.steps * self.case.lesions
        return (now(gpu=self.case.gpu) - began) / num_lesions, waited / num_lesions

    def peak_mib(self) -> float:
        """The most that a step holds beyond weights and optimizer."""
        batches = iter(self.loader)
        return peak_mib(lambda: self.step(batches) and None, self.case.device.type)


def configured(case: Case, overrides: Sequence[str]) -> Settings:
    """The settings of a run with these overrides."""
    experiment = "deeplesion_ntxent_mined" if case.gpu else "phantom_ntxent_mined"
    base = [
        f"+experiment={experiment}",
        f"hardware={'gpu' if case.gpu else 'cpu'}",
        f"encoder={case.encoder}",
        f"data.patch_size=[{case.patch},{case.patch},{case.patch}]",
        f"data.batch_size={case.lesions}",
        "data.annotations=none.csv",  # patches come from memory
        "paths.run=none",
    ]
    with initialize_config_dir(version_base="1.3", config_dir=str(REPO / "configs")):
        return read_settings(compose(CONFIG_NAME, [*base, *overrides]))


def contenders_of(case: Case, *, compiled: bool) -> dict[str, Contender]:
    """All rows of the table."""
    overrides: dict[str, str] = {}
    found = {}

    def taken(more: Sequence[str]) -> list[str]:
        values = {**overrides, **dict(override.split("=", 1) for override in more)}  # type: ignore[misc]
        return [f"{key}={value}" for key, value in values.items()]

    for name, added in LADDER.items():
        overrides.update(dict(override.split("=", 1) for override in added))  # type: ignore[misc]
        found[name] = Contender(case, taken([]))
    for name, added in ALONE.items():
        if compiled or "compile" not in name:
            found[name] = Contender(case, taken(added))
    return found


def copy_ms(case: Case) -> float:
    """What copying a batch of int16 patches to the GPU takes, were it overlapped with nothing."""
    patches = torch.empty(2 * case.lesions, 1, *(case.patch,) * 3, dtype=torch.int16).pin_memory()
    times = []
    for _ in range(20):
        began = now(gpu=case.gpu)
        patches.to(case.device, non_blocking=True)
        times.append((now(gpu=case.gpu) - began) * 1e3)
    return statistics.median(times)


def measure(case: Case, command: StepBenchmark) -> dict[str, Any]:
    """Every contender in turns."""
    contenders = contenders_of(case, compiled=command.compile)
    first_step_s = {}
    for name, contender in contenders.items():
        began = time.perf_counter()
        contender.step(iter(contender.loader))  # libraries load, the encoder is compiled, the optimizer gets its state
        first_step_s[name] = time.perf_counter() - began
    mib = {name: contender.peak_mib() for name, contender in contenders.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(command.rounds):
        for name, contender in contenders.items():
            turns[name].append(contender.turn())
    flops = flops_of_lesion(contenders["published"].module, (case.patch,) * 3, num_views=4)
    card = torch.cuda.get_device_name() if case.gpu else None
    peak = next((flops for part, flops in PEAK_BF16_FLOPS.items() if card and part in card), None)
    base, rows = turns["published"], {}
    for name, found in turns.items():
        seconds, waited = (statistics.median(column) for column in zip(*found, strict=True))
        in_step = statistics.median(whole - wait for whole, wait in found)
        rows[name] = {
            "ms_per_lesion": seconds * 1e3,
            "ms_of_them_for_data": waited * 1e3,
            "lesions_per_s": 1 / seconds,
            "times_faster": statistics.median(b[0] / t[0] for b, t in zip(base, found, strict=True)),
            "times_faster_without_data": statistics.median(
                (b[0] - b[1]) / (t[0] - t[1]) for b, t in zip(base, found, strict=True)
            ),
            "tflops": flops / in_step / 1e12,
            "share_of_peak": flops / in_step / peak if peak else None,
            "peak_mib": mib[name],
            "first_step_s": first_step_s[name],
            "by_round": found,
        }
    return {
        "machine": machine(gpu=case.gpu),
        "cores": 1 if not case.gpu else None,
        "torch": torch.__version__,
        "command": command.model_dump(mode="json", exclude={"output"}),
        "rounds": command.rounds,
        **case._asdict(),
        "gflop_per_lesion": flops / 1e9,
        "copy_ms_per_batch": copy_ms(case) if case.gpu else None,
        "rows": rows,
    }


def markdown(results: dict[str, Any]) -> str:
    """The table for the docs."""
    unit = "ms" if results["gpu"] else "ms of a core"
    size = " x ".join([str(results["patch"])] * 3)
    lines = [
        f"{results['encoder']}, {results['lesions']} lesions of {size} voxels, "
        f"{results['gflop_per_lesion']:.3g} GFLOP a lesion; {results['machine']}, torch {results['torch']}",
        "",
        f"| with | {unit} a lesion | of them for data | lesions/s | times the first | without data | TFLOP/s | "
        "of peak | MiB | first step, s |",
        "| --- |" + " ---: |" * 9,
    ]
    for name, row in results["rows"].items():
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        lines.append(
            f"| {name} | {row['ms_per_lesion']:.3g} | {row['ms_of_them_for_data']:.2g} | {row['lesions_per_s']:.3g} | "
            f"{row['times_faster']:.2f} | {row['times_faster_without_data']:.2f} | {row['tflops']:.3g} | {share} | "
            f"{row['peak_mib']:.0f} | {row['first_step_s']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, add to the results."""
    command = parse_command(StepBenchmark, arguments)
    gpu = command.form == "gpu"
    if gpu and not torch.cuda.is_available():
        raise SystemExit("form=gpu: torch sees no GPU on this machine")
    case = Case(
        gpu,
        command.encoder or ("resnet50_wide" if gpu else "small"),
        command.patch or (50 if gpu else 24),
        command.lesions or (32 if gpu else 60),
        command.steps or (40 if gpu else 1),
    )
    if not gpu:
        torch.set_num_threads(1)
    results = measure(case, command)
    print(markdown(results))
    add_results(command.output, {f"{command.form} {case.encoder}": results})


if __name__ == "__main__":
    main(sys.argv[1:])
