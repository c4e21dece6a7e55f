"""What has to be known about a run years later (versions, code, machine), and whether all ranks were given the same.

Ranks that would not train the same run are refused before the first step: no collective would ever notice.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
import torch.distributed as dist

from fmcib_ssl.io import redacted
from fmcib_ssl.training.non_finite import TrainingFaultError
from fmcib_ssl.training.same_run import DATA_ACCESS, flat_settings

#: Packages that can change a result.
PACKAGES = ("fmcib_ssl", "torch", "torchvision", "lightning", "monai", "SimpleITK", "numpy", "scipy", "timm")
#: Settings that each machine may have its own of: where data lie, and how they are read.
FREE_ON_EACH_RANK = (
    "name",
    "contact_sheet_rows",
    "identifiers",
    "logger",
    "paths.",
    "hardware.num_workers",
    "hardware.num_threads",
    "hardware.pin_memory",
    *DATA_ACCESS,
)
_MOST_SHOWN = 12


def environment() -> dict[str, Any]:
    """Versions of what computed, the state of the code, and the machine; plain values."""
    return {
        "command": redacted(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        # In a container there is no checkout; its image says what it was made from.
        "git": git_state(Path(__file__).parent) or {"commit": os.environ.get("FMCIB_SSL_REVISION") or None},
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout that holds `folder`; None outside one or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "uncommitted": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class RanksAgree(L.Callback):
    """Compares on all ranks, before the first step, what a run follows from.

    Args:
        facts: plain values by what they are called.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare.

        Raises:
            TrainingFaultError: on all ranks, naming what differs, and where.
        """
        if trainer.world_size == 1:
            return
        facts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(facts, self.facts)
        if lines := differences(facts):
            more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
            raise TrainingFaultError(
                "the ranks were not given the same run, and nothing was trained:\n"
                + "\n".join(f"  {line}" for line in [*lines[:_MOST_SHOWN], *more])
                + "\nStart all of them with the same command, code and lesions"
            )


def facts_of_rank(settings: Mapping[str, Any], patches: Any) -> dict[str, Any]:
    """What has to be the same on all ranks: settings, lesions in their order, code and versions.

    Args:
        settings: of the run, plain values.
        patches: its lesions; a table `lesions`, or `table.rows`, is compared without the place of the scans.
    """
    run = str(settings["paths"]["run"])
    flat = {key: value for key, value in flat_settings(settings).items() if not key.startswith(FREE_ON_EACH_RANK)}
    facts = {key: value.replace(run, "RUN") if isinstance(value, str) else value for key, value in flat.items()}
    table = patches.lesions if hasattr(patches, "lesions") else patches.table.rows
    rows = pd.util.hash_pandas_object(table.drop(columns="image_path", errors="ignore"))
    digest = hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()
    facts["lesions, in their order"] = f"{len(table)} with digest {digest[:8]}"
    versions = environment()
    facts |= {f"version of {name}": version for name, version in versions["packages"].items()}
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        facts[f"code of {file.relative_to(package.parent)}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return facts


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not the same on all ranks, a line each: every value with its ranks."""
    lines = []
    for key in dict.fromkeys(key for own in facts for key in own):
        ranks: dict[str, list[str]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(str(own.get(key, "not there")), []).append(str(rank))
        if len(ranks) > 1:
            values = (f"{value} on rank{'s' * (len(own) > 1)} {', '.join(own)}" for value, own in ranks.items())
            lines.append(f"{key}: {'; '.join(values)}")
    return lines
