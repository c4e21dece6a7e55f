"""Two ranks over gloo that were not given the same run: refused before the first step, by name."""

from __future__ import annotations

import socket
from pathlib import Path

import pandas as pd
import pytest
from starts import end, start, steps_logged

pytestmark = [pytest.mark.attack, pytest.mark.slow]

OPTIONS = ["hardware.devices=2", "data.batch_size=1", "head.batch_norm=false"]


def start_ranks(tables: list[Path], run: Path, changes: list[str]) -> tuple[list[int], list[str]]:
    """Begin both, rank 1 with changes; gives their exit codes and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outputs = [run.with_name(f"rank-{rank}") for rank in range(2)]
    ranks = [
        start(
            table, outputs[rank], *OPTIONS, f"hydra.run.dir={run}", *changes * rank,
            environ={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)},
        )
        for rank, table in enumerate(tables)
    ]  # fmt: skip
    return [end(rank) for rank in ranks], [output.with_suffix(".out").read_text() for output in outputs]


def test_other_settings(phantom_table: Path, tmp_path: Path) -> None:
    changes = ["seed=7", "callbacks.non_finite.on_non_finite=skip"]
    codes, printed = start_ranks([phantom_table] * 2, tmp_path / "run", changes)
    assert codes == [1, 1], printed
    for line in (
        "seed: 0 on rank 0; 7 on rank 1",
        "callbacks.non_finite.on_non_finite: stop on rank 0; skip on rank 1",
    ):
        assert all(line in text and "Traceback" not in text for text in printed), printed
    assert steps_logged(tmp_path / "run") == 0


def test_lesions_in_another_order(phantom_table: Path, tmp_path: Path) -> None:
    other = phantom_table.with_name("other.csv")
    pd.read_csv(phantom_table).iloc[::-1].to_csv(other, index=False)
    codes, printed = start_ranks([phantom_table, other], tmp_path / "run", [])
    other.unlink()
    assert codes == [1, 1], printed
    assert all("lesions, in their order: 6 with digest" in text for text in printed), printed
