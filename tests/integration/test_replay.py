"""A step that is not finite, from the run that leaves it out to the layer that is named."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny_runs import REPO, TINY, composed

from fmcib_ssl.run import pretrain
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.non_finite import TrainingFaultError
from fmcib_ssl.training.settings import Settings


class Poison(L.Callback):
    """Makes step 1 not finite, by a view or by a weight."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 1:
            return
        if self.what == "view":
            batch["positive"][0][1, 0, 3, 3, 3] = torch.nan
        else:
            with torch.no_grad():
                module.encoder.layer3[0].conv1.weight[0] = torch.inf


def settings(phantom_table: Path, run: Path, what: str, *overrides: str) -> Settings:
    poison = [f"+callbacks.poison._target_={__name__}.Poison", f"+callbacks.poison.what={what}"]
    # The guard is a run's first callback, and is to see the batch that the poison has changed: both anew, in order.
    guard = [
        "+callbacks.non_finite._target_=fmcib_ssl.training.non_finite.NonFiniteGuard",
        f"+callbacks.non_finite.folder={run}/faults",
    ]
    data = [f"data.annotations={phantom_table}", f"paths.data={phantom_table.parent}", f"paths.run={run}"]
    data += ["encoder=small", "trainer.max_epochs=1"]
    return read_settings(composed(*TINY, *data, "~callbacks.non_finite", *poison, *guard, *overrides))


def replayed(run: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "replay.py"), f"run={run}"],
        capture_output=True, text=True, encoding="utf-8", check=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("what", ["view", pytest.param("weight", marks=pytest.mark.slow)])
def test_the_layer_is_found(what: str, phantom_table: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingFaultError) as caught:
        pretrain(settings(phantom_table, tmp_path, what, "++callbacks.non_finite.stop_after=1"))
    message, printed = str(caught.value), replayed(tmp_path)
    rows = list(csv.DictReader((tmp_path / "faults" / "step-00000001" / "lesions.csv").open()))
    assert rows[1]["title"] in message and "step 1 is not finite" in message
    assert "on_non_finite=skip" in message and "fmcib-ssl replay" in message
    if what == "view":
        assert [row["views_are_finite"] for row in rows] == ["True", "False"]
        assert "views are not finite themselves" in message
        assert "that of encoder.conv1 (Conv3d), from already not finite input, in rows 1 of 8" in printed  # four views
    else:
        assert "that of encoder.layer3.0.conv1 (Conv3d), from finite input" in printed
