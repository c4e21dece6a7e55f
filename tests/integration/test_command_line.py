"""`python train.py` as a user types it: what it leaves and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_runs import REPO, metrics_of

OPTIONS = [
    "+experiment=ct_ntxent_mined", "encoder=small", "data.patch_size=[16,16,16]", "data.batch_size=4",
    "trainer.max_epochs=2", "hardware.num_workers=1", "callbacks.progress.refresh_rate=0",
]  # fmt: skip


def test_one_run_folder_with_everything_once(phantom_table: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), *OPTIONS, f"data.annotations={phantom_table}"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    (run,) = (tmp_path / "runs" / "ct_ntxent_mined").iterdir()
    expected = "checkpoints config.yaml contact_sheet.png curves.png curves.svg encoder.safetensors environment.json"
    expected += " metrics.csv train.log run.json .lock"
    assert {path.name for path in run.iterdir() if path.stat().st_size} == set(expected.split())
    assert metrics_of(run)["step"].tolist() == [0, 1]
    log = (run / "train.log").read_text()
    assert "6 in 4 scans" in log and "2 in all, 1 an epoch" in log and " 4 lesions on each of" in log
    for text in (log, printed):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        assert len(lines) == len(set(lines)), lines
        assert "Traceback" not in text and "Warning" not in text and "deprecated" not in text
