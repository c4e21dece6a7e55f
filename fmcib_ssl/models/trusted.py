"""Which code a file from elsewhere may name.

Whoever trains is trusted: the command line and configs of one's own may name any `_target_`. A file that came from
somewhere else (a run folder, weights) may not, because importing and calling what it names is running its code.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fmcib_ssl.types import UserError, current_target

#: Where a run's own parts are defined: everything in these modules may be built.
_OWN_PARTS = (
    "fmcib_ssl.augment",
    "fmcib_ssl.losses",
    "fmcib_ssl.models.denoising",
    "fmcib_ssl.models.encoders",
    "fmcib_ssl.models.finetune",
    "fmcib_ssl.models.mined_contrast",
    "fmcib_ssl.models.queues",
    "fmcib_ssl.models.two_views",
    "fmcib_ssl.training.optimizers",
)
#: Modules of torch whose public classes may be built; none of them opens a file.
_TORCH_PARTS = ("torch.nn.modules", "torch.optim")
#: What may be built of other packages, by name: networks and losses that read and fetch nothing when they are asked
#: for no weights. Not whole packages: `torch.hub.load`, `timm.models.load_state_dict` or `monai.bundle` run what they
#: are given.
_OTHER_PARTS: Mapping[str, tuple[str, ...]] = {
    "monai.networks.nets": (
        "ResNet", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200",
        "DenseNet", "DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264", "EfficientNetBN",
        "SENet", "SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101",
        "ViT", "ViTAutoEnc", "SwinUNETR", "UNETR", "UNet", "BasicUNet", "DynUNet", "AttentionUnet", "SegResNet", "VNet",
    ),
    "monai.losses": ("ContrastiveLoss",),
    "torchvision.models.video": (
        "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "swin3d_s", "swin3d_b", "mvit_v1_b", "mvit_v2_s",
    ),
    "lightly.loss": (
        "BarlowTwinsLoss", "DCLLoss", "NegativeCosineSimilarity", "NTXentLoss", "SwaVLoss", "VICRegLoss",
    ),
}  # fmt: skip
#: Arguments of other packages' networks with which they read or fetch a file.
_LOADS = re.compile(r"pretrained|^weights|checkpoint_path|url|cache_dir|file|hub|repo|state_dict", re.IGNORECASE)


class UntrustedTargetError(UserError, ValueError):
    """A file names code that nobody has said to trust; the message says how to."""


def check_targets(values: Any, source: object, trusted: Collection[str] = ()) -> None:
    """Refuse plain values of a file from elsewhere that name other code than the parts of a run.

    A name is followed to what it stands for: `torch.nn.modules.module.torch.hub.load` is `torch.hub.load`. Texts that
    OmegaConf would interpret are refused too, since what they become cannot be looked at beforehand.

    Args:
        values: nested, with `_target_` anywhere.
        source: the file, for the message.
        trusted: packages, modules or dotted names that the user has named besides.

    Raises:
        UntrustedTargetError: the first that is refused.
    """
    if isinstance(values, Mapping):
        if "_target_" in values and (reason := _refused(values, trusted)):
            raise UntrustedTargetError(f"{source} names _target_: {values['_target_']}, {reason}")
        for key, value in values.items():
            check_targets(key, source, trusted)
            check_targets(value, source, trusted)
    elif isinstance(values, list | tuple):
        for value in values:
            check_targets(value, source, trusted)
    elif isinstance(values, str) and ("${" in values or values == "???"):
        raise UntrustedTargetError(
            f"{source} has {values[:200]!r}: files from elsewhere may hold plain values only, nothing to be "
            "interpolated. Write the value itself in its place"
        )


def _refused(component: Mapping[Any, Any], trusted: Collection[str]) -> str | None:
    """Why a component of a foreign file may not be built; None if it may."""
    target = component["_target_"]
    target = current_target(target) if isinstance(target, str) else target
    if isinstance(target, str) and is_trusted(target, trusted):
        found = trusted_callable(target, trusted)
        return None if found else "which is trusted, but cannot be imported, or is defined in another package"
    package = str(target).partition(".")[0]
    remedy = f"If you trust the file and that code, name it: trusted_modules=[{package}]"
    if not isinstance(target, str) or not (own := _is_own_part(target) or _is_other_part(target)):
        return f"which is no part of a run that may be built from a file that came from elsewhere. {remedy}"
    if own is True:
        return None
    loads = [str(key) for key, value in component.items() if value and (_LOADS.search(str(key)) or key == "_args_")]
    return f"with {', '.join(loads)}, which may make it read or fetch a file. {remedy}" if loads else None


def trusted_callable(target: str, trusted: Collection[str]) -> Callable[..., Any] | None:
    """What a dotted name stands for, if the user has named it, or a package or module that it is defined in.

    `my_package.os.system` is defined elsewhere, and is not meant by a trust in `my_package`.
    """
    found = _find(target, trusted) if is_trusted(target, trusted) else None
    return found if callable(found) and (target in trusted or is_trusted(_defined_as(found), trusted)) else None


def is_trusted(name: str, trusted: Collection[str]) -> bool:
    """Whether a dotted name is one of `trusted`, or lies in a package or module that is."""
    return any(name == own or name.startswith(f"{own}.") for own in trusted if own)


def _is_own_part(target: str) -> bool:
    """Whether a name is a part of ours or a public class of torch's, by how it is written and where it is defined."""
    found = _find(target, (*_OWN_PARTS, *_TORCH_PARTS))
    if not callable(found):
        return False
    defined = _defined_as(found)
    return is_trusted(defined, _OWN_PARTS) or (isinstance(found, type) and is_trusted(defined, _TORCH_PARTS))


def _is_other_part(target: str) -> str | None:
    """The name, if it is a network or loss of another package that is known to be harmless without weights."""
    module, _, name = target.rpartition(".")
    if name in _OTHER_PARTS.get(module, ()):
        return target
    if module.startswith("timm.models.") and name.isidentifier():
        registry = importlib.import_module("timm.models")
        known = registry.is_model(name) and registry.model_entrypoint(name).__module__ == module
        return target if known else None
    return None


def _defined_as(found: Any) -> str:
    owner = getattr(found, "__self__", None)  # of a class method
    owner = owner if isinstance(owner, type) else found
    return f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', '')}"


def _find(target: str, importable: Collection[str]) -> Any:
    """What a dotted name stands for; imports no module but those in `importable` and the packages that they are in."""
    parts = target.split(".")
    if not all(part.isidentifier() and not part.startswith("__") for part in parts):
        return None
    found: Any = None
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        if any(is_trusted(name, [part]) or is_trusted(part, [name]) for part in importable):
            try:
                found = importlib.import_module(name)
                continue
            except ImportError:
                pass
        found = getattr(found, parts[number - 1], None)
        if found is None:
            return None
    return found
