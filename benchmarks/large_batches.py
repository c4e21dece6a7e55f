"""Memory and time of a training step whose batch is embedded in chunks, against direct steps.

    python benchmarks/large_batches.py                            # this machine's CPU, a minute on a quiet one
    python benchmarks/large_batches.py --device cuda --chunk 32   # the same on a GPU, with bf16 autocast

A step is what a training step computes: embeddings of four views a lesion, loss, backward, optimizer step. Memory is
the most that torch's allocator holds within a step, less what it holds before it: weights, optimizer state and, on
the host, the views. Embeddings, gradients, and what a step brings of the views to a GPU count. On a CPU the
allocations are those in the trace of torch's profiler, in a step that is not timed. Steps take turns; time is the
median, on a CPU of processor time, where other programs count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import RESULTS, add_results, machine, now
from torch import nn

from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast, Parts, feature_dim, small_resnet
from fmcib_ssl.types import ViewPairs


class Case(NamedTuple):
    """A step: so many lesions, embedded at once or in chunks."""

    lesions: int
    chunk: int | None


def make_step(case: Case, patch: int, device: str) -> Callable[[], None]:
    """A step of this case, with weights and views of its own."""
    torch.manual_seed(0)
    encoder = small_resnet()
    head = nn.Linear(feature_dim(encoder, (patch,) * 3), 128)
    loss = NTXentNegativeMinedLoss(negatives="mined_and_lesions")
    parts = Parts(encoder, partial(make_optimizer, lr=1e-3), head=head, loss=loss)
    module = MinedContrast(parts, chunk_size=case.chunk).to(device)
    optimizer = make_optimizer(module.named_parameters(), lr=1e-3)
    views = [torch.randn(case.lesions, 1, patch, patch, patch, pin_memory=device == "cuda") for _ in range(4)]

    def step() -> None:
        host: ViewPairs = {"positive": (views[0], views[1]), "negative": (views[2], views[3])}
        batch = module.transfer_batch_to_device(host, torch.device(device), 0)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = module.loss(module.embed(batch))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_optimizer(named_parameters: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW over everything."""
    return torch.optim.AdamW([parameter for _, parameter in named_parameters], lr)


def peak_mib(step: Callable[[], None], device: str) -> float:
    """The most that a step allocates at once, beyond what is there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in changes:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    """Measure, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=8, help="lesions embedded at a time")
    parser.add_argument("--times", type=int, nargs="+", default=[16, 64], help="lesions of a batch, in chunks")
    parser.add_argument(
        "--largest-direct", type=int, default=128, help="lesions up to which a batch is embedded at once"
    )
    parser.add_argument("--patch", type=int, default=32, help="voxels along an edge")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "large_batches.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cases = [Case(args.chunk, None)]
    for times in args.times:
        lesions = times * args.chunk
        cases += [Case(lesions, None)] if lesions <= args.largest_direct else []
        cases += [Case(lesions, args.chunk)]
    steps = {case: make_step(case, args.patch, args.device) for case in cases}
    for step in steps.values():
        step()  # libraries load, optimizers make their state
    peaks = {case: peak_mib(step, args.device) for case, step in steps.items()}
    durations: dict[Case, list[float]] = {case: [] for case in cases}
    for _ in range(args.repetitions):
        for case, step in steps.items():
            began = now(gpu=args.device == "cuda")
            step()
            durations[case].append(now(gpu=args.device == "cuda") - began)

    device = f"{machine(gpu=args.device == 'cuda')}, {args.threads} threads"
    print(f"{device}, torch {torch.__version__}, small_resnet, {args.patch}^3 voxels, medians of {args.repetitions}\n")
    print("| lesions | chunk | peak memory, MiB | of the chunk's own step | time, s | of the direct step |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    results = []
    for case in cases:
        mib, took = peaks[case], statistics.median(durations[case])
        direct = durations.get(Case(case.lesions, None))
        share = f"{took / statistics.median(direct):.2f}" if direct and case.chunk else ""
        relative = f"{mib / peaks[cases[0]]:.2f}"
        print(f"| {case.lesions} | {case.chunk or 'direct'} | {mib:.1f} | {relative} | {took:.3f} | {share} |")
        results.append({**case._asdict(), "mib": mib, "seconds": took})
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    add_results(args.output, {"machine": device, "torch": torch.__version__, **settings, "results": results})


if __name__ == "__main__":
    main()
