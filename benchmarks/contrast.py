"""Time and peak memory of contrastive losses, forward plus backward, ours against the peers.

    python benchmarks/contrast.py                              # this machine's CPU
    python benchmarks/contrast.py --device cuda --rows 16384 131072 --dtype bfloat16

Every candidate runs in a fresh process for every repetition, and the candidates take turns, so that a machine that
gets slower slows all of them. Time is the median over repetitions of the best step of a process; memory is what a
step adds at its peak to what the inputs and a small step before it hold. Prints a table and writes it as JSON.

The peers do not all compute the same: lightly, pytorch-metric-learning and Inf-CL contrast lesions with lesions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import RESULTS, add_results, machine
from torch import Tensor

from fmcib_ssl.losses import Kernel, Negatives, NTXentNegativeMinedLoss

TEMPERATURE = 0.1
Step = Callable[[list[Tensor]], Tensor]


def published_formula(views: list[Tensor]) -> Tensor:
    """The published loss as it is written: four dense matrices, two of them for their diagonals."""
    p0, p1, n0, n1 = (F.normalize(x, dim=1) for x in views)
    diagonal = torch.eye(len(p0), device=p0.device, dtype=torch.bool)
    to_n0, to_p1, to_p0, to_n1 = (
        torch.einsum("nc,mc->nm", a, b) / TEMPERATURE for a, b in ((p0, n0), (p0, p1), (p1, p0), (p1, n1))
    )
    first = torch.cat([to_p1[diagonal].view(len(p0), -1), to_n0], dim=1)
    second = torch.cat([to_p0[diagonal].view(len(p0), -1), to_n1], dim=1)
    logits = torch.cat([first, second], dim=0)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def ours(kernel: Kernel, negatives: Negatives) -> Step:
    """Our loss, on the dictionary it takes."""
    loss = NTXentNegativeMinedLoss(TEMPERATURE, negatives=negatives, kernel=kernel)
    return lambda views: loss({"positive": (views[0], views[1]), "negative": (views[2], views[3])})


def lightly() -> Step:
    """SimCLR's loss as lightly has it."""
    from lightly.loss import NTXentLoss  # noqa: PLC0415

    loss = NTXentLoss(TEMPERATURE)
    return lambda views: loss(views[0], views[1])


def metric_learning() -> Step:
    """SimCLR's loss as pytorch-metric-learning has it."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss  # noqa: PLC0415

    loss = SelfSupervisedLoss(NTXentLoss(TEMPERATURE))
    return lambda views: loss(views[0], views[1])


def inf_cl() -> Step:
    """CLIP's loss as Inf-CL has it: both directions between the two views, GPUs only."""
    from inf_cl import cal_flash_loss  # noqa: PLC0415

    def step(views: list[Tensor]) -> Tensor:
        a, b = (F.normalize(x, dim=1) for x in views[:2])
        scale = torch.tensor(1 / TEMPERATURE, device=a.device)
        return (cal_flash_loss(a, b, scale).mean() + cal_flash_loss(b, a, scale).mean()) / 2

    return step


#: name: (how it is made, the package it needs, the least device)
CANDIDATES: dict[str, tuple[Callable[[], Step], str, str]] = {
    "published formula": (lambda: published_formula, "torch", "cpu"),
    "ours, plain": (lambda: ours("plain", "mined"), "torch", "cpu"),
    "ours, streamed": (lambda: ours("streamed", "mined"), "torch", "cpu"),
    "lightly NTXentLoss (lesions)": (lightly, "lightly", "cpu"),
    "pytorch-metric-learning NTXentLoss (lesions)": (metric_learning, "pytorch_metric_learning", "cpu"),
    "Inf-CL (lesions)": (inf_cl, "inf_cl", "cuda"),
    "ours, streamed (lesions)": (lambda: ours("streamed", "lesions"), "torch", "cpu"),
}


#: These hold matrices of rows x rows.
DENSE = ("published formula", "ours, plain", "lightly NTXentLoss (lesions)")
#: This one holds rows x rows x rows: 17 GiB at 512.
LARGEST = {"pytorch-metric-learning NTXentLoss (lesions)": 256}


class PeakMemory:
    """What is added at the peak, in MiB, within a `with` block: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.mib = 0.0

    @staticmethod
    def _resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            self.before = self.peak = self._resident_mib()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self._resident_mib())

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            self.done.set()
            self.thread.join()
        self.mib = self.peak - self.before


def measure(  # noqa: PLR0917
    name: str, rows: int, dim: int, device: str, dtype: str, threads: int, steps: int
) -> dict[str, float]:
    """Run one candidate in this process."""
    torch.set_num_threads(threads)
    step = CANDIDATES[name][0]()

    def views(num_rows: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(num_rows, dim, generator=generator) for _ in range(4)]
        return [x.to(device, getattr(torch, dtype)).requires_grad_() for x in drawn]

    small, large = views(64), views(rows)
    step(small).backward()  # libraries load, kernels compile
    with PeakMemory(device) as memory:
        loss = step(large)
        loss.backward()
        value = loss.item()
    seconds = []
    for _ in range(steps):
        for view in large:
            view.grad = None
        start = time.perf_counter()
        step(large).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "mib": memory.mib, "loss": value}


def main() -> None:
    """Let every candidate take turns in processes of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[256, 1024, 8192, 32768], help="lesions, and mined patches"
    )
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3, help="processes for each candidate")
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each process")
    parser.add_argument("--largest-dense", type=int, default=8192, help="rows up to which losses of N x M memory run")
    parser.add_argument("--output", type=Path, default=RESULTS / "contrast.json")
    parser.add_argument("--candidate", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.candidate:
        found = measure(args.candidate, args.rows[0], args.dim, args.device, args.dtype, args.threads, args.steps)
        print(json.dumps(found))
        return

    device = f"{machine(gpu=args.device == 'cuda')}, {args.threads} threads"
    print(f"{device}, torch {torch.__version__}, dim {args.dim}, {args.dtype}, medians of {args.repetitions}\n")
    print("| rows | loss | time, s | times faster than published | extra memory, MiB | of published |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    results: list[dict[str, object]] = []
    for rows in args.rows:
        measured = alternate(rows, args)
        published = measured.get("published formula")
        for name, row in measured.items():
            faster = f"{published['seconds'] / row['seconds']:.1f}" if published else ""
            share = f"1/{published['mib'] / max(row['mib'], 0.1):.0f}" if published else ""
            line = f"| {rows} | {name} | {row['seconds']:.3f} | {faster} | {row['mib']:.0f} | {share} |"
            print(line, flush=True)
            results.append({"rows": rows, "name": name, **row})
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "candidate")}
        add_results(args.output, {"machine": device, "torch": torch.__version__, **settings, "results": results})


def alternate(rows: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of all candidates that can run with so many rows, in turns."""
    names = [
        name
        for name, (_, package, least) in CANDIDATES.items()
        if importlib.util.find_spec(package)
        and (least == "cpu" or args.device == "cuda")
        and rows <= (args.largest_dense if name in DENSE else LARGEST.get(name, rows))
    ]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.repetitions):
        for name in names:
            options = ["--candidate", name, "--rows", rows]
            for option in ("dim", "device", "dtype", "threads", "steps"):
                options += [f"--{option}", getattr(args, option)]
            command = [sys.executable, __file__, *map(str, options)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} at {rows} rows failed: {done.stderr.strip()[-300:]}", file=sys.stderr)
            else:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in found) for key in ("seconds", "mib", "loss")}
        for name, found in runs.items()
        if found
    }


if __name__ == "__main__":
    main()
