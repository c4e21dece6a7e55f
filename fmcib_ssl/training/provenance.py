"""What has to be known about a run years later: versions, code, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fmcib_ssl.io import write_atomically
from fmcib_ssl.safety import redacted

#: Packages that can change a result.
PACKAGES = ("fmcib_ssl", "torch", "torchvision", "lightning", "monai", "SimpleITK", "numpy", "scipy", "timm")


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


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write plain values where a person can read them."""
    write_atomically(path, json.dumps(values, indent=2, default=str) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
