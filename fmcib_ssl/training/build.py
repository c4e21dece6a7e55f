"""Objects from the sections of the configuration, and errors that name the section that was wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from fmcib_ssl import models
from fmcib_ssl.data import LesionDataModule, LesionPatches
from fmcib_ssl.io import sha256_of
from fmcib_ssl.models import Parts, Pretraining
from fmcib_ssl.training.settings import START_KEYS, Component, ConfigError, Hardware, Settings
from fmcib_ssl.training.throughput import flops_of_lesion
from fmcib_ssl.types import Preprocessing, ViewTransform

logger = logging.getLogger(__name__)

#: A view of noise over hundreds of HU reaches further than this; one that was normalised does not.
_NOT_IN_HU = 20.0
#: Settings of `data` that an encoder's preprocessing decides, and what it calls them.
_PATCH_KEYS = {"patch_size": "patch_size_zyx", "spacing_mm": "spacing_mm", "padding": "padding"}


def build_part(section: str, component: Component, **arguments: Any) -> Any:
    """Build what a section's `_target_` names, and say which section it was if that fails."""
    try:
        return instantiate(component, **arguments, _convert_="object")
    except InstantiationException as error:
        raise ConfigError(f"section {section} of the configuration: {error.__cause__ or error}") from error


@contextmanager
def config_errors_in(section: str) -> Iterator[None]:
    """Say which section of the configuration was wrong when something made of it fails."""
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"section {section} of the configuration lacks {error}") from error
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        raise ConfigError(f"section {section} of the configuration: {error}") from error


def learning_rate(settings: Settings, batch_size: int) -> float:
    """The highest rate of the run: `base_lr`, in proportion to the global batch (Goyal et al. 2017)."""
    global_batch = batch_size * settings.world_size * settings.trainer.accumulate_grad_batches
    with config_errors_in("optimizer"):
        rate: float = settings.optimizer["base_lr"] * global_batch / settings.optimizer["reference_batch"]
    return rate


def build_optimizer(settings: Settings, batch_size: int) -> Any:
    """What makes the optimizer of named parameters, at the rate that the batch asks for."""
    arguments = {key: value for key, value in settings.optimizer.items() if key not in ("base_lr", "reference_batch")}
    return build_part("optimizer", arguments, lr=learning_rate(settings, batch_size))


def build_views(settings: Settings) -> ViewTransform:
    """What makes the views of patches, once it has been tried on noise.

    Raises:
        ConfigError: it cannot be built or fails, or it leaves HU, so that its views would be normalised twice.
    """
    view_transform: ViewTransform = build_part("augment", settings.augment)
    if not callable(view_transform):
        raise ConfigError("section augment of the configuration makes no views: choose another")
    noise = np.random.default_rng(0).normal(-300, 400, (1, 1, *settings.data.patch_size)).clip(-1000, 1000)
    with config_errors_in("augment"):
        low, high = view_transform(torch.from_numpy(noise.astype(np.int16)), torch.tensor([0])).aminmax()
    if max(-low, high) < _NOT_IN_HU:
        raise ConfigError(
            f"section augment of the configuration: noise of -1000 to 1000 HU becomes a view from {low:.3g} to "
            f"{high:.3g}. Leave out the step that scales: views stay in HU and are normalised once, afterwards"
        )
    return view_transform


def build_parts(section: str, components: Mapping[str, Component] | None) -> list[Any]:
    """The objects of a section that has several, such as the callbacks."""
    return [build_part(section, component) for component in (components or {}).values()]


def build_data(
    settings: Settings, patches: LesionPatches, view_transform: ViewTransform, preprocessing: Preprocessing
) -> LesionDataModule:
    """Batches of views of the lesions in `patches`, scaled as `preprocessing` says."""
    data, hardware = settings.data, settings.hardware
    with config_errors_in("hardware"):
        return LesionDataModule(
            patches,
            view_transform,
            preprocessing=preprocessing,
            batch_size=data.batch_size,
            max_batch_size=data.max_batch_size,
            num_workers=hardware.num_workers,
            seed=settings.seed,
            pin_memory=hardware.pin_memory,
            augment_on=hardware.augment_on,
        )


def batch_size_of(settings: Settings, data: LesionDataModule) -> int:
    """Lesions a step on each device.

    Raises:
        ConfigError: more than there are, or fewer than the loss or the method need.
    """
    world_size, num_lesions = settings.world_size, len(data.dataset)
    try:
        batch_size = data.batch_size_per_device(world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if batch_size * world_size > num_lesions:
        raise ConfigError(
            f"data.batch_size={batch_size} on {world_size} devices takes {batch_size * world_size} lesions a step, and "
            f"there are {num_lesions} that can be used: lower it, or set data.batch_size=auto"
        )
    if (negatives := settings.loss.get("negatives")) in ("lesions", "mined_of_others") and batch_size * world_size < 2:
        raise ConfigError(
            f"loss.negatives={negatives} takes negatives from the other lesions of a step, and there is one lesion a "
            "step: raise the batch size, add lesions, or choose loss.negatives=mined"
        )
    return batch_size


def num_steps(settings: Settings, batches_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps in an epoch and in all; an epoch's last step may accumulate fewer batches than the others."""
    trainer = settings.trainer
    steps_per_epoch = -(-batches_per_epoch // trainer.accumulate_grad_batches)
    of_epochs = [trainer.max_epochs * steps_per_epoch] if trainer.max_epochs not in (None, -1) else []
    return steps_per_epoch, min([*of_epochs, *[trainer.max_steps] * (trainer.max_steps != -1)])


def build_module(
    settings: Settings,
    preprocessing: Preprocessing,
    batch_size: int,
    num_steps: int,
    run_id: str | None = None,
    *,
    start: Start | None = None,
) -> Pretraining:
    """Encoder, optimizer, schedule and the method that trains them; head and loss where the method takes them.

    Args:
        settings: what is built.
        preprocessing: of the patches; stored with the weights.
        batch_size: lesions a step on each device.
        num_steps: optimizer steps of the whole run.
        run_id: stored in checkpoints, to tell whose they are.
        start: the weights to start from; None: random ones.

    Raises:
        ConfigError: naming the section that cannot be used.
    """
    encoder: nn.Module = build_part("encoder", settings.network) if start is None else start.encoder
    spec = settings.network if start is None else start.spec
    try:
        num_features = models.feature_dim(encoder, preprocessing.patch_size_zyx)
        num_features -= getattr(encoder, "num_fixed_features", 0)
    except ValueError as error:
        raise ConfigError(f"encoder and data.patch_size do not fit: {error}") from error
    optimizer = build_optimizer(settings, batch_size)
    schedule = None if settings.schedule is None else build_part("schedule", settings.schedule)
    with config_errors_in("method"):
        method = get_class(settings.method["_target_"])
        if not issubclass(method, Pretraining):
            raise TypeError(f"{method.__name__} does not extend fmcib_ssl.models.Pretraining (docs/methods.md)")
    sections: dict[str, nn.Module] = {}
    if "head" in method.sections:
        sections["head"] = _head(settings, num_features, start.head if start else {})
    if "loss" in method.sections:
        sections["loss"] = build_part("loss", settings.loss)
    refuse_unused({"loss", "head"} - sections.keys(), method.__name__, "method", settings.method)
    if method.compares_lesions and batch_size < 2:
        raise ConfigError(f"{method.__name__} compares the lesions of a batch: set data.batch_size to 2 or more")
    if settings.data.negatives_per_lesion and not method.takes_negatives:
        logger.info(
            "%s does not look at mined negatives: data.negatives_per_lesion=0 saves their time", method.__name__
        )
    extra = {"run": settings.name} | ({"run_id": run_id} if run_id else {})
    metadata = models.encoder_metadata(encoder, spec, preprocessing, extra=extra)
    # Handed over outside Hydra, which would build the encoder that the metadata describes.
    make_module = build_part("method", {**settings.method, "_partial_": True})
    with config_errors_in("method"):
        module: Pretraining = make_module(
            Parts(
                encoder, optimizer, num_features, schedule,
                metadata=metadata, encoder_rate=settings.encoder.get("rate", 1.0), **sections,
            )
        )  # fmt: skip
    module.flops_per_lesion = _flops_per_lesion(module, settings)
    # Lightning builds both once training has begun; what they refuse is to be known now.
    with config_errors_in("optimizer"):
        trial = optimizer(module.named_parameters())
    if schedule is not None:
        with config_errors_in("schedule"):
            schedule(trial, total_steps=num_steps)
    return module


def _head(settings: Settings, in_dim: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """The projection head, with the weights that it starts from, if there are any."""
    head: nn.Module = build_part("head", {k: v for k, v in settings.head.items() if k != "weights"}, in_dim=in_dim)
    if weights:
        if problems := models.misfits(weights, head.state_dict()):
            lines = "\n".join(problems)
            raise ConfigError(f"section head of the configuration does not fit {settings.head['weights']}:\n{lines}")
        head.load_state_dict(weights)
    return head


@dataclass(frozen=True)
class Start:
    """Weights that a run starts from, and whose they are.

    Attributes:
        encoder: with its weights; it may be trained.
        spec: `_target_` and arguments of its network.
        preprocessing: of the patches that it knows.
        head: weights of the projection head, if they are to be taken, too.
        record: what was loaded from which file, for `run.json`; empty where a checkpoint is resumed from.
    """

    encoder: nn.Module
    spec: Component
    preprocessing: Preprocessing
    head: Mapping[str, Tensor]
    record: Mapping[str, Any]


def warm_start(settings: Settings, checkpoint: Path | None = None) -> Start | None:
    """The encoder of `encoder.weights`, and the head of `head.weights`; None if the run starts from random weights.

    Args:
        settings: of the run.
        checkpoint: that the run is resumed from, whose encoder is taken then: the files are not read again.

    Raises:
        ConfigError: files that cannot be used, or a network on the command line that they do not fit.
    """
    weights, of_head = settings.encoder.get("weights"), settings.head.get("weights")
    if weights is None:
        return None
    source = Path(weights) if checkpoint is None else checkpoint
    try:
        encoder: Any = models.load_encoder(source, trusted_targets=models.targets_of(settings.network))
        head = models.load_head(of_head) if of_head and checkpoint is None else {}
    except (models.EncoderFileError, FileNotFoundError) as error:
        raise ConfigError(f"encoder.weights and head.weights: {error}") from error
    of_runs = [f"encoder.{key}" for key in START_KEYS]
    named = [o for key, o in _overrides() if key.startswith("encoder") and key not in of_runs]
    if named and (
        problems := models.misfits(encoder.state_dict(), build_part("encoder", settings.network).state_dict())
    ):
        raise ConfigError(
            f"{' '.join(named)} does not fit {source}, which holds {encoder.spec}; without it the network "
            "is that of the file:\n" + "\n".join(problems)
        )
    record: dict[str, Any] = {}
    if checkpoint is None:
        for name, file, keys in (("encoder", weights, encoder.state_dict()), ("head", of_head, head)):
            if keys:
                record[name] = {"file": str(file), "sha256": sha256_of(Path(str(file))), "keys": len(keys)}
                logger.info("%s: all %d keys are from %s", name, len(keys), file)
        record["encoder"] |= {key: encoder.extra[key] for key in ("source", "licence") if encoder.extra.get(key)}
        if not head:
            logger.info("the head starts from random weights")
    return Start(encoder.train(), encoder.spec, encoder.preprocessing, head, record)


def with_patches_of(settings: Settings, preprocessing: Preprocessing, weights: object) -> Settings:
    """Settings whose patches are cut as an encoder knows them.

    Raises:
        ConfigError: other patches were asked for.
    """
    changes = {key: getattr(preprocessing, name) for key, name in _PATCH_KEYS.items()}
    for key, expected in changes.items():
        value = getattr(settings.data, key)
        if value not in (None, expected):
            shown = str(list(expected) if isinstance(expected, tuple) else expected).replace(" ", "")
            raise ConfigError(f"data.{key}={value}, and {weights} was trained with data.{key}={shown}: set that")
    return settings.model_copy(update={"data": settings.data.model_copy(update=changes)})


def _overrides() -> list[tuple[str, str]]:
    """The words of the command line that set something, with the key that each sets."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [(word.lstrip("+~").partition("=")[0], word) for word in words]


def build_trainer(settings: Settings, **arguments: Any) -> L.Trainer:
    """Lightning's trainer as `hardware` and `trainer` ask for it, with `arguments` of the caller's own."""
    hardware = settings.hardware
    strategy: str | DDPStrategy = hardware.strategy
    if strategy == "ddp" or (strategy == "auto" and settings.world_size > 1):
        strategy = DDPStrategy(timeout=timedelta(seconds=hardware.collective_timeout_s))
    precision = models.resolve_precision(hardware.precision, hardware.accelerator)
    changed = hardware.precision not in ("auto", precision)
    if precision.startswith("bf16") and (changed or hardware.accelerator == "cpu"):
        logger.warning(
            "hardware.precision=%s runs as %s: torch's 3D convolutions can give wrong gradients so on a CPU, where z "
            "has shrunk to 2 (docs/step.md); hardware.precision=32-true is safe", hardware.precision, precision,
        )  # fmt: skip
    with config_errors_in("hardware or trainer"):
        return L.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy,
            sync_batchnorm=hardware.sync_batchnorm,
            precision=precision,  # type: ignore[arg-type]  # Lightning checks it
            use_distributed_sampler=False,  # EpochSampler knows ranks, and pads none
            enable_model_summary=False,
            **settings.trainer.model_dump(),
            **arguments,
        )


def accelerate(module: L.LightningModule, encoder: nn.Module, hardware: Hardware) -> None:
    """Lay out and compute a module and its encoder as `hardware` asks; what they compute and are called stays."""
    if hardware.channels_last:
        models.lay_out_channels_last(module)
    if hardware.skip_padded_kernels:
        models.skip_padded_kernels(module)
    if hardware.gradient_checkpointing:
        with config_errors_in("hardware"):
            models.recompute_blocks(encoder)
    if hardware.compile:
        models.compile_training(encoder)


def _flops_per_lesion(module: Pretraining, settings: Settings) -> int | None:
    try:
        return flops_of_lesion(
            module,
            settings.data.patch_size,
            num_views=module.trained_views(settings.data.negatives_per_lesion),
            num_watched=module.watched_views,
        )
    except Exception as error:  # a user's encoder may need real numbers; then this figure is missing
        logger.info("operations of a step cannot be counted, so metrics have no perf/tflops: %s", error)
        return None


def refuse_unused(unused: Iterable[str], user: str, name: str, section: Component) -> None:
    """Say which sections nothing is built from, and refuse what the command line sets in them.

    Args:
        unused: names of sections.
        user: what does without them, such as the method.
        name: of the section that the user is built from.
        section: its keys are what can be set instead.

    Raises:
        ConfigError: an override that would have no effect.
    """
    unused = sorted(unused)  # a set of names has another order in every process
    if not unused:
        return
    own = ", ".join(f"{name}.{key}" for key in section if not key.startswith("_"))
    for key, override in _overrides():
        if key.partition(".")[0] in unused:
            raise ConfigError(f"{override} would have no effect: {user} does not use it. It has {own}")
    logger.info("%s does not use the section%s %s", user, "s" * (len(unused) > 1), ", ".join(unused))
