"""What the benchmarks share: the clock, the machine's name, where results go."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def now(*, gpu: bool) -> float:
    """Seconds: of this process's cores, so that other programs count little, or of the clock once the GPU is done."""
    if not gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def machine(*, gpu: bool) -> str:
    """The GPU's name, or the processor's as Linux or Python knows it."""
    if gpu:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def add_results(path: Path, results: dict[str, Any]) -> None:
    """Write results into a JSON file; what it has under other keys stays."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, **results}, indent=1) + "\n")


def one_line_a_row(results: dict[str, Any]) -> str:
    """JSON that a person can read and compare with an earlier one."""
    lists = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for name, rows in results.items()
        if isinstance(rows, list)
    ]
    others = [f'"{name}": {json.dumps(value)}' for name, value in results.items() if not isinstance(value, list)]
    return "{\n" + ",\n".join(others + lists) + "\n}\n"
