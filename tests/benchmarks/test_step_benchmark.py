"""The benchmark of the step measures what it says: the rows are those settings, the figures those formulas."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step as step_benchmark  # noqa: E402
import step_curves  # noqa: E402

from fmcib_ssl.augment import BatchedPublishedViews, PublishedViews  # noqa: E402


@pytest.fixture
def case() -> step_benchmark.Case:
    return step_benchmark.Case(gpu=False, encoder="small", patch=12, lesions=4, steps=1)


def test_rows_are_what_they_are_called(case: step_benchmark.Case) -> None:
    rows = step_benchmark.contenders_of(case, compiled=False)
    published, joint, last = (
        rows[name] for name in ("published", "method.forwards=joint", "hardware.channels_last=true")
    )
    assert published.module.forwards == "separate" and joint.module.forwards == "joint"
    assert isinstance(published.data.dataset.view_transform, PublishedViews)
    weights = [row.module.encoder.layer2[0].conv1.weight for row in (joint, last)]
    assert [w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights] == [False, True]
    trimmed = [
        "forward" in vars(row.module.encoder.layer2[0].conv1)
        for row in (last, rows["hardware.skip_padded_kernels=true"])
    ]
    assert trimmed == [False, True]
    assert isinstance(joint.autocast, type(published.autocast))
    ours = rows["augment=batched_published"]
    assert isinstance(ours.data.dataset.view_transform, BatchedPublishedViews)
    recomputed = rows["and hardware.gradient_checkpointing=true"]
    blocks = [row.module.encoder.layer2[0] for row in (ours, recomputed)]
    assert ["forward" in vars(block) for block in blocks] == [False, True]
    accumulated = rows["and trainer.accumulate_grad_batches=2, half a batch"]
    assert (ours.accumulate, accumulated.accumulate) == (1, 2)
    assert len(next(iter(accumulated.loader))["lesion"]) == 2
    states = [row.module.state_dict() for row in rows.values()]
    assert all(torch.equal(state[name], value) for state in states for name, value in states[0].items())


def test_the_table_of_a_tiny_case(
    case: step_benchmark.Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
