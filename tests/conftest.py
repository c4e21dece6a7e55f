"""Fixtures that every test may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

# PyKEEN, the losses' oracle, registers torch's schedulers by name when it is imported, and fails once MONAI has added
# another of one name.
with contextlib.suppress(ImportError):
    import pykeen.losses  # noqa: F401

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run side by side; each gets one core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT scans and published tables, where the machine has one."""
    folder = Path(os.environ.get("FMCIB_SSL_TEST_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "ct" / "annotations.csv").is_file():
        pytest.skip(f"no real CT data at {folder}; set FMCIB_SSL_TEST_DATA to its folder")
    return folder
