"""A step that is not finite, from the run that leaves it out to the layer that is named."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from tiny_runs import REPO, TINY, composed, metrics_of
from torch import Tensor

from fmcib_ssl.replay import _Step, _take, replay
from fmcib_ssl.run import pretrain
from fmcib_ssl.training.config import read_settings
from fmcib_ssl.training.guards import TrainingFaultError
from fmcib_ssl.training.rng import random_state
from fmcib_ssl.training.settings import ConfigError, Settings


class Poison(L.Callback):
    """Makes one step not finite: by a view, by a weight, or by a gradient."""

    def __init__(self, what: str, step: int = 1) -> None:
        self.what = what
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        if self.what == "view":
            batch["positive"][0][1, 0, 3, 3, 3] = torch.nan
        elif self.what == "weight":
            with torch.no_grad():
                module.encoder.layer3[0].conv1.weight[0] = torch.inf
        elif self.what == "gradient":
            module.head = SquareRootOfNothing(module.head)


class SquareRootOfNothing(torch.nn.Module):
    """Finite, with a gradient that is not: the slope of a root at 0 is infinite, and the product gives 0 times that."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.head(features)
        return embeddings + (embeddings * 0).sqrt()


def settings(phantom_table: Path, run: Path, what: str, *overrides: str) -> Settings:
    poison = [f"+callbacks.poison._target_={__name__}.Poison", f"+callbacks.poison.what={what}"]
    # The guard is a run's first callback, and is to see the batch that the poison has changed: both anew, in order.
    guard = [
        "+callbacks.guards._target_=fmcib_ssl.training.guards.NonFiniteGuard",
        f"+callbacks.guards.folder={run}/faults",
    ]
    data = [f"data.annotations={phantom_table}", f"paths.run={run}", "encoder=small", "trainer.max_epochs=1"]
    return read_settings(composed(*TINY, *data, "~callbacks.guards", *poison, *guard, *overrides))


@pytest.fixture(scope="module")
def stopped(phantom_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, str]]]:
    """Runs that were stopped by one step each, with what they said."""
    runs = {}
    for what in ("view", "weight"):
        run = tmp_path_factory.mktemp(what)
        with pytest.raises(TrainingFaultError) as caught:
            pretrain(settings(phantom_table, run, what, "++callbacks.guards.stop_after=1"))
        runs[what] = run, str(caught.value)
    yield runs


def test_the_lesions_are_named(stopped: dict[str, tuple[Path, str]]) -> None:
    run, message = stopped["view"]
    rows = list(csv.DictReader((run / "faults" / "step-00000001" / "lesions.csv").open()))
    assert [row["views_are_finite"] for row in rows] == ["True", "False"]
    assert rows[1]["title"] in message and "views are not finite themselves" in message
    assert "step 1" in message and "on_non_finite=skip" in message and "scripts/replay.py" in message


def test_a_bad_view_is_found(stopped: dict[str, tuple[Path, str]]) -> None:
    run, _ = stopped["view"]
    text = "\n".join(replay(run))
    assert "positive[0]" in text
    assert "first output that is not finite is that of encoder.conv1 (Conv3d), from already not finite input" in text
    assert "in rows 1 of 8" in text  # two lesions, four views each


def test_the_layer_is_found(stopped: dict[str, tuple[Path, str]]) -> None:
    run, _ = stopped["weight"]
    text = "\n".join(replay(run, 1))
    assert "that of encoder.layer3.0.conv1 (Conv3d), from finite input" in text


def test_the_command_says_it(stopped: dict[str, tuple[Path, str]]) -> None:
    run, _ = stopped["weight"]
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "replay.py"), f"run={run}"],
        capture_output=True, text=True, encoding="utf-8", check=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "encoder.layer3.0.conv1" in done.stdout and "Traceback" not in done.stderr


def test_skipping_goes_on_to_the_end(phantom_table: Path, tmp_path: Path) -> None:
    pretrain(settings(phantom_table, tmp_path, "view", "++callbacks.guards.on_non_finite=skip"))
    metrics = metrics_of(tmp_path)
    assert metrics["train/non_finite_steps"].max() == 1
    assert metrics["train/loss"].isna().sum() <= 1 and metrics["train/loss"].iloc[-1] > 0
    weights = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


#: What OmegaConf's own resolver would make of a text, once a section is given to Hydra.
HARMFUL = "${oc.create:{_target_: os.system, command: touch X}}"


def test_a_foreign_configuration_builds_nothing(stopped: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    run, _ = stopped["view"]
    folder, canary = tmp_path / "run", tmp_path / "canary"
    folder.mkdir()
    (folder / "faults").symlink_to(run / "faults")
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["encoder"] = {"_target_": "os.system", "command": f"touch {canary}"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"os\.system.*trusted_modules"):
        list(replay(folder))
    assert not canary.exists()
    values["encoder"] = {
        "_target_": "fmcib_ssl.models.encoders.small_resnet",
        "widths": HARMFUL.replace("X", str(canary)),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="plain values only"):
        list(replay(folder))
    assert not canary.exists()
    for text in ("", "[1", "- 1\n- 2"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ConfigError):
            list(replay(folder))
    with pytest.raises(ConfigError, match="no such file"):
        list(replay(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nothing to replay"):
        list(replay(run, 77))


class Backwards(L.LightningModule):
    """Its loss is finite and its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 2)
        self.head = SquareRootOfNothing(torch.nn.Linear(2, 2))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.head(self.net(batch["positive"])).mean()}


def test_a_gradient_is_followed_to_its_function() -> None:
    module = Backwards()
    kept = _Step({"positive": torch.ones(3, 2)}, 0, 0, 0, "32-true", random_state(), module.state_dict(), 1)
    found = _take(module, kept, "cpu", "32-true")
    assert not found.layer and found.loss == found.loss
    assert "MulBackward0" in found.function and "(embeddings * 0).sqrt()" in found.function


def test_half_precision_is_named_as_the_cause() -> None:
    """Values above 65504 are infinite in half precision only."""
    module = Backwards()
    module.head = torch.nn.Linear(2, 2)
    weights = {name: torch.full_like(value, 200.0) for name, value in module.state_dict().items()}
    kept = _Step({"positive": torch.full((3, 2), 300.0)}, 0, 0, 0, "16-mixed", random_state(), weights, 1)
    assert not _take(module, kept, "cpu", "32-true").layer
    assert _take(module, kept, "cpu", "16-mixed").layer.startswith("net (Linear), from finite input")
