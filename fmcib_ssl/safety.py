"""What is not believed, and what is not told: names in files from elsewhere, secrets, and files open to the world.

Whoever trains is trusted: the command line and configs of one's own may name any `_target_`. A file that came from
somewhere else (a run folder, weights) may not, because importing and calling what it names is running its code.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from fmcib_ssl.types import UserError

#: Where a run's own parts are defined: everything in these modules may be built.
OWN_PARTS = (
    "fmcib_ssl.augment",
    "fmcib_ssl.losses",
    "fmcib_ssl.methods",
    "fmcib_ssl.models.concentric",
    "fmcib_ssl.models.encoders",
    "fmcib_ssl.models.heads",
    "fmcib_ssl.training.optimizers",
    "fmcib_ssl.training.schedules",
)
#: Modules of torch whose public classes may be built; none of them opens a file.
TORCH_PARTS = ("torch.nn.modules", "torch.optim")
#: What may be built of other packages, by name: networks and losses that read and fetch nothing when they are asked
#: for no weights. Not whole packages: `torch.hub.load`, `timm.models.load_state_dict` or `monai.bundle` run what they
#: are given.
OTHER_PARTS: Mapping[str, tuple[str, ...]] = {
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

#: Of a YAML file from elsewhere: aliases make a thousand million values of a few lines.
_MOST_BYTES, _MOST_VALUES, _MOST_DEPTH = 1_000_000, 100_000, 64

_SECRET = r"(?:api_?-?key|access_?-?key|private_?-?key|token|passw(?:or)?d|\bpwd|secret|credential|signature|env_set)"
_SECRET_NAME = re.compile(_SECRET.replace(r"\b", ""), re.IGNORECASE)
#: `key=value` and `key: value` in a text; a value with blanks is quoted.
_SECRET_VALUE = re.compile(rf"(?i)([\w.+~-]*{_SECRET}[\w.-]*(?:=|:\s+))(?:\"[^\"]*\"|'[^']*'|[^\s&,}}\]]+)")
#: One word of a command line, whose value ends with the word.
_SECRET_WORD = re.compile(rf"(?i)^(-*[\w.+~@/-]*{_SECRET}[\w.-]*=)[^{{\[].*", re.DOTALL)
_SECRET_OPTION = re.compile(rf"(?i)--?[\w.-]*{_SECRET}[\w.-]*")
_URL_LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
HIDDEN = "***"
#: Whether a page names scans and patients, or has the first digits of a digest of each name in its place.
Identifiers = Literal["show", "hash"]
#: Settings of `data` that may name patients, or are paths, also where they are relative.
_NAMES_LESIONS = ("store", "annotations", "path_prefix", "select")


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
    found = _find(target, (*OWN_PARTS, *TORCH_PARTS))
    if not callable(found):
        return False
    defined = _defined_as(found)
    return is_trusted(defined, OWN_PARTS) or (isinstance(found, type) and is_trusted(defined, TORCH_PARTS))


def _is_other_part(target: str) -> str | None:
    """The name, if it is a network or loss of another package that is known to be harmless without weights."""
    module, _, name = target.rpartition(".")
    if name in OTHER_PARTS.get(module, ()):
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


def read_yaml(path: Path) -> Any:
    """Plain values of a YAML file that may come from elsewhere: no objects, and no more than a configuration needs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, is no YAML, is too large, too deep, or becomes too large by its aliases.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES / 1e6:g} MB, which no configuration needs")
        loader = yaml.SafeLoader(text.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases make more than {_MOST_VALUES} values of it")
        return loader.construct_document(node)
    except FileNotFoundError:
        raise
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _num_values(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """Values that a node stands for once its aliases are written out, each node looked at once."""
    if depth > _MOST_DEPTH:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # what it is while it is being looked at: it holds itself
        children: Iterator[yaml.Node] = iter(())
        if isinstance(node, yaml.MappingNode):
            children = (part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            children = iter(node.value)
        known[id(node)] = 1 + sum(_num_values(child, known, depth + 1) for child in children)
    return known[id(node)]


def redacted(values: Any) -> Any:
    """Plain values, with what looks like a secret hidden: by its key, after `key=` in a text, or the login of a URL."""
    if isinstance(values, Mapping):
        return {
            key: _hidden(value) if _SECRET_NAME.search(str(key)) else redacted(value) for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        options = [isinstance(value, str) and bool(_SECRET_OPTION.fullmatch(value)) for value in values]
        return type(values)(
            HIDDEN if follows and isinstance(value, str) else redacted(value)
            for value, follows in zip(values, [False, *options], strict=False)
        )
    if isinstance(values, str):
        text = _SECRET_VALUE.sub(rf"\g<1>{HIDDEN}", _SECRET_WORD.sub(rf"\g<1>{HIDDEN}", values))
        return _URL_LOGIN.sub(rf"\g<1>{HIDDEN}@", text)
    return values


def _hidden(value: Any) -> Any:
    """A secret's value; what is nested in it is hidden too, and a count or a switch is no secret."""
    if isinstance(value, Mapping):
        return {key: _hidden(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_hidden(part) for part in value)
    return HIDDEN if isinstance(value, str) and value else value


def identifier(name: object, identifiers: Identifiers) -> str:
    """A name of a scan or patient as it is, or for `hash` the first 8 hexadecimal digits of its SHA-256.

    One name has the same digits on every page, so that pages can be compared. This is no anonymisation against someone
    who has the names, or can guess them: they need only be hashed in turn.
    """
    return str(name) if identifiers == "show" else hashlib.sha256(str(name).encode()).hexdigest()[:8]


def without_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, with absolute paths hidden, and what of `data` may name scans and patients."""
    plain: dict[str, Any] = _without_places(values)
    if isinstance(data := plain.get("data"), dict):
        plain["data"] = {key: HIDDEN if key in _NAMES_LESIONS and value else value for key, value in data.items()}
    return plain


def _without_places(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_places(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_places(value) for value in values]
    return HIDDEN if isinstance(values, str) and Path(values).is_absolute() else values


def no_world_write() -> None:
    """From here on this process, and those it starts, make no file that everybody may write, whatever the umask."""
    umask = os.umask(0o077)
    os.umask(umask | 0o002)
