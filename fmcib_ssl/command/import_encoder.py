"""Turn published weights into an encoder file; docs/weights.md has the table of sources."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command


class ImportEncoder(Command):
    """Turn published weights into an encoder file that embed, train and fine-tuning take.

    fmcib-ssl import-encoder source=fmcib file=model_weights.torch output=fmcib.safetensors

    Nothing in the file is run. All keys of the network must be in it; those that are not are listed at once.
    """

    source: str = Field(
        description="fmcib, ct_fm, genesis, suprem_unet, ...: docs/weights.md; or lighter, state_dict, monai"
    )
    file: Path = Field(description="as published: of torch.save, or .safetensors")
    output: Path = Field(description="FILE.safetensors to write")
    encoder: str | None = Field(
        None, description="for the last three: a name of configs/encoder, or {_target_: ..., ...}"
    )
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, description="z, y, x voxels")
    spacing_mm: PositiveFloat | None = Field(None, description="edge of the voxels; null: as published, or 1")
    hu_window: tuple[float, float] | None = Field(None, description="HU that become 0 and 1; null: as published")
    prefix: str | None = Field(None, description="of the encoder's keys; null: under which most of them are")
    left_out: list[str] = Field([], description="beginnings of keys that are no part of the encoder, such as [head,fc]")
    licence: str | None = Field(None, description="of the weights, to be recorded; null: that of the published code")


def run(command: ImportEncoder) -> None:
    """Import, print what was found."""
    from fmcib_ssl.models import import_encoder  # noqa: PLC0415  # the help is quick
    from fmcib_ssl.training import encoder_spec  # noqa: PLC0415

    spec = None if command.encoder is None else encoder_spec(command.encoder)
    result = import_encoder(
        command.file, command.output, command.source, encoder=spec, patch_size_zyx=command.patch_size,
        spacing_mm=command.spacing_mm, hu_window=command.hu_window, prefix=command.prefix,
        left_out=command.left_out, licence=command.licence,
    )  # fmt: skip
    cut, beside = result.preprocessing, sorted({key.split(".")[0] for key in result.left_out})
    rows = {
        "encoder": f"{command.output}, {result.feature_dim} features",
        "weights": f"all {result.num_keys} keys, under {result.prefix!r}; SHA-256 of the file {result.sha256}",
        "left out": f"{len(result.left_out)} keys, of {', '.join(beside)}" if beside else "nothing",
        "patches": f"{' x '.join(map(str, cut.patch_size_zyx))} voxels (z, y, x) of {cut.spacing_mm:g} mm, "
        f"(HU + {cut.hu_offset:g}) / {cut.hu_scale:g}" + (f", HU clamped to {cut.window_hu}" if cut.window_hu else ""),
        "licence": result.licence or "not known: look where the weights were published, and give licence=",
    }
    print("\n".join(f"{name:<9} {text}" for name, text in rows.items()))


main = partial(
    run_command, ImportEncoder, run,
    errors=(OSError, ValueError, TypeError), interrupted="stopped; nothing was written", level=logging.WARNING,
)  # fmt: skip
