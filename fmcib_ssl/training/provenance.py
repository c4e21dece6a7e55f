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

import pandas as pd
import torch
import torch.distributed as dist

from fmcib_ssl.io import redacted
from fmcib_ssl.training.same_run import DATA_ACCESS, flat_settings
from fmcib_ssl.training.settings import ConfigError

#: Packages that can change a result.
PACKAGES = ("fmcib_ssl", "torch", "torchvision", "lightning", "monai", "SimpleITK", "numpy", "scipy", "timm")
#: Settings that each machine may have its own of: where data lie, and how they are read.
_FREE_ON_EACH_RANK = (
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
_MAX_SHOWN = 12


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


def check_ranks_agree(facts: Mapping[str, Any]) -> None:
    """Compare, on all ranks, what a run follows from: plain values by what they are called.

    Raises:
        ConfigError: on all ranks, naming what differs, and where.
    """
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, dict(facts))
    if lines := differences(of_all):
        more = [f"and {len(lines) - _MAX_SHOWN} more"] if len(lines) > _MAX_SHOWN else []
        raise ConfigError(
            "the ranks were not given the same run, and nothing was trained:\n"
            + "\n".join(f"  {line}" for line in [*lines[:_MAX_SHOWN], *more])
            + "\nStart all of them with the same command, code and lesions"
        )


def facts_of_rank(settings: Mapping[str, Any], patches: Any) -> dict[str, Any]:
    """What has to be the same on all ranks: settings, lesions in their order, code and versions.

    Args:
        settings: of the run, plain values.
        patches: whose table `lesions` is compared without the place of the scans.
    """
    run = str(settings["paths"]["run"])
    flat = {key: value for key, value in flat_settings(settings).items() if not key.startswith(_FREE_ON_EACH_RANK)}
    facts = {key: value.replace(run, "RUN") if isinstance(value, str) else value for key, value in flat.items()}
    table = patches.lesions
    rows = pd.util.hash_pandas_object(table.drop(columns="image_path", errors="ignore"))
    digest = hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()
    facts["lesions, in their order"] = f"{len(table)} with digest {digest[:8]}"
    facts |= {f"version of {name}": _version(name) for name in PACKAGES}
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
            ranks.setdefault(str(own.get(key, "missing")), []).append(str(rank))
        if len(ranks) > 1:
            values = (f"{value} on rank{'s' * (len(own) > 1)} {', '.join(own)}" for value, own in ranks.items())
            lines.append(f"{key}: {'; '.join(values)}")
    return lines
