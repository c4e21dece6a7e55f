"""A trainer that says nothing and writes nothing, and what the tests of callbacks put round it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar


def tiny_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    quiet["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in callbacks)
    fixed: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **fixed, "max_epochs": 1, **options})


class Figures(L.Callback):
    """Keeps what the callbacks before it have logged in each batch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def on_two_ranks(code: str) -> list[tuple[int, str]]:
    """Run Python code in two processes of one group; gives exit codes and what they have printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTEST_"))}
    group = {
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            env={**kept, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [rank.communicate(timeout=250)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, printed, strict=True)]
