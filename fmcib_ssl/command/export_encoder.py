"""Write an encoder in the formats of others: ONNX, torch.export, a MONAI bundle, a folder for the Hugging Face hub."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fmcib_ssl.command import run_command, weights_file
from fmcib_ssl.io import Command, read_json, read_yaml


class ExportEncoder(Command):
    """Write an encoder in the formats of others.

    fmcib-ssl export-encoder encoder=runs/x formats=onnx,huggingface output=exported results=evaluated/results.json

    Programs (onnx, torch_export) are compared with the encoder after they are written. push= needs a token of
    huggingface_hub (`hf auth login`, or HF_TOKEN), which is not stored.
    """

    encoder: Path = Field(description="run folder, or encoder.safetensors")
    output: Path = Field(description="folder to write")
    formats: list[Literal["onnx", "torch_export", "monai_bundle", "huggingface"]] = Field(
        ["onnx"], description="onnx, torch_export, monai_bundle, huggingface; comma-separated"
    )
    name: str | None = Field(None, description="of the model; null: the run's, or the file's")
    licence: str | None = Field(None, description="of the weights, such as mit or cc-by-4.0")
    description: str | None = Field(None, description="of the training data, for the model card; a text or FILE.md")
    results: Path | None = Field(None, description="results.json of an evaluation, for the model card")
    push: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="org/name on the hub, of huggingface")
    public: bool = Field(False, description="true: whoever wants may see what is pushed")
    trusted_targets: list[str] = Field([], description="foreign encoders to build, comma-separated")


def run(command: ExportEncoder) -> None:
    """Export, print what was written."""
    if command.push and "huggingface" not in command.formats:
        raise ValueError("push= sends the folder of formats=huggingface: add it")
    print(*export(command), sep="\n")


def export(command: ExportEncoder) -> list[str]:
    """Write all formats; a line for each."""
    from fmcib_ssl import models  # noqa: PLC0415  # the help is quick

    file, about = weights_file(command.encoder), {}
    if command.encoder.is_dir():
        about = {"run": read_json(command.encoder / "run.json"), "settings": read_yaml(command.encoder / "config.yaml")}
    if file.suffix != ".safetensors":
        raise models.EncoderFileError(f"{file} is a checkpoint: finish the run, which writes encoder.safetensors")
    encoder: Any = models.load_encoder(file, trusted_targets=command.trusted_targets)
    licence = command.licence or encoder.extra.get("licence")
    name = command.name or encoder.extra.get("run") or file.stem
    lines = []
    for kind, ending in (("onnx", "onnx"), ("torch_export", "pt2")):
        if kind in command.formats:
            program = command.output / f"{name}.{ending}"
            difference = models.write_program(encoder, program)
            lines.append(f"{kind:<13} {program}, features within {difference:.1g} of the largest")
    if "monai_bundle" in command.formats:
        models.write_monai_bundle(encoder, file, command.output / "monai_bundle", name=name, licence=licence)
        lines.append(f"{'monai_bundle':<13} {command.output / 'monai_bundle'}")
    if "huggingface" in command.formats:
        folder, text = command.output / "huggingface", command.description
        if text and Path(text).suffix == ".md":
            text = Path(text).read_text(encoding="utf-8")
        rows = read_json(command.results)["rows"] if command.results else []
        models.write_huggingface(
            encoder, file, folder, name=name, licence=licence, description=text, results=rows, **about
        )
        lines.append(f"{'huggingface':<13} {folder}, README.md is the model card")
        if command.push:
            lines.append(f"{'pushed':<13} {push(folder, command.push, public=command.public)}")
    return lines


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Send a folder to the hub; gives the address of the commit."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (an extra)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    hub = HfApi()
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Encoder and model card"))
    except HfHubHTTPError as error:
        raise ValueError(f"push={repository}: the hub refused: {error}. Is there a token (hf auth login)?") from error


main = partial(
    run_command, ExportEncoder, run, other_names={"checkpoint": "encoder"}, interrupted="stopped", level=logging.WARNING
)
