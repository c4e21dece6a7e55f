"""Runs that start from weights: of an import, of another run, with and without its head."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tiny_runs import WATCH, Watch, assert_equal_weights, tiny_settings

import fmcib_ssl
from fmcib_ssl.io import sha256_of
from fmcib_ssl.models import import_encoder, load_head, small_resnet
from fmcib_ssl.run import pretrain
from fmcib_ssl.training.settings import ConfigError
from fmcib_ssl.types import Preprocessing

OPTIONS = ["+experiment=phantom_ntxent_mined", "trainer.max_steps=2", "optimizer.base_lr=0.1"]
SPEC = {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": [4, 4, 8, 8]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import whose network and scale are not those of the experiment."""
    folder = tmp_path_factory.mktemp("imported")
    torch.manual_seed(7)
    torch.save({"state_dict": small_resnet(SPEC["widths"]).state_dict()}, folder / "published.pt")
    import_encoder(
        folder / "published.pt", folder / "encoder.safetensors", "lighter",
        encoder=SPEC, patch_size_zyx=(16, 16, 16), spacing_mm=1.25, hu_window=(-900.0, 300.0), licence="MIT",
    )  # fmt: skip
    return folder / "encoder.safetensors"


def run_from(weights: object, table: Path, run: Path, *overrides: str) -> Path:
    pretrain(tiny_settings(table, run, *OPTIONS, f"encoder.weights={weights}", WATCH, *overrides))
    return run


def part(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def test_the_first_step_sees_the_features_of_the_file(
    weights: Path, phantom_table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fmcib_ssl"):
        run = run_from(weights, phantom_table, tmp_path)
    loaded: Any = fmcib_ssl.load_encoder(weights)
    num_keys = len(loaded.state_dict())
    assert_equal_weights(part(Watch.latest.first_weights, "encoder."), loaded.state_dict())
    started = small_resnet(SPEC["widths"]).eval()
    started.load_state_dict(part(Watch.latest.first_weights, "encoder."))
    views = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(started(views), loaded(views))
    # What is trained is scaled as the file says, and so is what is exported.
    exported: Any = fmcib_ssl.load_encoder(run / "encoder.safetensors")
    assert exported.preprocessing == Preprocessing((16,) * 3, 1.25, -1024, 900.0, 1200.0, window_hu=(-900.0, 300.0))
    assert Watch.latest.module.trainer.datamodule.dataset.preprocessing == exported.preprocessing  # type: ignore[attr-defined]
    assert exported.spec == SPEC
    record = json.loads((run / "run.json").read_text())["started_from"]
    about = {
        "file": str(weights),
        "sha256": sha256_of(weights),
        "keys": num_keys,
        "source": "lighter",
        "licence": "MIT",
    }
    assert record == {"encoder": about}
    assert f"encoder: all {num_keys} keys are from {weights}" in caplog.text
    assert "head starts from random weights" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_does_not_read_the_weights_again(weights: Path, phantom_table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    run = run_from(copy, phantom_table, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())["started_from"]
    trained = fmcib_ssl.load_encoder(run / "encoder.safetensors").state_dict()
    copy.unlink()
    run_from(copy, phantom_table, run, "trainer.max_steps=3")
    assert_equal_weights(part(Watch.latest.first_weights, "encoder."), trained)
    assert json.loads((run / "run.json").read_text())["started_from"] == record


@pytest.mark.slow
def test_the_head_too_where_a_file_keeps_it(weights: Path, phantom_table: Path, tmp_path: Path) -> None:
    first = run_from(weights, phantom_table, tmp_path / "first", "export.keep_head=true")
    exported, checkpoint = first / "encoder.safetensors", first / "checkpoints" / "last.ckpt"
    assert_equal_weights(load_head(exported), load_head(checkpoint))
    fmcib_ssl.load_encoder(exported)
    second = run_from(exported, phantom_table, tmp_path / "second", f"head.weights={exported}")
    assert_equal_weights(part(Watch.latest.first_weights, "head."), load_head(checkpoint))
    assert json.loads((second / "run.json").read_text())["started_from"]["head"]["keys"] == len(load_head(checkpoint))
    with pytest.raises(ConfigError, match=r"of another shape .*layers"):
        run_from(exported, phantom_table, tmp_path / "third", f"head.weights={exported}", "head.out_dim=5")


def test_what_does_not_fit_is_refused(weights: Path, phantom_table: Path, tmp_path: Path) -> None:
    for overrides, words in (
        (["data.patch_size=[20,20,20]"], r"data.patch_size=\[16,16,16\]"),
        (["data.spacing_mm=2"], "data.spacing_mm=1.25"),
        ([f"head.weights={weights}"], "keeps no head"),
        (["encoder.weights=none.safetensors"], "no such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_from(weights, phantom_table, tmp_path / "run", *overrides)
    with pytest.raises(ConfigError, match=r"head.weights is of no use"):
        tiny_settings(phantom_table, tmp_path, "head.weights=x")
    with pytest.raises(ConfigError, match=r"encoder.rate=0"):
        tiny_settings(phantom_table, tmp_path, "encoder.rate=0")


def test_a_network_that_is_named_must_be_that_of_the_file(
    weights: Path, phantom_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*words: str) -> None:
        overrides = OmegaConf.create({"overrides": {"task": [*words, f"encoder.weights={weights}"]}})
        monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
        monkeypatch.setattr(HydraConfig, "get", lambda: overrides)
        run_from(weights, phantom_table, tmp_path / words[0].replace("=", "_"), *words)

    start("encoder=small", "encoder.widths=[4,4,8,8]")
    with pytest.raises(ConfigError, match=r"(?s)encoder=r3d_18 does not fit.*missing \(\d+\): .*unexpected \(\d+\): "):
        start("encoder=r3d_18")
