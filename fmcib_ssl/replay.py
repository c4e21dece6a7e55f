"""One step of a run, taken again from what `faults/` kept of it, to find where its first NaN or infinity comes from.

Runs in one process. The batches of all ranks make one: the loss of one device with all lesions is the mean of theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fmcib_ssl.io import read_yaml
from fmcib_ssl.models.trusted import check_targets
from fmcib_ssl.training.build import build_module
from fmcib_ssl.training.faults import bad_views, fault_folder, newest_fault, read_faults
from fmcib_ssl.training.rng import set_random_state
from fmcib_ssl.training.settings import ConfigError, Settings, settings_of
from fmcib_ssl.types import Preprocessing

#: Sections that a step is computed with.
_SECTIONS = ("method", "encoder", "head", "loss", "optimizer", "schedule")
_MOST_ROWS = 8


@dataclass
class Finding:
    """What one pass through the step has shown; all empty if everything was finite.

    Attributes:
        layer: the first whose output was not finite, with its kind, in words.
        loss: its value.
        gradient: where going back the gradient was first not finite, in words.
        function: the function of autograd that gave it, if torch's anomaly detection has seen it.
    """

    layer: str = ""
    loss: float = float("nan")
    gradient: str = ""
    function: str = ""


@dataclass
class _Step:
    """The parts of a step, joined over ranks."""

    batch: Any
    batch_idx: int
    step: int
    epoch: int
    precision: str
    random_state: dict[str, Any]
    weights: dict[str, Tensor]
    num_ranks: int
    notes: list[str] = field(default_factory=list)


def replay(
    run: Path, step: int | None = None, *, device: str = "cpu", trusted_modules: Collection[str] = ()
) -> Iterator[str]:
    """Take a step that was left out again, in float32 with anomaly detection; gives lines for a person.

    Args:
        run: folder of the run.
        step: which; None is the last that was kept.
        device: where to compute.
        trusted_modules: packages of the user's that `config.yaml` may name. The folder may come from elsewhere, so
            it may else build only what `fmcib_ssl.models.trusted` lists.

    Raises:
        ConfigError: a configuration that cannot be used.
        ValueError: nothing was kept, or what was is damaged.
    """
    settings = _settings(run, trusted_modules)
    folder = newest_fault(run) if step is None else fault_folder(run / "faults", step)
    if folder is None:
        raise ValueError(f"{run} has no faults/step-*: no step of this run was left out, or it is another folder")
    kept = _joined(read_faults(folder))
    try:
        module = _module(settings, kept).to(device)
    except RuntimeError as error:
        raise ValueError(f"{folder}: its weights do not fit {run / 'config.yaml'}: {error}") from error
    yield f"{folder}: step {kept.step}, epoch {kept.epoch}, {kept.num_ranks} rank(s), trained with {kept.precision}"
    yield from kept.notes
    bad = _bad_inputs(kept.batch)
    yield from bad

    found = _take(module, kept, device, "32-true")
    yield from _in_words(found, "float32")
    if found.layer or found.gradient or not math.isfinite(found.loss) or bad:
        return
    if kept.precision.startswith("32"):
        yield "everything is finite: the fault is not in the arithmetic. Another device than the run's, or its memory?"
        return
    found = _take(module, kept, device, kept.precision)
    yield from _in_words(found, kept.precision)
    yield f"finite in float32: set hardware.precision=32-true, or bf16-mixed if this was 16-mixed ({kept.precision})"


def _settings(run: Path, trusted_modules: Collection[str]) -> Settings:
    file = run / "config.yaml"
    try:
        values = read_yaml(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: there is no such file; give the folder of a run: run=DIR") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not the configuration of a run")
    try:
        check_targets({key: values.get(key) for key in _SECTIONS}, file, trusted_modules)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return settings_of(values)


def _joined(faults: Sequence[Mapping[str, Any]]) -> _Step:
    """What the ranks kept as one step; ranks whose fault was in another batch of an accumulation are left out."""
    try:
        first = next((f for f in faults if not math.isfinite(f["loss"])), faults[0])
        same = [f for f in faults if f["batch_idx"] == first["batch_idx"] and f["step"] == first["step"]]
        notes = []
        if len(same) < first["world_size"]:
            notes = [
                f"of {first['world_size']} ranks {len(same)} have kept this batch: the others' lesions are missing"
            ]
        return _Step(
            _cat([f["batch"] for f in same]),
            first["batch_idx"],
            first["step"],
            first["epoch"],
            str(first["precision"]),
            first["random_state"],
            first["weights"],
            len(same),
            notes,
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"what was kept of the step is damaged: {error!r}") from error


def _cat(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], Mapping):
        return {key: _cat([part[key] for part in parts]) for key in parts[0]}
    return type(parts[0])(_cat(list(each)) for each in zip(*parts, strict=True))


def _module(settings: Settings, kept: _Step) -> L.LightningModule:
    data = settings.data
    preprocessing = Preprocessing(data.patch_size, 1.0 if data.spacing_mm is None else data.spacing_mm)
    batch_size = len(kept.batch["lesion"]) if "lesion" in kept.batch else 1
    module = build_module(settings, preprocessing, batch_size, num_steps=1000)
    module.load_state_dict(kept.weights, strict=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=max(1, kept.step + 1), max_epochs=-1,
    )  # fmt: skip
    # What a method draws may follow from the place in the training.
    progress: Any = trainer.fit_loop.epoch_progress.current
    progress.processed = kept.epoch
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = kept.step
    module.trainer = trainer
    module.log = module.log_dict = _say_nothing  # type: ignore[method-assign]
    return module


def _say_nothing(*_: Any, **__: Any) -> None:
    pass


def _take(module: L.LightningModule, kept: _Step, device: str, precision: str) -> Finding:
    """One forward and one backward pass; the optimizer has no part in it."""
    found = Finding()
    module.load_state_dict(kept.weights)
    module.zero_grad(set_to_none=True)
    set_random_state(kept.random_state)
    half = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    autocast = torch.autocast(torch.device(device).type, half) if half is not None else nullcontext()
    batch = _to(kept.batch, device)
    with _watched(module, found), warnings.catch_warnings(record=True) as said, torch.enable_grad():
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True):
            with autocast:
                outputs = module.training_step(batch, kept.batch_idx)
            loss: Any = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            found.loss = float(loss.detach())
            if found.layer or not math.isfinite(found.loss):
                return found
            try:
                loss.backward()
            except RuntimeError as error:
                if "returned nan values" not in str(error):
                    raise
                found.function = str(error).splitlines()[0]
                traces = [str(w.message) for w in said if "Traceback of forward call" in str(w.message)]
                lines = [line for line in traces[-1].splitlines() if line.startswith("  ")] if traces else []
                found.function += "".join(f"\n    {line.strip()}" for line in lines[-2:])
    return found


@contextmanager
def _watched(module: nn.Module, found: Finding) -> Iterator[None]:
    """Note the first output, and going back the first gradient, that is not finite."""

    def gradient_of(name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not found.gradient and not bool(torch.isfinite(gradient).all()):
                found.gradient = name

        return look

    def look(name: str, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        label = f"{name} ({type(layer).__name__})"
        for output in _tensors(outputs):
            if not found.layer and not bool(torch.isfinite(output).all()):
                finite = all(bool(torch.isfinite(given).all()) for given in _tensors(inputs))
                rows = _bad_rows(output)
                found.layer = f"{label}, from {'finite' if finite else 'already not finite'} input{rows}"
            if output.requires_grad:
                output.register_hook(gradient_of(f"at the output of {label}"))  # type: ignore[no-untyped-call]

    hooks = [
        layer.register_forward_hook(lambda *given, name=name: look(name, *given))
        for name, layer in module.named_modules()
        if name
    ]
    hooks += [
        parameter.register_hook(gradient_of(f"of {name}"))  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bad_rows(output: Tensor) -> str:
    if output.ndim < 2:
        return ""
    bad = (~torch.isfinite(output.detach()).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if len(bad) == len(output):
        return f", in all {len(output)} rows"
    more = f" and {len(bad) - _MOST_ROWS} more" if len(bad) > _MOST_ROWS else ""
    return f", in rows {', '.join(map(str, bad[:_MOST_ROWS]))}{more} of {len(output)}"


def _in_words(found: Finding, precision: str) -> Iterator[str]:
    if found.layer:
        yield f"in {precision} the first output that is not finite is that of {found.layer}"
    elif not math.isfinite(found.loss):
        yield f"in {precision} every layer is finite, and the loss is {found.loss:g}: it comes from the loss itself"
    elif found.gradient or found.function:
        yield f"in {precision} the loss is {found.loss:g}; going back, the first gradient that is not finite is "
        yield f"  {found.gradient or 'inside the last function'}"
        if found.function:
            yield f"  {found.function}"
    else:
        yield f"in {precision} loss ({found.loss:g}) and gradient are finite"


def _bad_inputs(batch: Any) -> list[str]:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("lesion"), Tensor):
        return []
    lines = []
    for place, lesion in enumerate(batch["lesion"].tolist()):
        if views := bad_views(batch, place):
            lines.append(
                f"lesion {lesion} (row {place} of the batch) came with views that are not finite: {', '.join(views)}; "
                "look at its augmentation and its scan"
            )
    return lines


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _to(values: Any, device: str) -> Any:
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, Mapping):
        return {key: _to(value, device) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_to(value, device) for value in values)
    return values
