"""What watching costs: the share of a run's time that its callbacks take, measured within that run.

    python benchmarks/online.py +experiment=phantom_ntxent_mined data.store=data/phantom/store callbacks=online \
        callbacks.online_probe.label=label 'callbacks.online_probe.select={split: test}'

Arguments are those of `train.py`. On a GPU every callback is timed between synchronisations, so what it queues counts.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from fmcib_ssl.run import pretrain
from fmcib_ssl.training import CONFIG_NAME, CollapseMonitor, OnlineProbe, read_settings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HOOKS = ("on_train_start", "on_train_batch_end", "on_train_epoch_end")

seconds: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)
moments: dict[str, float] = {}


def main(overrides: list[str]) -> None:
    """Train with timed callbacks and print their shares."""
    for watcher in (CollapseMonitor, OnlineProbe):
        for hook in HOOKS:
            if hook in vars(watcher):
                setattr(watcher, hook, timed(getattr(watcher, hook), f"{watcher.__name__}.{hook}"))
    CollapseMonitor.on_train_end = lambda *_: moments.update(end=now())  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as run:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config = compose(CONFIG_NAME, [*overrides, f"paths.run={run}", "callbacks.progress.refresh_rate=0"])
        pretrain(read_settings(config))
    whole = moments["end"] - moments["start"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{whole:.1f} s of training, {calls['CollapseMonitor.on_train_batch_end']} steps, {device}")
    for name, spent in seconds.items():
        print(f"{name:<36} {calls[name]:>6} calls  {1e3 * spent / calls[name]:>9.2f} ms each  {spent / whole:>7.2%}")
    print(f"{'together':<36} {sum(seconds.values()) / whole:>38.2%}")


def timed(hook: Callable[..., None], name: str) -> Callable[..., None]:
    """A hook that adds up what it takes."""

    @functools.wraps(hook)
    def measured(*arguments: Any) -> None:
        began = now()
        moments.setdefault("start", began)
        hook(*arguments)
        seconds[name] += now() - began
        calls[name] += 1

    return measured


def now() -> float:
    """The time, once a GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(sys.argv[1:])
