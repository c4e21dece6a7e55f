"""The settings of a run, typed: what every value may be.

Sections with a `_target_` (encoder, loss, ...) stay dictionaries; their constructors check them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from fmcib_ssl.io import Identifiers, nearest, redacted
from fmcib_ssl.types import Padding, UserError, with_current_targets

#: A section with a `_target_` and its arguments.
Component = dict[str, Any]


#: Keys of `encoder` that say what its weights start from and how fast they change; the others are its network.
START_KEYS = ("weights", "rate")
#: Keys of earlier versions, with today's name of each.
RENAMED_KEYS = {
    "callbacks.guards": "callbacks.non_finite",
    "callbacks.signals": "callbacks.collapse_monitor",
    "data.per_lesion": "data.negatives_per_lesion",
    "hardware.trim": "hardware.skip_padded_kernels",
    "hardware.views_on": "hardware.augment_on",
}
#: Keys of earlier versions that are gone, with what does without them.
_REMOVED_KEYS = {
    "callbacks.checkpoint.every_n_epochs": "give callbacks.checkpoint.every_n_train_steps or keep_every_n_epochs",
    "callbacks.collapse_monitor.max_lesion_cosine": "the warning comes at 0.95",
    "callbacks.collapse_monitor.min_negative_share": "the warning comes at 0.05",
    "callbacks.collapse_monitor.min_rank": "the warning comes at 3",
    "callbacks.non_finite.keep": "three steps are kept for a replay, and the one that the run stops at",
    "callbacks.online_probe.batch_size": "64 patches go through the encoder at a time",
    "callbacks.online_probe.num_folds": "there are 5",
    "callbacks.online_probe.num_neighbors": "20 vote",
    "callbacks.watchdog.grace_s": "ranks wait 20 s for each other",
    "callbacks.watchdog.idle_s": "a run ends after callbacks.watchdog.timeout_s, whatever it waits for",
    "data.check": "preparing the table's store reads every scan",
    "data.allow_short_scans": "scans shorter than a patch are padded",
    "data.cache_scans": "patches are read from the table's store",
    "hardware.auto_batch": "set data.batch_size; method.chunk_size=N trains any batch in the memory of N lesions",
    "method.gather": "loss.gather_distributed=true (default) gathers negatives of all devices",
}
#: Both, with the message for a command that still uses them.
FORMER_KEYS = {
    **{old: f"is now called {new}" for old, new in RENAMED_KEYS.items()},
    **{key: f"is gone: {reason}. Leave it out" for key, reason in _REMOVED_KEYS.items()},
}


class ConfigError(UserError, ValueError):
    """The configuration cannot be used; the message says which key, why, and what would do."""


class _Section(BaseModel):
    # A name such as 2024 is read as a number.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class _Phantom(_Section):
    """The synthetic archive of `data=phantom`."""

    folder: Path
    num_scans: PositiveInt
    seed: int = Field(ge=0)


class _Data(_Section):
    """Where lesions come from and how they become batches; see `configs/data/`."""

    store: Path | None
    annotations: Path | None
    image_root: Path | None
    path_prefix: str | None
    coordinates: Literal["lps", "ras", "voxel"]
    select: dict[str, Any] | None
    on_bad_row: Literal["refuse", "skip"]
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    spacing_mm: PositiveFloat | None
    padding: Padding
    mining: Literal["background", "near", "hard", "uniform"]
    negatives_per_lesion: int = Field(ge=0)
    batch_size: PositiveInt | Literal["auto"]
    max_batch_size: PositiveInt
    phantom: _Phantom | None

    @model_validator(mode="after")
    def _has_lesions(self) -> _Data:
        if self.store is None and self.annotations is None:
            raise ValueError(
                "no lesions are named: set data.annotations=FILE.csv, for which a store is prepared first, or "
                "data.store=DIR for one that fmcib-ssl prepare made"
            )
        return self


class Hardware(_Section):
    """The machine; see `configs/hardware/`."""

    accelerator: Literal["cpu", "gpu", "mps", "auto"]
    devices: PositiveInt
    num_nodes: PositiveInt
    strategy: str
    precision: str
    channels_last: bool
    skip_padded_kernels: bool
    compile: bool
    gradient_checkpointing: bool
    sync_batchnorm: bool
    num_workers: int = Field(ge=0)
    num_threads: PositiveInt | None
    augment_on: Literal["auto", "workers", "device"]
    pin_memory: bool
    collective_timeout_s: PositiveInt


class _Trainer(BaseModel):
    """How long and how carefully to train. Any other argument of Lightning's Trainer is passed on to it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    max_epochs: int | None = Field(ge=-1)
    max_steps: int = Field(ge=-1)
    accumulate_grad_batches: PositiveInt
    gradient_clip_val: PositiveFloat | None
    log_every_n_steps: PositiveInt
    deterministic: bool | Literal["warn"]

    @model_validator(mode="after")
    def _ends(self) -> _Trainer:
        if self.max_epochs in (None, -1) and self.max_steps == -1:
            raise ValueError("training would never end: set trainer.max_epochs or trainer.max_steps")
        if 0 in (self.max_epochs, self.max_steps):
            raise ValueError("training would take no step: trainer.max_epochs and trainer.max_steps must not be 0")
        return self


class _Paths(_Section):
    """Folders; `run` is this run's own."""

    runs: Path
    data: Path
    run: Path


class _Export(_Section):
    """What is written at the end of a run."""

    keep_head: bool = False


class FineTune(_Section):
    """What `+experiment=finetune` trains for; see `configs/finetune/default.yaml`."""

    weights: Path | None
    label: str | None
    task: Literal["binary", "multiclass", "ordinal", "continuous"]
    threshold: str | None
    split: str | None
    group: str | None
    folds: int = Field(ge=2)
    val_share: float = Field(gt=0, lt=1)
    train: Literal["head", "last_stage", "all"]
    encoder_rate: PositiveFloat
    class_weights: bool
    patience: PositiveInt
    num_bootstrap: PositiveInt


class Settings(_Section):
    """The whole configuration of a run, typed."""

    name: str = Field(min_length=1)
    run: Literal["resume", "new"] = "resume"
    seed: int = Field(ge=0, lt=2**32)
    contact_sheet_rows: int = Field(ge=0)
    identifiers: Identifiers = "show"
    data: _Data
    hardware: Hardware
    trainer: _Trainer
    paths: _Paths
    method: Component
    augment: Component
    encoder: Component
    head: Component
    loss: Component
    optimizer: Component
    schedule: Component | None = None
    logger: dict[str, Component] | None = None
    callbacks: dict[str, Component] | None = None
    export: _Export = _Export()
    finetune: FineTune | None = None

    @model_validator(mode="after")
    def _no_contradictions(self) -> Settings:
        if self.hardware.sync_batchnorm and self.hardware.accelerator == "cpu":
            raise ValueError("hardware.sync_batchnorm=true needs GPUs: torch has none on the CPU. Set it to false")
        for key in ("encoder.weights", "head.weights"):
            weights = getattr(self, key.partition(".")[0]).get("weights")
            if not isinstance(weights, str | None):
                raise ValueError(f"{key}={weights}: should be a file of weights, or null")
        if not isinstance(rate := self.encoder.get("rate", 1.0), int | float) or rate <= 0:
            raise ValueError(f"encoder.rate={rate}: the encoder's learning rate over the others' must be above 0")
        if self.head.get("weights") and not self.encoder.get("weights"):
            raise ValueError("head.weights is of no use without encoder.weights: the head belongs to its encoder")
        # Only this method is known to take the loss; others may bring their own.
        contrasts = self.method.get("_target_") == "fmcib_ssl.models.MinedContrast"
        if contrasts and self.data.negatives_per_lesion == 0 and self.loss.get("negatives") != "lesions":
            raise ValueError(
                "data.negatives_per_lesion=0 mines no negatives, and the loss needs some: set loss.negatives=lesions, "
                "or data.negatives_per_lesion=1"
            )
        return self

    def shown(self) -> dict[str, Any]:
        """Plain values as they are written and compared, without secrets."""
        values: dict[str, Any] = redacted(self.model_dump(mode="json"))
        return values

    @property
    def network(self) -> Component:
        """The section `encoder` without `START_KEYS`."""
        return {key: value for key, value in self.encoder.items() if key not in START_KEYS}

    @property
    def world_size(self) -> int:
        """Number of processes, each with one device."""
        return self.hardware.devices * self.hardware.num_nodes


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Settings in a file of an earlier version, with today's names of keys and of parts."""
    values = with_current_targets(values)
    for name in FORMER_KEYS:
        section, _, key = name.partition(".")
        if isinstance(part := values.get(section), dict) and key in part:
            value = part.pop(key)
            if name in RENAMED_KEYS:
                part[RENAMED_KEYS[name].rpartition(".")[2]] = value
    return values


def settings_of(values: dict[str, Any]) -> Settings:
    """Check plain values and give them types.

    Raises:
        ConfigError: naming every key whose value is not allowed.
    """
    try:
        return Settings.model_validate(upgraded(values))
    except ValidationError as error:
        raise ConfigError("the configuration has values that are not allowed:\n" + _describe(error)) from error


#: Messages in place of pydantic's.
_PLAIN_WORDS = {
    "extra_forbidden": "there is no such key",
    "missing": "has no value",
    "tuple_type": "should be a list such as [50, 50, 50]",
    "too_long": "should be three numbers such as [50, 50, 50]",
    "too_short": "should be three numbers such as [50, 50, 50]",
}


def _describe(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        path, kind = list(problem["loc"]), problem["type"]
        if kind == "missing" and isinstance(path[-1], int):  # of a list
            path, kind = path[:-1], "too_short"
        # Of a union every member complains; its own name at the end of the location is noise to a user.
        key = ".".join(
            str(part) for part in path if not str(part).startswith(("literal[", "constrained-", "function-"))
        )
        message = _PLAIN_WORDS.get(kind) or problem["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            section = Settings if len(path) == 1 else Settings.model_fields[str(path[0])].annotation
            if close := nearest(str(path[-1]), [*getattr(section, "model_fields", {}), "experiment"]):
                message += f". Did you mean {'.'.join([*map(str, path[:-1]), close])}?"
        value = "" if isinstance(problem["input"], dict) or kind == "missing" else f"={problem['input']}"
        lines.append(f"  {key}{value}: {message}" if key else f"  {message}")
    return "\n".join(dict.fromkeys(lines))
