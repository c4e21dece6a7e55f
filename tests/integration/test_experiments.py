"""Every shipped experiment takes two steps and leaves what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from tiny_runs import CONFIGS, WATCH, Watch, metrics_of, tiny_settings

import fmcib_ssl
from fmcib_ssl.losses import InfoNCELoss
from fmcib_ssl.run import pretrain
from fmcib_ssl.training.settings import Settings

#: Fine-tuning is no pretraining: test_finetune.py.
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if path.stem != "finetune")
COLUMNS = {
    *("step", "epoch", "lr", "perf/samples_per_s", "perf/tflops", "perf/data_wait_share"),
    *("data/negative_from_other_scan", "train/loss", "train/positive_cosine", "train/negative_cosine"),
    *("train/lesion_cosine", "train/alignment", "train/uniformity", "train/grad_norm"),
}
#: One of each encoder and loss; the others differ in what `tests/test_config.py` composes.
QUICK = ("ct_cpu", "nodule_recipe", "phantom_infonce")


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in EXPERIMENTS]
)
def test_two_steps(experiment: str, phantom_table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [f"+experiment={experiment}", "trainer.max_steps=2", "contact_sheet_rows=2", WATCH]
    settings = tiny_settings(phantom_table, run, *overrides)
    if settings.encoder.get("widen_factor", 1) > 1:
        # The published trunk has 184 million weights. A quarter of the width has the same layers.
        settings = tiny_settings(phantom_table, run, *overrides, "encoder.widen_factor=0.25")
    loss = pretrain(settings)

    assert Settings.model_validate(yaml.safe_load((run / "config.yaml").read_text())) == settings
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["lightning"] == lightning.__version__

    metrics = metrics_of(run)
    negatives = settings.loss["negatives"]
    shares = {"train/negative_share"}
    shares |= {"train/mined_share"} if negatives != "lesions" else set()
    shares |= {"train/lesion_share"} if negatives != "mined" else set()
    of_mined = set() if settings.data.negatives_per_lesion else {"train/negative_cosine"}
    assert set(metrics) == (COLUMNS | shares) - of_mined
    assert metrics["step"].tolist() == [0, 1]
    assert np.isfinite(metrics.to_numpy()).all()
    assert loss == pytest.approx(metrics["train/loss"].iloc[-1])
    assert (metrics["train/grad_norm"] > 0).all() and (metrics["lr"] > 0).all()

    for figure in ("contact_sheet.png", "curves.png"):
        pixels = matplotlib.image.imread(run / figure)
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.01, f"{figure} is empty"

    from_checkpoint = fmcib_ssl.load_encoder(run / "checkpoints" / "last.ckpt")
    exported: Any = fmcib_ssl.load_encoder(run / "encoder.safetensors")
    patches = torch.randn(3, 1, *settings.data.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = exported(patches)
        assert torch.equal(features, from_checkpoint(patches))
    assert features.shape == (3, exported.feature_dim) and features.std() > 0
    assert exported.preprocessing.patch_size_zyx == settings.data.patch_size

    watch = Watch.latest
    weights = dict(watch.module.named_parameters())
    # The same weights as in the files, and none of them still what it was drawn as.
    for name, value in exported.state_dict().items():
        assert torch.equal(value, watch.module.state_dict()[f"encoder.{name}"]), name
    assert not [n for n, w in weights.items() if w.ndim > 1 and torch.equal(w, watch.first_weights[n])]
    for file in (run / "checkpoints").iterdir():
        file.unlink()  # hundreds of megabytes for the larger encoders


def test_the_loss_chosen_on_the_command_line_is_the_one_trained(phantom_table: Path, tmp_path: Path) -> None:
    """Without the margin InfoNCE is NT-Xent at its temperature."""
    options = ["+experiment=ct_ntxent_mined", "encoder=small", "trainer.max_steps=1", "loss.temperature=0.2", WATCH]
    infonce = pretrain(tiny_settings(phantom_table, tmp_path / "1", *options, "loss=infonce", "loss.margin=0"))
    loss: Any = Watch.latest.module.loss
    assert isinstance(loss, InfoNCELoss) and float(loss.temperature) == pytest.approx(0.2)
    assert loss.negatives == "mined_and_lesions"  # what the experiment says of its loss holds for the other one too
    assert infonce == pytest.approx(pretrain(tiny_settings(phantom_table, tmp_path / "2", *options)), rel=1e-5)
