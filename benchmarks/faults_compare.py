"""What a run or a store has come to, compared to one that nothing happened to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from faults_runs import NUM_STEPS

from fmcib_ssl.data import Store

#: Figures that a clock has made.
TIMED = re.compile("perf/.*")


def steps_logged(run: Path) -> int:
    """Rows in the metrics so far."""
    return max(0, _read(run / "metrics.csv").count(b"\n") - 1)


def steps_saved(run: Path) -> int:
    """Steps after which the newest checkpoint was taken."""
    return max((int(file.name[5:13]) for file in run.glob("checkpoints/step-*.ckpt")), default=0)


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process was killed."""
    return any(run.glob("checkpoints/.step-*.tmp"))


def scans_done(store: Path) -> int:
    """Scans of a store that are finished."""
    return len(list((store / "scans").glob("*.json")))


def differences_of_runs(run: Path, whole: Path) -> list[str]:
    """What a finished run has that differs from the uninterrupted one; nothing that a clock has made counts."""
    found = []
    checkpoints = [
        torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        for folder in (run, whole)
    ]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops", "fmcib_ssl_rng"):
        if part == "fmcib_ssl_rng":  # of CUDA nothing, and of Python's own what Lightning's seeding left
            equal = _same(*[[state["torch"] for state in one[part]] for one in checkpoints])
        else:
            equal = _same(*[one[part] for one in checkpoints])
        if not equal:
            found.append(f"checkpoint: {part}")
    tables = [pd.read_csv(folder / "metrics.csv", dtype=str) for folder in (run, whole)]
    if tables[0]["step"].tolist() != [str(step) for step in range(NUM_STEPS)]:
        found.append(f"metrics.csv: steps {' '.join(tables[0]['step'])}")
    tables = [table[sorted(name for name in table if not TIMED.match(name))] for table in tables]
    if not tables[0].equals(tables[1]):
        found.append("metrics.csv: values")
    if _weights(run) != _weights(whole):
        found.append("encoder.safetensors")
    if json.loads((run / "run.json").read_text())["finished"] is None:
        found.append("run.json: not finished")
    return found + _other_files(run, whole)


def differences_of_stores(store: Path, whole: Path) -> list[str]:
    """What a finished store has that differs from the one made without a stop: its lesions, then file by file."""
    if not Store(store).lesions.equals(Store(whole).lesions):
        return ["the index of lesions"]
    suffixes = (".b2nd", ".cells", ".sums", ".json")
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.suffix in suffixes]
    found = [f"{name}: bytes" for name in names if _read(store / name) != _read(whole / name)]
    return found + _other_files(store, whole)


def _other_files(folder: Path, whole: Path) -> list[str]:
    """Files that are too many or missing: a leftover that nobody takes away would be one."""
    names = [
        # A signal's save may be the last but one that is kept.
        {
            re.sub(r"step-\d+\.ckpt", "step.ckpt", str(path.relative_to(one)))
            for path in one.rglob("*")
            if path.is_file()
        }
        for one in (folder, whole)
    ]
    names = [
        {name for name in one if not name.endswith(".log")} for one in names
    ]  # a launcher's second rank has its own
    num_checkpoints = [len(list(one.glob("checkpoints/*"))) for one in (folder, whole)]
    if num_checkpoints[0] != num_checkpoints[1]:
        return [f"{num_checkpoints[0]} files in checkpoints"]
    return [f"{name} is {'new' if name in names[0] else 'missing'}" for name in sorted(names[0] ^ names[1])]


def _weights(run: Path) -> bytes:
    """The tensors of an exported encoder; what stands before them names the run."""
    content = _read(run / "encoder.safetensors")
    return content[8 + int.from_bytes(content[:8], "little") :]


def _same(one: Any, other: Any) -> bool:
    """Nested values, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
