"""Take a step that was not finite again, in float32, and say which layer gave the first value that is not.

`fmcib-ssl replay --help` shows what can be set; docs/guards.md says more. A run folder may come from elsewhere:
its `config.yaml` may build only what `fmcib_ssl.models.trusted` lists, and nothing in its files is ever run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command

#: Sections that a step is computed with.
_SECTIONS = ("method", "encoder", "head", "loss", "optimizer", "schedule")


class Replay(Command):
    """Take a step that was left out of a run again, and say where its first NaN or infinity comes from.

    fmcib-ssl replay run=runs/pretrain/2026-01-01_12-00-00

    Of several ranks it takes the first whose loss was not finite. Nothing is trained and nothing is written.
    """

    run: Path = Field(description="folder of the run, with config.yaml and faults/")
    step: NonNegativeInt | None = Field(default=None, description="which of faults/step-N; null: the last one")
    device: str = Field(default="cpu", description="cpu, cuda, mps")
    trusted_modules: str | None = Field(
        default=None, description="your own packages that the run is built from, commas between them"
    )


def replay(run: Path, step: int | None = None, device: str = "cpu", trusted: Collection[str] = ()) -> Iterator[str]:
    """Lines that say what a step's pass forward and back shows, with torch's anomaly detection.

    Raises:
        ConfigError: a configuration that cannot be used.
        ValueError: nothing was kept, or what was is damaged.
    """
    import torch  # noqa: PLC0415  (the help is quick)

    from fmcib_ssl.training import set_random_state  # noqa: PLC0415

    fault = read_fault(run, step)
    module = build(run, fault, trusted).to(device)
    yield f"step {fault['step']}, epoch {fault['epoch']}, rank {fault['rank']}, trained with {fault['precision']}"
    culprits: list[str] = []

    def look(name: str, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not culprits and isinstance(output, torch.Tensor) and not output.isfinite().all():
            finite_before = all(bool(x.isfinite().all()) for x in inputs if isinstance(x, torch.Tensor))
            rows = (~output.detach().flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            culprits.append(
                f"the first output that is not finite is that of {name} ({type(layer).__name__}), from "
                f"{'finite' if finite_before else 'already not finite'} input, in rows {', '.join(map(str, rows[:8]))} "
                f"of {len(output)}"
            )

    for name, layer in module.named_modules():
        if name:
            layer.register_forward_hook(lambda *arguments, name=name: look(name, *arguments))
    set_random_state(fault["random_state"])
    batch = module.transfer_batch_to_device(fault["batch"], torch.device(device), 0)
    with torch.autograd.set_detect_anomaly(True):
        loss = module.training_step(batch, fault["batch_idx"])["loss"]
        value = loss.item()
        if culprits or not math.isfinite(value):
            yield culprits[0] if culprits else f"every layer is finite, and the loss is {value:g}"
            return
        try:
            loss.backward()
        except RuntimeError as error:  # where it was called stands in torch's own warning
            yield f"the loss is {value:g}; going back, {error}"
            return
    cause = f": {fault['precision']} is the cause; set hardware.precision=32-true, or bf16-mixed if it was 16-mixed"
    yield "in float32 everything is finite" + ("" if str(fault["precision"]).startswith("32") else cause)


def read_fault(run: Path, step: int | None) -> dict[str, Any]:
    """What one rank kept of a step: the first whose loss was not finite."""
    from fmcib_ssl.models import read_archive  # noqa: PLC0415
    from fmcib_ssl.training import FAULT_FORMAT  # noqa: PLC0415

    folders = sorted(run.glob("faults/step-*" if step is None else f"faults/step-{step:08d}"))
    faults = [read_archive(file) for folder in folders[-1:] for file in sorted(folder.glob("rank-*.pt"))]
    if not faults or any(fault.get("format") != FAULT_FORMAT for fault in faults):
        raise ValueError(f"{run} has no faults/step-N/rank-R.pt of this step: there is nothing to replay")
    return next((fault for fault in faults if not math.isfinite(fault["loss"])), faults[0])


def build(run: Path, fault: dict[str, Any], trusted: Collection[str]) -> Any:
    """The run's module with the weights that the step began with."""
    import lightning as L  # noqa: PLC0415

    from fmcib_ssl.io import read_yaml  # noqa: PLC0415
    from fmcib_ssl.models import check_targets  # noqa: PLC0415
    from fmcib_ssl.training import build_module, settings_of  # noqa: PLC0415
    from fmcib_ssl.types import Preprocessing, with_current_targets  # noqa: PLC0415

    config = run / "config.yaml"
    values = with_current_targets(read_yaml(config))
    if not isinstance(values, dict):
        raise ValueError(f"{config} is not the configuration of a run")
    check_targets({key: values.get(key) for key in _SECTIONS}, config, trusted)
    settings = settings_of(values)
    preprocessing = Preprocessing(settings.data.patch_size, settings.data.spacing_mm or 1.0)
    module = build_module(settings, preprocessing, len(fault["batch"]["lesion"]), num_steps=1000)
    module.load_state_dict(fault["weights"])
    module.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=True)
    return module


def run(command: Replay) -> None:
    """Replay, print what was found."""
    trusted = [name.strip() for name in (command.trusted_modules or "").strip("[]").split(",") if name.strip()]
    for line in replay(command.run, command.step, command.device, trusted):
        print(line)


main = partial(run_command, Replay, run, interrupted="stopped", level=logging.WARNING)
