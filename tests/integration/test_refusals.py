"""What cannot work is named before the first step."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import NUM_SCANS, REPO, composed, tiny_settings

from fmcib_ssl.run import pretrain
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.settings import ConfigError

TORCH = "torch.nn"
#: An encoder that takes no patch below nine voxels.
WIDE_KERNEL = (
    f"+encoder={{_target_: {TORCH}.Sequential, _args_: [{{_target_: {TORCH}.Conv3d, in_channels: 1, out_channels: 2, "
    f"kernel_size: 9}}, {{_target_: {TORCH}.AdaptiveAvgPool3d, output_size: 1}}, {{_target_: {TORCH}.Flatten}}]}}"
)
#: One that forgets to flatten.
FEATURE_MAPS = f"+encoder={{_target_: {TORCH}.Conv3d, in_channels: 1, out_channels: 2, kernel_size: 3}}"

#: Augmentation that scales intensities itself.
SCALED = (
    "+augment={_target_: fmcib_ssl.augment.MonaiViews, transforms: "
    "[{_target_: monai.transforms.NormalizeIntensity, subtrahend: -1024, divisor: 3072}]}"
)

CONTRADICTIONS = [
    (["data.batch_size=7"], ["data.batch_size=7", "6 that can be used", "data.batch_size=auto"]),
    (["data.batch_size=4", "hardware.devices=2"], ["2 devices", "8 lesions", "6 that can be used"]),
    (["data.batch_size=auto", "hardware.devices=7"], ["6 lesions for 7 devices", "fewer devices"]),
    (["hardware=gpu"], ["hardware.devices=1", "sees 0 GPUs", "hardware=cpu"]),
    (["hardware=ddp"], ["hardware.devices=2", "sees 0 GPUs", "hardware=cpu"]),
    (["~encoder", WIDE_KERNEL, "data.patch_size=[8,16,16]"], ["data.patch_size", "(8, 16, 16)", "too small"]),
    (["~encoder", FEATURE_MAPS], ["encoder", "(batch, features)"]),
    (
        ["loss.negatives=lesions", "data.batch_size=auto", "data.select={PatientID: phantom_0001}"],
        ["loss.negatives=lesions", "one lesion a step", "loss.negatives=mined"],
    ),
    (["method.forwards=both"], ["section method", "'joint' or 'separate'"]),
    (["data.select={split: trian}"], ["data.select", "trian"]),
    (["data.select={splt: train}"], ["data.select", "'splt'", "label, split"]),
    (["encoder=resnet18", "encoder.depth=19"], ["section encoder", "depth=19", "18, 34"]),
    (["loss.temperature=0"], ["section loss", "temperature"]),
    (["+loss.temprature=0.2"], ["section loss", "temprature"]),
    (["loss.negatives=none"], ["section loss", "'none'", "mined_and_lesions"]),
    (["augment.crop_edge=[2,3]"], ["section augment", "crop_edge"]),
    (["~augment", SCALED], ["section augment", "view from 0.00", "normalised once"]),
    (["optimizer.base_lr=-1"], ["section optimizer", "learning rate"]),
    (["~optimizer.base_lr"], ["section optimizer", "base_lr"]),
    (["schedule.warmup=10"], ["section schedule", "warm-up of 10 steps", "the 2 steps of training"]),
    (["hardware.precision=bf17"], ["section hardware", "'bf17'", "bf16-mixed"]),
    (["hardware.strategy=dpp"], ["section hardware", "'dpp'"]),
    (["+trainer.profile=simple"], ["trainer", "'profile'"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), CONTRADICTIONS, ids=lambda value: " ".join(value)[:60])
def test_a_contradiction_is_named_before_the_first_step(
    overrides: list[str], fragments: list[str], phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ours = [] if "~encoder" in overrides or "encoder=resnet18" in overrides else ["encoder=small"]
    settings = tiny_settings(phantom_table, tmp_path, *ours, "trainer.max_steps=2", *overrides)
    with pytest.raises(ConfigError) as caught:
        pretrain(settings)
    message = str(caught.value)
    assert not [fragment for fragment in fragments if fragment not in message], message
    assert not (tmp_path / "metrics.csv").exists()
    assert not (tmp_path / "encoder.safetensors").exists()


def test_an_archive_made_otherwise_is_not_mixed_with_this_one(phantom_table: Path, tmp_path: Path) -> None:
    overrides = [f"data.phantom.folder={phantom_table.parent}", f"data.phantom.num_scans={NUM_SCANS + 1}"]
    settings = read_settings(composed("data=phantom", "hardware=cpu", f"paths.run={tmp_path}", *overrides))
    with pytest.raises(ConfigError, match=r"data\.phantom.*delete that folder or give another"):
        pretrain(settings)


@pytest.fixture
def table_with_bad_rows(phantom_table: Path, tmp_path: Path) -> Path:
    """Four good rows and, as rows 2 and 4, a point far outside and a scan that does not exist."""
    good = pd.read_csv(phantom_table)
    far, absent = good.iloc[[0]].assign(coordZ=9999.0), good.iloc[[0]].assign(image_path="scans/absent.nii.gz")
    table = tmp_path / "table.csv"
    pd.concat([good.iloc[:1], far, good.iloc[1:2], absent, good.iloc[2:4]]).to_csv(table, index=False)
    shutil.copytree(phantom_table.parent / "scans", tmp_path / "scans")
    return table


def test_bad_rows_are_listed_and_refused(table_with_bad_rows: Path, tmp_path: Path) -> None:
    """From the command line: the message, the exit status and no traceback."""
    command = [sys.executable, str(REPO / "train.py"), f"data.annotations={table_with_bad_rows}"]
    options = ["data.patch_size=[16,16,16]", "encoder=small", "hydra.run.dir=run"]
    result = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    assert "2 of 6 rows cannot be used" in error
    assert "row 2: scans/phantom_0000.nii.gz" in error and "outside the scan" in error
    assert "row 4: scans/absent.nii.gz" in error and "on_bad_row=skip" in error
    rejected = pd.read_csv(tmp_path / "run" / "rejected.csv")
    assert rejected["row"].tolist() == [2, 4]
    assert rejected["image_path"].tolist() == ["scans/phantom_0000.nii.gz", "scans/absent.nii.gz"]
    assert not (tmp_path / "run" / "metrics.csv").exists()
