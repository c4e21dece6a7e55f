"""Encoders in the formats of others: torch.export, ONNX, a MONAI bundle, a folder for the Hugging Face hub.

A program (torch.export, ONNX) takes normalised patches `(batch, 1, z, y, x)` of any batch. It is run on two and on
three random ones after it was written, and refused if its features are not those of the encoder. The other two formats
hold the encoder's own file, which `load_encoder` reads.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
import yaml
from torch import Tensor, nn

import fmcib_ssl
from fmcib_ssl.io import sha256_of, write_atomically, write_json
from fmcib_ssl.types import Preprocessing, UserError

#: Largest difference of a program's features from the encoder's, over the largest feature: float32 alone makes 1e-4 of
#: it in a deep network.
TOLERANCE = 1e-3
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


class FormatError(UserError, ValueError):
    """An encoder cannot be written in a format; the message says why."""


def write_program(encoder: Any, path: Path) -> float:
    """Write an encoder as a program of torch.export (`.pt2`) or as an ONNX file (`.onnx`).

    Args:
        encoder: as of `load_encoder`.
        path: its ending says which.

    Returns:
        The largest difference of a feature from the encoder's own, over the largest feature.

    Raises:
        FormatError: a network that cannot be exported, or whose exported features differ.
    """
    size = encoder.preprocessing.patch_size_zyx
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand(3, 1, *size, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            batch = {0: torch.export.Dim("batch", min=1, max=2**16)}
            program = torch.export.export(encoder, (patches,), dynamic_shapes=(batch,))
            if path.suffix == ".onnx":
                names: dict[str, Any] = {"input_names": ["patches"], "output_names": ["features"]}
                made = torch.onnx.export(program, (patches,), dynamo=True, verbose=False, **names)
                assert made is not None
                made.save(path, external_data=False)
            else:
                torch.export.save(program, path)
    except ImportError as error:
        raise FormatError(f"{path.suffix} needs more: pip install 'fmcib_ssl[onnx]' ({error})") from error
    except Exception as error:  # torch's exporters fail in every way there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path}: torch cannot export {type(encoder).__name__}: {reason}") from error
    worst = max(_difference(encoder, path, patches[:number]) for number in (2, 3))
    if not worst <= TOLERANCE:
        path.unlink()
        raise FormatError(f"{path.name}: its features differ from the encoder's by {worst:.2g} of the largest one")
    return worst


def _difference(encoder: nn.Module, path: Path, patches: Tensor) -> float:
    """Of the features that the file gives from the encoder's, relative to the largest."""
    with torch.no_grad():
        expected = encoder(patches)
        if path.suffix == ".onnx":
            import onnxruntime  # noqa: PLC0415  (an extra)

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(np.asarray(session.run(None, {"patches": patches.numpy()})[0]))
        else:
            found = torch.export.load(path).module()(patches)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def write_monai_bundle(encoder: Any, file: Path, folder: Path, *, name: str, licence: str | None) -> None:
    """Write a MONAI bundle whose `run` turns a table of points in scans into a table of features.

    `python -m monai.bundle run --config_file configs/inference.json --bundle_root . --annotations my.csv`; it needs
    fmcib_ssl, which cuts the patches at the points and normalises them as the encoder was trained.

    Args:
        encoder: as of `load_encoder`.
        file: that it was loaded from.
        folder: of the bundle.
        name: of the encoder.
        licence: of its weights.
    """
    (folder / "models").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / "models" / "encoder.safetensors")
    cut, dim = encoder.preprocessing, encoder.feature_dim
    low, high = cut.window_hu or (cut.padding_hu, None)
    image = {
        "type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1,
        "spatial_shape": list(cut.patch_size_zyx), "dtype": "float32", "is_patch_data": True,
        "value_range": [(hu + cut.hu_offset) / cut.hu_scale for hu in (low, 3071 if high is None else high)],
        "channel_def": {"0": "image"},
    }  # fmt: skip
    features = {
        "type": "feature", "format": "feature", "num_channels": dim, "spatial_shape": [], "dtype": "float32",
        "value_range": [], "is_patch_data": False, "channel_def": {"0": "feature"},
    }  # fmt: skip
    metadata = {
        "schema": _SCHEMA, "version": "0.1.0", "changelog": {"0.1.0": "exported by fmcib_ssl"},
        "monai_version": monai.__version__, "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__, "required_packages_version": {"fmcib_ssl": fmcib_ssl.__version__},
        "name": name, "task": "features of lesions on CT", "description": _summary(encoder),
        "authors": "the owner of the run", "copyright": licence or "not stated", "data_type": "CT with points (LPS mm)",
        "intended_use": _INTENDED_USE,
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": features}},
    }  # fmt: skip
    inference = {
        "imports": ["$import fmcib_ssl"],
        "bundle_root": ".",
        "annotations": "annotations.csv",
        "output": "$@bundle_root + '/features.parquet'",
        "weights": "$@bundle_root + '/models/encoder.safetensors'",
        "stores": "$@bundle_root + '/stores'",
        "network_def": "$fmcib_ssl.load_encoder(@weights)",
        "run": ["$fmcib_ssl.embed(@weights, @annotations, stores=@stores).write(@output)"],
    }
    write_json(folder / "configs" / "metadata.json", metadata)
    write_json(folder / "configs" / "inference.json", inference)


def write_huggingface(
    encoder: Any,
    file: Path,
    folder: Path,
    *,
    name: str,
    licence: str | None,
    description: str | None = None,
    run: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a folder for the Hugging Face hub: weights, `config.json`, and the model card `README.md`.

    Args:
        encoder: as of `load_encoder`.
        file: that it was loaded from.
        folder: to write.
        name: of the model.
        licence: its identifier, such as `mit` or `cc-by-4.0`.
        description: of the data that it was trained on, in the owner's words.
        run: the contents of `run.json`, of a run.
        settings: the contents of its `config.yaml`.
        results: the rows of an evaluation's `results.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / "encoder.safetensors")
    config = {
        "library_name": "fmcib_ssl", "encoder": encoder.spec, "feature_dim": encoder.feature_dim,
        "preprocessing": encoder.preprocessing.to_dict(), "extra": encoder.extra, "sha256": sha256_of(file),
    }  # fmt: skip
    write_json(folder / "config.json", config)
    front = {
        "license": licence or "other", "library_name": "fmcib_ssl", "pipeline_tag": "image-feature-extraction",
        "tags": ["medical", "ct", "3d", "lesions", "self-supervised"],
    }  # fmt: skip
    sections = {
        name: _summary(encoder),
        "Use": _USE.format(
            call="fmcib_ssl.load_encoder('encoder.safetensors')", preprocessing=_how(encoder.preprocessing)
        ),
        "Intended use": _INTENDED_USE,
        "Limits": _LIMITS,
        "Data": description or "The owner has not described the data that this encoder was trained on.",
        "Training": _training(encoder, run, settings),
        "Results": _results(results),
    }
    text = "\n\n".join(
        f"{'##' if number else '#'} {title}\n{body}" for number, (title, body) in enumerate(sections.items())
    )
    write_atomically(folder / "README.md", f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}\n")


_INTENDED_USE = (
    "Features of lesions on CT for research: probes, retrieval, starting weights. It is no medical device, and no "
    "decision about a patient may rest on it."
)
_LIMITS = (
    "It takes patches of the size, voxel and scale above, centred on a point; other patches give features that mean "
    "something else. It knows scanners, protocols and patients like those it was trained on: measure it on your own "
    "(`fmcib-ssl evaluate` reports probes beside hand-made statistics, raw voxels and lesion size)."
)
_USE = """```python
import fmcib_ssl

encoder = {call}
features = encoder(encoder.preprocessing.normalize(patch_hu))  # (batch, 1, z, y, x) HU -> (batch, features)
```
{preprocessing}"""


def _summary(encoder: Any) -> str:
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    target = encoder.spec["_target_"].rpartition(".")[2]
    return f"{target}: {encoder.feature_dim} features of a CT patch round a lesion's point, {millions:.3g} M weights."


def _how(cut: Preprocessing) -> str:
    clamp = (
        f"clamped to {cut.window_hu[0]:g} to {cut.window_hu[1]:g}" if cut.window_hu else f"at least {cut.padding_hu}"
    )
    size = " x ".join(map(str, cut.patch_size_zyx))
    return (
        f"Patches: {size} voxels (z, y, x) of {cut.spacing_mm:g} mm, whose indices grow towards superior, posterior, "
        f"left; HU {clamp}, then (HU + {cut.hu_offset:g}) / {cut.hu_scale:g}."
    )


def _training(encoder: Any, run: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> str:
    """What the run's own files say, without places and names."""
    facts = {key: encoder.extra.get(key) for key in ("source", "file", "citation", "licence", "run", "step", "seed")}
    facts |= {"finished": ((run or {}).get("finished") or {}).get("time")}
    for name, start in ((run or {}).get("started_from") or {}).items():
        known = ", ".join(start[key] for key in ("source", "licence") if key in start)
        facts[f"{name} started from"] = f"{Path(start['file']).name} ({known or 'a run'}), SHA-256 {start['sha256']}"
    for section in ("method", "loss", "optimizer", "augment"):
        facts[section] = _part((settings or {}).get(section) or {})
    facts["encoder"] = _part(encoder.spec)
    lines = [f"| {key} | {value} |" for key, value in facts.items() if value not in (None, "")]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else "Nothing is recorded."


def _part(section: Mapping[str, Any]) -> str:
    """What builds a part of the run, and its arguments."""
    arguments = [f"{key} {value}" for key, value in section.items() if not key.startswith("_") and value is not None]
    target = str(section.get("_target_", "")).removeprefix("fmcib_ssl.")
    return f"{target}: {', '.join(arguments)}" if arguments else target


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "No evaluation was given: make one with `fmcib-ssl evaluate`, then export again with results=."
    columns = [key for key in ("task", "features", "probe", "split", "fraction") if any(row.get(key) for row in rows)]
    lines = [
        "| " + " | ".join([*columns, "metric", "value (95 % interval)"]) + " |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for row in rows:
        value = f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        known = value if all(math.isfinite(row[key]) for key in ("value", "low", "high")) else "not defined"
        lines.append("| " + " | ".join([*(str(row.get(key, "")) for key in columns), row["metric"], known]) + " |")
    return "Intervals by resampling patients.\n\n" + "\n".join(lines)
