"""The benchmark of the step measures what it says: the rows are those settings, the figures those formulas."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step as step_benchmark  # noqa: E402
import step_curves  # noqa: E402


@pytest.mark.slow
def test_the_table_of_a_tiny_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "step.json"
    output.write_text('{"gpu resnet50_wide": 1}')
    arguments = ["compile=false", "rounds=2", "patch=16", "lesions=8", f"output={output}"]
    step_benchmark.main(arguments)
    results = json.loads(output.read_text())
    assert results["gpu resnet50_wide"] == 1  # of another machine: stays
    found = results["cpu small"]
    assert len(found["rows"]) == 9
    assert capsys.readouterr().out.count("\n| ") == 1 + 1 + 9
    for row in found["rows"].values():
        data, whole = row["ms_of_them_for_data"], row["ms_per_lesion"]
        assert 0 < data < whole and row["lesions_per_s"] == pytest.approx(1e3 / whole)
        assert row["peak_mib"] > 0
    of_one = found["rows"]["augment=batched_published"]
    half = found["rows"]["and trainer.accumulate_grad_batches=2, half a batch"]["peak_mib"]
    assert half < of_one["peak_mib"]
    in_step = np.median([whole - data for whole, data in of_one["by_round"]])
    assert of_one["tflops"] == pytest.approx(found["gflop_per_lesion"] / in_step / 1e3)


def test_curves_are_compared_with_the_spread_of_seeds() -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal([5, 3, 1], 1, (200, 3))
    same = step_curves.compare(plain, plain + 0.01)
    assert same["same_seed_apart_in_sd_rms"] == pytest.approx(0.01, rel=0.2)
    assert same["means_apart_in_sd_last"] == pytest.approx(0.01 / plain[:, -1].std(ddof=1))
    other = step_curves.compare(plain, rng.permutation(plain))
    assert other["same_seed_apart_in_sd_rms"] == pytest.approx(other["two_seeds_apart_in_sd_rms"], rel=0.1)
    assert step_curves.compare(plain, plain + 9)["share_within_range_of_plain"] == 0
