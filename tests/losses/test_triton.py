"""Triton's kernels under the same tests as the others, on the CPU through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this run interprets Triton already")
def test_the_contract_holds_for_triton():
    pytest.importorskip("triton")
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_contrast.py", "test_streamed.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton and not infonce",
        *files,
    ]
    # The switch is read when the kernels are first imported, so it takes a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here.parents[1], check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "failed" not in run.stdout
