"""Which code an untrusted file may name.

Whoever trains is trusted: the command line and configs of one's own may name any `_target_`. A file that came from
somewhere else (a run folder, weights) may not: importing and calling what it names runs its code.
"""

from __future__ import annotations

import importlib
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
    "fmcib_ssl.models.published",
    "fmcib_ssl.models.two_views",
    "fmcib_ssl.training.optimizers",
)
#: Modules of torch whose public classes may be built; none of them opens a file.
_TORCH_PARTS = ("torch.nn.modules", "torch.optim")


class UntrustedTargetError(UserError, ValueError):
    """A file names code that is not trusted; the message says how to trust it."""


def check_targets(values: Any, source: object, trusted: Collection[str] = ()) -> None:
    """Reject values of an untrusted file that name other code than the parts of a run.

    A name is followed to what it stands for: `torch.nn.modules.module.torch.hub.load` is `torch.hub.load`. Texts that
    OmegaConf would interpolate are rejected too, since what they become cannot be checked beforehand.

    Of other packages than this one and torch nothing is trusted unless it is named: `torch.hub.load`,
    `timm.models.load_state_dict` or `monai.bundle` run what they are given, and networks read or fetch weights.

    Args:
        values: nested, with `_target_` anywhere.
        source: the file, for the message.
        trusted: packages, modules or dotted names that the user has named besides.

    Raises:
        UntrustedTargetError: the first that is rejected.
    """
    if isinstance(values, Mapping):
        if "_target_" in values and (reason := _refused(values["_target_"], trusted)):
            raise UntrustedTargetError(f"{source} names _target_: {values['_target_']}, {reason}")
        for key, value in values.items():
            check_targets(key, source, trusted)
            check_targets(value, source, trusted)
    elif isinstance(values, list | tuple):
        for value in values:
            check_targets(value, source, trusted)
    elif isinstance(values, str) and ("${" in values or values == "???"):
        raise UntrustedTargetError(
            f"{source} has {values[:200]!r}: untrusted files may hold plain values only, without "
            "interpolation. Write the value itself"
        )


def targets_of(section: Any) -> list[str]:
    """Every `_target_` in a section that the user has written, and so trusts."""
    if not isinstance(section, Mapping):
        return []
    own = [section["_target_"]] if isinstance(section.get("_target_"), str) else []
    return [*own, *(target for value in section.values() for target in targets_of(value))]


def _refused(target: Any, trusted: Collection[str]) -> str | None:
    """Why a foreign file may not name a target; None if it may."""
    name = current_target(target) if isinstance(target, str) else ""
    if is_trusted(name, trusted):
        known = trusted_callable(name, trusted) is not None
        return None if known else "which is trusted, but cannot be imported, or is defined in another package"
    value = _find(name, (*_OWN_PARTS, *_TORCH_PARTS))
    origin = _defined_as(value)
    if callable(value) and (
        is_trusted(origin, _OWN_PARTS) or (isinstance(value, type) and is_trusted(origin, _TORCH_PARTS))
    ):
        return None
    package = str(target).partition(".")[0]
    return f"which untrusted files may not name. If you trust the file and that code: trusted_modules=[{package}]"


def trusted_callable(target: str, trusted: Collection[str]) -> Callable[..., Any] | None:
    """What a dotted name stands for, if the user has named it, or a package or module that it is defined in.

    `my_package.os.system` is defined elsewhere, and is not meant by a trust in `my_package`.
    """
    value = _find(target, trusted) if is_trusted(target, trusted) else None
    return value if callable(value) and (target in trusted or is_trusted(_defined_as(value), trusted)) else None


def is_trusted(name: str, trusted: Collection[str]) -> bool:
    """Whether a dotted name is one of `trusted`, or lies in a package or module that is."""
    return any(name == own or name.startswith(f"{own}.") for own in trusted if own)


def _defined_as(value: Any) -> str:
    owner = getattr(value, "__self__", None)  # of a class method
    owner = owner if isinstance(owner, type) else value
    return f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', '')}"


def _find(target: str, importable: Collection[str]) -> Any:
    """What a dotted name stands for; imports no module but those in `importable` and the packages that they are in."""
    parts = target.split(".")
    if not all(part.isidentifier() and not part.startswith("__") for part in parts):
        return None
    value: Any = None
    for number, part in enumerate(parts, start=1):
        name = ".".join(parts[:number])
        if any(is_trusted(name, [module]) or is_trusted(module, [name]) for module in importable):
            try:
                value = importlib.import_module(name)
                continue
            except ImportError:
                pass
        value = getattr(value, part, None)
        if value is None:
            return None
    return value
