"""Encoders as files: weights, the description that rebuilds the network, and the preprocessing of its patches.

Reading never runs code from a file. The weights are safetensors, or a training checkpoint read by torch's
weights-only loader; the network is built by a function of `fmcib_ssl.models.encoders`, or by one that the caller
has named as trusted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import monai
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import fmcib_ssl
from fmcib_ssl.io import parse_json, write_atomically
from fmcib_ssl.models import encoders, published
from fmcib_ssl.models.trusted import is_trusted, trusted_callable
from fmcib_ssl.types import Padding, Preprocessing, UserError, current_target, with_current_targets

#: Key of the description, in a safetensors file's metadata and in a training checkpoint.
_METADATA_KEY = "fmcib_ssl"

#: Prefix of the encoder's weights in a training checkpoint.
_CHECKPOINT_PREFIX = "encoder."

#: Prefix of a projection head's weights in an exported file; no name of a module has a colon.
_HEAD_PREFIX = "head:"

#: Of that description; goes up when older versions of this package could not read it.
FORMAT_VERSION = 1
#: In an exported file's description; what is there besides it is what files had before they had it.
_DIGEST = "digest"
_DESCRIPTION = {"format_version", "encoder", "feature_dim", "preprocessing", "versions", "extra", "head"}
#: Voxels along an edge; a larger one in a file is damage.
_LARGEST_PATCH = 4096
#: What a file may name without being trusted.
_OWN_TARGETS: dict[str, Callable[..., nn.Module]] = {
    f"{build.__module__}.{build.__name__}": build
    for build in (
        encoders.monai_resnet, encoders.small_resnet, encoders.video_resnet, encoders.CenterPooledResNet,
        published.PooledNetwork, published.genesis_unet, published.medicalnet_resnet, published.segresnet,
        published.swin_transformer,
    )
}  # fmt: skip


class EncoderFileError(UserError, ValueError):
    """A file is not an encoder of ours, or is damaged; the message names it and says what to do."""


def encoder_metadata(
    encoder: nn.Module, spec: Mapping[str, Any], preprocessing: Preprocessing, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describe an encoder so that it can be rebuilt; also what a training checkpoint holds under `"fmcib_ssl"`.

    Args:
        encoder: the network.
        spec: `_target_`, the dotted name of what built it, and the arguments; plain values only.
        preprocessing: of the patches it was trained on.
        extra: further metadata, such as the name of the run; plain values only.

    Raises:
        ValueError: `spec` names no `_target_`, `spec` or `extra` do not fit into JSON, or the encoder cannot take
            the patches of `preprocessing`.
    """
    if not isinstance(spec.get("_target_"), str):
        raise ValueError(f"the encoder's spec names no _target_, the dotted name of what builds it: {dict(spec)}")
    metadata = {
        "format_version": FORMAT_VERSION,
        "encoder": dict(spec),
        "feature_dim": encoders.feature_dim(encoder, preprocessing.patch_size_zyx),
        "preprocessing": preprocessing.to_dict(),
        "versions": {"fmcib_ssl": fmcib_ssl.__version__, "torch": torch.__version__, "monai": monai.__version__},
        "extra": dict(extra or {}),
    }
    try:
        return cast(dict[str, Any], json.loads(json.dumps(metadata, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"spec and extra may hold only numbers, texts, lists and dictionaries: {error}") from error


def export_encoder(
    encoder: nn.Module,
    spec: Mapping[str, Any],
    preprocessing: Preprocessing,
    path: str | os.PathLike[str],
    *,
    extra: Mapping[str, Any] | None = None,
    head: nn.Module | None = None,
) -> None:
    """Write an encoder as one safetensors file, float32, that `load_encoder` can read.

    The file appears under its name only when it is complete; one that was there is replaced.

    Args:
        encoder: the network.
        spec: `_target_` and arguments that rebuild it; see `encoder_metadata`.
        preprocessing: of the patches it was trained on.
        path: of the file; folders are made as needed.
        extra: further metadata.
        head: the projection that was trained with it, to be kept in the file for `load_head`.

    Raises:
        ValueError: as `encoder_metadata`.
    """
    path = Path(path)
    metadata = encoder_metadata(encoder, spec, preprocessing, extra)
    named = dict(encoder.state_dict())
    if head is not None:
        metadata["head"] = type(head).__name__
        named |= {_HEAD_PREFIX + name: weight for name, weight in head.state_dict().items()}
    weights = {}  # dense copies on the CPU, in float32 if they are floating-point tensors
    for name, weight in named.items():
        dtype = torch.float32 if weight.is_floating_point() else weight.dtype
        weights[name] = weight.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    metadata[_DIGEST] = _digest(metadata, weights)
    # Not safetensors' save_file: it makes files that only their owner may read.
    write_atomically(path, save(weights, metadata={_METADATA_KEY: json.dumps(metadata)}))


def load_encoder(path: str | os.PathLike[str], *, trusted_targets: Collection[str] = ()) -> nn.Module:
    """Rebuild an encoder from an exported file or from a training checkpoint.

    Args:
        path: a `.safetensors` file of `export_encoder`, or a `.ckpt` of a training run.
        trusted_targets: what may be imported and called because the file asks for it, besides this package's own
            encoders: dotted names, or packages and modules all of which is meant.

    Returns:
        The encoder, `(batch, 1, z, y, x)` to `(batch, features)`, float32, on the CPU, in eval mode. Its
        `preprocessing` (`fmcib_ssl.types.Preprocessing`) says how patches are cut and scaled for it; `feature_dim` is
        the number of features, `spec` the `_target_` and arguments that built it, `extra` what else was noted. It
        refuses patches of another size than `preprocessing` says: most networks take them, and give features that mean
        something else. Who wants them says so:
        `encoder.preprocessing = dataclasses.replace(encoder.preprocessing, patch_size_zyx=(z, y, x))`.

    Raises:
        FileNotFoundError: no such file.
        EncoderFileError: not such a file, a damaged one, weights that do not fit the network or are not finite, or a
            network whose target is not trusted.

    Example:
        >>> encoder = fmcib_ssl.load_encoder("encoder.safetensors")
        >>> patches_hu = torch.full((2, 1, *encoder.preprocessing.patch_size_zyx), -1000)
        >>> encoder(encoder.preprocessing.normalize(patches_hu)).shape
        torch.Size([2, 8])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give an exported encoder or a .ckpt of a run.")
    try:
        metadata, weights, _ = _read(path)
        spec = with_current_targets(dict(metadata["encoder"]))
        spec["_target_"] = target = str(spec["_target_"])
        num_features = int(metadata["feature_dim"])
        preprocessing = _preprocessing(metadata["preprocessing"])
    except (SafetensorError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise EncoderFileError(
            f"{path}: damaged, or not an encoder that fmcib_ssl wrote: {error!r}. Export or copy it again"
        ) from error

    try:
        if target in _OWN_TARGETS and not any(isinstance(value, dict) for value in spec.values()):
            with torch.device("meta"):  # sizes that do not fit are refused before they take any memory
                build_network(spec, trusted_targets, path).load_state_dict(weights, strict=True, assign=True)
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn only to be overwritten
            encoder = build_network(spec, trusted_targets, path)
        encoder.load_state_dict(weights, strict=True)
    except EncoderFileError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, MemoryError) as error:
        raise EncoderFileError(f"{path}: {spec} does not fit the weights in the file: {error}") from error
    encoder.preprocessing = preprocessing  # type: ignore[assignment]
    encoder.register_forward_pre_hook(_check_patches)
    encoder.feature_dim = num_features  # type: ignore[assignment]
    encoder.spec = spec
    encoder.extra = metadata["extra"]
    return encoder.float().eval()


def load_head(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights of the projection head in a checkpoint, or in an exported file that keeps it, by name.

    Raises:
        FileNotFoundError: no such file.
        EncoderFileError: as of `load_encoder`, or a file without a head.
    """
    try:
        _, _, head = _read(Path(path))
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise EncoderFileError(f"{path}: damaged, or not an encoder that fmcib_ssl wrote: {error!r}") from error
    if not head:
        raise EncoderFileError(f"{path} keeps no head: a run with export.keep_head=true does, and its checkpoints do")
    return head


def _check_patches(encoder: Any, inputs: tuple[Any, ...]) -> None:
    """A hook before an encoder's forward: the patches must be as large as those it was trained on."""
    size, shape = encoder.preprocessing.patch_size_zyx, tuple(inputs[0].shape)
    if shape[1:] != (1, *size):
        raise ValueError(
            f"the encoder takes patches (batch, {', '.join(map(str, (1, *size)))}), of "
            f"{encoder.preprocessing.spacing_mm:g} mm voxels, as encoder.preprocessing says; got {shape}. Cut them so, "
            "or set encoder.preprocessing to the size that you mean (load_encoder's documentation shows how)"
        )


def _preprocessing(values: Any) -> Preprocessing:
    """The preprocessing in a file's description, checked."""
    result = Preprocessing.from_dict(values)
    sizes, window = result.patch_size_zyx, result.window_hu or ()
    numbers = (result.spacing_mm, result.padding_hu, result.hu_offset, result.hu_scale, *window)
    if len(sizes) != 3 or not all(type(size) is int and 1 <= size <= _LARGEST_PATCH for size in sizes):
        raise ValueError(f"patch_size_zyx={sizes}")
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"numbers of preprocessing: {values}")
    if result.spacing_mm <= 0 or result.hu_scale == 0 or result.padding not in get_args(Padding):
        raise ValueError(
            f"{values}: spacing_mm must be above 0, hu_scale not 0, padding {' or '.join(get_args(Padding))}"
        )
    if window and not (len(window) == 2 and window[0] < window[1]):
        raise ValueError(f"window_hu={window}: must be the lowest and the highest HU")
    return result


def _digest(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a file says: the description as JSON with sorted keys, then each weight by its name."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Description, weights and those of the head, if it has one, of an exported file or a checkpoint, as written.

    Raises:
        SafetensorError, LookupError, TypeError, ValueError, RecursionError: it is neither, or is damaged.
    """
    with path.open("rb") as file:
        is_checkpoint = file.read(2) == b"PK"  # torch saves zip archives
    if is_checkpoint:
        checkpoint = read_archive(path)
        metadata, state = checkpoint[_METADATA_KEY], checkpoint["state_dict"]
        weights, head = _behind(_CHECKPOINT_PREFIX, state), _behind("head.", state)
    else:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {})[_METADATA_KEY])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    if (version := metadata.get("format_version") if isinstance(metadata, dict) else None) != FORMAT_VERSION:
        raise ValueError(
            f"format version {version}, and this is fmcib_ssl {fmcib_ssl.__version__}, which reads version "
            f"{FORMAT_VERSION}: use the version of fmcib_ssl that wrote it, or a newer one"
        )
    for name, weight in [*weights.items(), *(head.items() if is_checkpoint else ())]:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} is no tensor but {type(weight).__name__}")
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} holds NaN or infinity, so every feature would: take an earlier checkpoint")
    if not is_checkpoint:
        # A file of an earlier version has no digest; one whose digest has another name by a damaged bit has an unknown
        # key.
        digest, unknown = metadata.pop(_DIGEST, None), metadata.keys() - _DESCRIPTION
        if unknown or (digest is not None and digest != _digest(metadata, weights)):
            reason = f"unknown: {sorted(unknown)}" if unknown else "the digest differs"
            raise ValueError(f"its contents are not those that were exported ({reason})")
        head = _behind(_HEAD_PREFIX, weights)
        weights = {name: weight for name, weight in weights.items() if not name.startswith(_HEAD_PREFIX)}
    return metadata, weights, head


def _behind(prefix: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose names have a prefix, by their names without it."""
    chosen = (name for name in weights if isinstance(name, str) and name.startswith(prefix))
    return {name.removeprefix(prefix): weights[name] for name in chosen}


def read_archive(path: Path) -> Any:
    """What `torch.save` wrote: weights and plain values; nothing in it is run.

    The check sum of each part is compared first, which torch's own reader does not do.

    Raises:
        ValueError: not such a file, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its parts are compressed, which those of a checkpoint are not")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the check sum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's readers fail in every way there is on a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"damaged, or not of this kind: {reason}") from error


def build_network(spec: Mapping[str, Any], trusted_targets: Collection[str], source: object) -> nn.Module:
    """Build what `_target_` names with the arguments beside it, among which may be other networks, named alike.

    Imports only what is ours or trusted.

    Args:
        spec: `_target_` and arguments.
        trusted_targets: as of `load_encoder`.
        source: who asks for it, for messages.

    Raises:
        EncoderFileError: a target is neither ours nor trusted, or there is no such thing.
        Exception: whatever the network raises for its arguments.
    """
    arguments = {
        key: build_network(value, trusted_targets, source)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in spec.items()
        if key != "_target_"
    }
    return _builder(str(spec["_target_"]), trusted_targets, source)(**arguments)


def _builder(target: str, trusted_targets: Collection[str], source: object) -> Callable[..., nn.Module]:
    """What `_target_` stands for."""
    target = current_target(target)
    if target in _OWN_TARGETS:
        return _OWN_TARGETS[target]
    if not is_trusted(target, trusted_targets):
        raise EncoderFileError(
            f"{source}: its encoder is built by {target}, which is not one of fmcib_ssl's. If you trust the file and "
            f"that code, allow it: trusted_targets=[{target!r}]."
        )
    build = trusted_callable(target, trusted_targets)
    if build is None:
        reason = "cannot be imported, or is defined in another package than that"
        raise EncoderFileError(f"{source}: its encoder is built by {target}, which {reason}.")
    return build
