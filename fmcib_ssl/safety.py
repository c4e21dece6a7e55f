"""What is not believed, and what is not told: names in files from elsewhere, secrets, and files open to the world.

Whoever trains is trusted: the command line and configs of one's own may name any `_target_`. A file that came from
somewhere else (a run folder, weights) may not, because importing and calling what it names is running its code.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

#: Where a run's own parts are defined. Not whole packages: `torch.hub.load` or `monai.bundle` run what they are given.
RUN_PARTS = (
    "fmcib_ssl.augment",
    "fmcib_ssl.losses",
    "fmcib_ssl.methods",
    "fmcib_ssl.models.concentric",
    "fmcib_ssl.models.encoders",
    "fmcib_ssl.models.heads",
    "fmcib_ssl.training.optimizers",
    "fmcib_ssl.training.schedules",
    "torch.nn.modules",
    "torch.optim",
    "torchvision.models",
    "monai.networks.blocks",
    "monai.networks.nets",
    "monai.losses",
    "timm.models",
    "lightly.loss",
    "lightly.models",
)

_SECRET_NAME = re.compile(r"(api_?key|access_?key|token|passw(or)?d|passwd|secret|credential)", re.IGNORECASE)
#: `key=value` and `--key value` of a command line, and what stands in a URL.
_SECRET_VALUE = re.compile(
    r"(?i)([\w.+~-]*(?:api_?key|access_?key|token|password|passwd|secret|credential)\w*=)[^\s&,}\]]+"
)
_URL_LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
HIDDEN = "***"


class UntrustedTargetError(ValueError):
    """A file names code that nobody has said to trust; the message says how to."""


def is_trusted(name: str, trusted: Collection[str]) -> bool:
    """Whether a dotted name is one of `trusted`, or lies in a package or module that is."""
    return any(name == own or name.startswith(f"{own}.") for own in trusted if own)


def check_targets(values: Any, source: object, trusted: Collection[str] = ()) -> None:
    """Refuse plain values of a file from elsewhere that name other code than the parts of a run.

    A name is followed to what it stands for: `torch.nn.modules.module.torch.hub.load` is `torch.hub.load`.

    Args:
        values: nested, with `_target_` anywhere.
        source: the file, for the message.
        trusted: packages, modules or dotted names that the user has named besides.

    Raises:
        UntrustedTargetError: the first that is refused.
    """
    for target in _targets(values):
        if not isinstance(target, str) or (not is_trusted(target, trusted) and not _is_part_of_a_run(target)):
            package = str(target).partition(".")[0]
            raise UntrustedTargetError(
                f"{source} names _target_: {target}, which is no part of a run that may be built from a file that came "
                f"from elsewhere. If you trust the file and that code, name it: trusted_modules=[{package}]"
            )


def _targets(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key == "_target_":
                yield value
            else:
                yield from _targets(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _targets(value)


def _is_part_of_a_run(target: str) -> bool:
    """Whether a name lies in `RUN_PARTS`, by how it is written and by where it is defined."""
    found = _find(target)
    if found is None:
        return False
    owner = getattr(found, "__self__", None)  # of a class method
    owner = owner if isinstance(owner, type) else found
    defined = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', '')}"
    return callable(found) and is_trusted(defined, RUN_PARTS)


def _find(target: str) -> Any:
    """What a dotted name stands for; imports no module outside the packages of `RUN_PARTS`."""
    parts = target.split(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in parts):
        return None
    found: Any = None
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        if any(is_trusted(name, [part]) or is_trusted(part, [name]) for part in RUN_PARTS):
            try:
                found = importlib.import_module(name)
                continue
            except ImportError:
                pass
        found = getattr(found, parts[number - 1], None)
        if found is None:
            return None
    return found


def redacted(values: Any) -> Any:
    """Plain values, with what looks like a secret hidden: by its key, after `key=` in a text, or the login of a URL."""
    if isinstance(values, Mapping):
        return {
            key: HIDDEN if _SECRET_NAME.search(str(key)) and isinstance(value, str) and value else redacted(value)
            for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        return type(values)(redacted(value) for value in values)
    if isinstance(values, str):
        return _URL_LOGIN.sub(rf"\g<1>{HIDDEN}@", _SECRET_VALUE.sub(rf"\g<1>{HIDDEN}", values))
    return values


def no_world_write() -> None:
    """From here on this process, and those it starts, make no file that everybody may write, whatever the umask."""
    umask = os.umask(0o077)
    os.umask(umask | 0o002)
