"""The data that whole runs are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import NUM_SCANS

from fmcib_ssl.data.phantom import make_archive


@pytest.fixture(scope="session")
def phantom_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a small phantom archive; rows and scans are not to be changed."""
    return make_archive(tmp_path_factory.mktemp("phantom"), NUM_SCANS, progress=False)
