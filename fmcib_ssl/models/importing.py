"""Published weights as encoders of this package: a table of sources, and one way to read all of them.

A file holds weights under one name or another (`CONTAINERS`), and each key has a prefix of the module that the encoder
was a part of (`module.`, `model.trunk.`, `encoder.`). The prefix is the one under which most of the encoder's own keys
are found. What lies beside it (heads, decoders) is left out and reported; what lies under it must fit, key by key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fmcib_ssl.io import sha256_of
from fmcib_ssl.models.encoders import feature_dim
from fmcib_ssl.models.export import EncoderFileError, build_network, export_encoder
from fmcib_ssl.models.published import PooledNetwork
from fmcib_ssl.models.trusted import targets_of
from fmcib_ssl.types import Preprocessing

#: Under these names of a file's dictionary are weights, in this order.
CONTAINERS = ("trunk_state_dict", "state_dict", "net", "model")
_NAMED_AT_ONCE = 20


@dataclass(frozen=True)
class Source:
    """Published weights.

    Attributes:
        encoder: `_target_` and arguments of their network; None: the user names it.
        preprocessing: of their patches, as published; None: the user says.
        left_out: beginnings of keys that are no part of the encoder although they have its prefix.
        mean_std: what is subtracted from intensities of 0 to 1, and what divides them then.
        licence: as published with the code; weights may have another one beside them.
        citation: of the paper.
    """

    encoder: Mapping[str, Any] | None = None
    preprocessing: Preprocessing | None = None
    left_out: tuple[str, ...] = ()
    mean_std: tuple[float, float] = (0.0, 1.0)
    licence: str | None = None
    citation: str | None = None


def _window(low: float, high: float, mean: float = 0.0, std: float = 1.0) -> dict[str, Any]:
    """Arguments of `Preprocessing` that scale `low` to `high` HU to 0 to 1, and standardise that."""
    if not low < high:
        raise ValueError(f"hu_window=[{low:g},{high:g}]: the lowest HU comes first, as in [-1000,400]")
    extent = high - low
    return {"window_hu": (low, high), "hu_offset": -low - mean * extent, "hu_scale": extent * std}


_MODULE = "fmcib_ssl.models.published"
_ABDOMEN = Preprocessing((96, 96, 96), 1.5, **_window(-175, 250))
_SUPREM = Source(
    {"_target_": f"{_MODULE}.swin_transformer", "feature_size": 48, "use_v2": False},
    _ABDOMEN,
    licence="MIT (code)",
    citation="Li et al. 2024, How well do supervised 3D models transfer to medical imaging tasks?",
)
_GENESIS = Source(
    {"_target_": f"{_MODULE}.genesis_unet"},
    Preprocessing((32, 64, 64), 1.0, **_window(-1000, 1000)),
    ("up_tr", "out_tr"),
    licence="MIT (code)",
    citation="Zhou et al. 2021, Models Genesis",
)
_VOCO = replace(_SUPREM, licence=None, citation="Wu et al. 2024, VoCo")
_MEDICALNET = Source(left_out=("conv_seg.", "fc."), licence="MIT (code)", citation="Chen et al. 2019, Med3D")
_KINETICS = Source(
    left_out=("fc.",),
    mean_std=(0.4011, 0.2222),  # of the three channels
    licence="BSD-3 (code)",
    citation="Tran et al. 2018, A closer look at spatiotemporal convolutions for action recognition",
)
#: Sources by name; docs/weights.md says which were tested how.
SOURCES: dict[str, Source] = {
    "fmcib": Source(
        {
            "_target_": "fmcib_ssl.models.encoders.monai_resnet",
            "depth": 50,
            "widen_factor": 2.0,
            "conv1_t_size": 7,
            "conv1_t_stride": 2,
            "no_max_pool": False,
        },
        Preprocessing(),
        licence="MIT (code)",
        citation="Pai et al. 2024, Foundation model for cancer imaging biomarkers, doi:10.1038/s42256-024-00807-9",
    ),
    "ct_fm": Source(
        {"_target_": f"{_MODULE}.segresnet", "init_filters": 32, "blocks_down": [1, 2, 2, 4, 4]},
        Preprocessing((96, 96, 96), 1.0, **_window(-1024, 2048)),
        citation="Pai et al. 2025, Vision foundation models for computed tomography, arXiv:2501.09001",
    ),
    "genesis": _GENESIS,
    "suprem_unet": replace(_SUPREM, encoder=_GENESIS.encoder, left_out=_GENESIS.left_out),
    "suprem_swin": _SUPREM,
    **{
        f"voco_{name}": replace(_VOCO, encoder={**(_SUPREM.encoder or {}), "feature_size": size, "use_v2": True})
        for name, size in (("b", 48), ("l", 96), ("h", 192))
    },
    **{
        f"medicalnet_resnet{depth}": replace(
            _MEDICALNET, encoder={"_target_": f"{_MODULE}.medicalnet_resnet", "depth": depth}
        )
        for depth in (10, 18, 34, 50)
    },
    **{
        f"torchvision_{name}": replace(
            _KINETICS, encoder={"_target_": "fmcib_ssl.models.encoders.video_resnet", "name": name}
        )
        for name in ("r3d_18", "mc3_18", "r2plus1d_18")
    },
    "lighter": Source(),
    "state_dict": Source(),
    "monai": Source(),
}


@dataclass(frozen=True)
class Imported:
    """What an import has found in a file.

    Attributes:
        num_keys: of the encoder, all of which were in the file.
        prefix: of these keys in the file.
        left_out: keys of the file that are not the encoder's.
        sha256: of the file.
        feature_dim: number of features.
        preprocessing: of the patches.
        licence: of the weights, as far as it is known.
    """

    num_keys: int
    prefix: str
    left_out: list[str] = field(repr=False)
    sha256: str
    feature_dim: int
    preprocessing: Preprocessing
    licence: str | None


def import_encoder(
    file: Path,
    output: Path,
    source: str,
    *,
    encoder: Mapping[str, Any] | None = None,
    patch_size_zyx: tuple[int, int, int] | None = None,
    spacing_mm: float | None = None,
    hu_window: tuple[float, float] | None = None,
    prefix: str | None = None,
    left_out: Collection[str] = (),
    licence: str | None = None,
) -> Imported:
    """Turn published weights into an encoder file that `load_encoder` reads.

    Nothing in the file is unpickled but tensors and plain values. The output records source, SHA-256, licence and
    citation under `extra`.

    Args:
        file: as published: of `torch.save`, or safetensors.
        output: `.safetensors` to write.
        source: a name of `SOURCES`.
        encoder: `_target_` and arguments of the network, where the source names none; what it names is imported.
        patch_size_zyx: voxels of the patches; None: the source's.
        spacing_mm: edge of the voxels; None: the source's, or 1.
        hu_window: HU that become 0 and 1 (and are standardised then, if the source does so), with values beyond
            clamped; None: the source's.
        prefix: of the encoder's keys; None: the one under which most of them are.
        left_out: beginnings of keys, behind the prefix, that are no part of the encoder, besides the source's.
        licence: of the weights; None: the source's.

    Raises:
        FileNotFoundError: no such file.
        EncoderFileError: not a file of weights, or weights that do not fit the network (every key that does not is
            listed), or are not finite.
        ValueError: no such source, a network or patches that nobody has named, or that do not fit each other.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source}: must be one of {', '.join(SOURCES)}")
    known = SOURCES[source]
    spec = encoder or known.encoder
    if spec is None:
        raise ValueError(f"source={source} can be any network: name it, encoder=")
    if known.preprocessing is None and (hu_window is None or patch_size_zyx is None):
        raise ValueError(f"source={source} has no patches of its own: give hu_window=[low,high] and patch_size=[z,y,x]")
    changes: dict[str, Any] = {} if hu_window is None else _window(*hu_window, *known.mean_std)
    changes |= {} if patch_size_zyx is None else {"patch_size_zyx": patch_size_zyx}
    changes |= {} if spacing_mm is None else {"spacing_mm": spacing_mm}
    preprocessing = replace(known.preprocessing or Preprocessing(), **changes)
    if source == "monai":
        spec = {"_target_": f"{_MODULE}.PooledNetwork", "network": dict(spec)}
    network = build_network(spec, targets_of(spec), "encoder")
    inner = network.network if isinstance(network, PooledNetwork) else network
    weights, sha256 = read_weights(file)
    own = inner.state_dict()
    prefix = _prefix_of(weights, own, file) if prefix is None else prefix
    beside = [key for key in weights if not key.startswith(prefix)]
    behind = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    dropped = [key for key in behind if key.startswith((*known.left_out, *left_out))]
    fitting = {key: _for_one_channel(weight, own.get(key)) for key, weight in behind.items() if key not in dropped}
    if problems := misfits(fitting, own):
        raise EncoderFileError(
            f"{file}: under the prefix {prefix!r} not all keys are those of {spec}:\n" + "\n".join(problems)
            + "\nName another encoder=, or another prefix=; left_out=[head,fc] leaves out what the encoder has not"
        )  # fmt: skip
    inner.load_state_dict(fitting, strict=True)
    extra = {
        "source": source, "file": file.name, "sha256": sha256, "licence": licence or known.licence,
        "citation": known.citation,
    }  # fmt: skip
    export_encoder(network.eval(), spec, preprocessing, output, extra=extra)
    num_features = feature_dim(network, preprocessing.patch_size_zyx)
    dropped = [*beside, *(prefix + key for key in dropped)]
    return Imported(len(own), prefix, dropped, sha256, num_features, preprocessing, extra["licence"])


def read_weights(file: Path) -> tuple[dict[str, Tensor], str]:
    """The weights in a file that somebody else wrote, by key, and its SHA-256; nothing in it is run.

    Raises:
        FileNotFoundError: no such file.
        EncoderFileError: it holds something else, or more than tensors and plain values.
    """
    sha256 = sha256_of(file)
    try:
        if file.suffix == ".safetensors":
            values: Any = load_file(file)
        else:
            values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's and safetensors' readers fail in every way there is on such a file
        raise EncoderFileError(
            f"{file}: no file of weights, or one with code besides: {str(error).splitlines()[0][:200]}. Of a file that "
            "you trust, save the weights alone, where its own project runs: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error
    for name in CONTAINERS:
        if isinstance(values, Mapping) and isinstance(values.get(name), Mapping):
            values = values[name]
    weights = {str(key): value for key, value in values.items() if isinstance(value, Tensor)} if values else {}
    if not weights:
        held = (
            ", ".join(map(str, list(values)[:_NAMED_AT_ONCE])) if isinstance(values, Mapping) else type(values).__name__
        )
        raise EncoderFileError(
            f"{file}: it has no weights under {', '.join(CONTAINERS)} or by themselves; it has {held}"
        )
    for key, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise EncoderFileError(f"{file}: {key} holds NaN or infinity, so every feature would")
    return weights, sha256


def _prefix_of(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path) -> str:
    """What comes before most of the encoder's own keys."""
    counts: Counter[str] = Counter()
    for key in weights:
        parts = key.split(".")
        counts.update({".".join(parts[:n]) + "." * (n > 0) for n in range(len(parts)) if ".".join(parts[n:]) in own})
    best = counts.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1]:
        raise EncoderFileError(
            f"{file}: as many keys of the encoder are under {best[0][0]!r} as under {best[1][0]!r}: say which, prefix="
        )
    return best[0][0] if best else ""


def _for_one_channel(weight: Tensor, own: Tensor | None) -> Tensor:
    """The kernel of a stem for RGB as one for gray: the sum, which is what gray in all three channels would give."""
    if own is not None and weight.ndim == 5 and weight.shape[1] == 3 and own.shape[1] == 1:
        return weight.sum(1, keepdim=True)
    return weight


def misfits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What does not fit, a line each; of each kind the first ones, and how many there are."""
    shapes = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    kinds = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [f"{key} {tuple(weights[key].shape)}, not {tuple(own[key].shape)}" for key in shapes],
    }
    return [
        f"  {kind} ({len(keys)}): {', '.join(keys[:_NAMED_AT_ONCE])}" + ", ..." * (len(keys) > _NAMED_AT_ONCE)
        for kind, keys in kinds.items()
        if keys
    ]
