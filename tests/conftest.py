"""Fixtures that every test may use."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# PyKEEN, the losses' oracle, registers torch's schedulers by name when it is imported, and fails once MONAI has added
# another of one name.
with contextlib.suppress(ImportError):
    import pykeen.losses  # noqa: F401

# A shell's background job ignores Ctrl-C, and nohup's a hang-up; so would all processes that tests start.
for _ignored, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, _default)

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run side by side; each gets one core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _levels_of_logging() -> Iterator[None]:
    """Runs and benchmarks quieten libraries for good; the next test wants to hear them."""
    loggers = [logging.getLogger(name) for name in ("fmcib_ssl", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT scans and published tables, where the machine has one."""
    folder = Path(os.environ.get("FMCIB_SSL_TEST_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "ct" / "annotations.csv").is_file():
        pytest.skip(f"no real CT data at {folder}; set FMCIB_SSL_TEST_DATA to its folder")
    return folder
