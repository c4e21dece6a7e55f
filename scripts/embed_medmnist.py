"""Turn MedMNIST 3D into features: one Parquet table with the official splits and labels, for scripts/evaluate.py.

`python scripts/embed_medmnist.py --help` shows what can be set; docs/medmnist.md says more.
"""

# Not medmnist.py: Python would then find this file instead of the package.
from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from fmcib_ssl.io import Command, parse_command

if TYPE_CHECKING:
    from fmcib_ssl.evaluation.embedding_sources import FrozenEncoder

#: Other names that keys may be given by.
OTHER_NAMES = {"weights": "checkpoint", "out": "output"}


class EmbedMedMNIST(Command):
    """Turn a data set of MedMNIST 3D into features, one Parquet table with its splits and labels.

    python scripts/embed_medmnist.py dataset=nodulemnist3d checkpoint=runs/x/encoder.safetensors output=features.parquet

    Stopped or killed, the same command goes on where it was. weights= is another name of checkpoint=, out= of output=.
    """

    dataset: Literal["nodulemnist3d", "organmnist3d", "adrenalmnist3d"] = Field(
        description="nodulemnist3d, organmnist3d, adrenalmnist3d"
    )
    checkpoint: str = Field(
        description="exported encoder or .ckpt of a run; random: the one of like=, untrained; raw_voxels: no encoder"
    )
    output: Path = Field(description="FILE.parquet")
    size: Literal["28", "64"] = Field(default="28", description="voxels along an edge: 28, 64")
    root: Path | None = Field(default=None, description="folder of the .npz; null: ~/.medmnist, as the package")
    download: bool = Field(default=False, description="true: fetch the .npz if it is not there; needs medmnist")
    window_hu: tuple[float, float] | None = Field(
        default=None, description="HU of the grey values 0 and 255, such as -1024,400; null: see docs/medmnist.md"
    )
    fit: Literal["resize", "pad"] = Field(
        default="resize", description="to the encoder's patch; pad: keep the voxels, cut the middle or repeat the edge"
    )
    like: Path | None = Field(default=None, description="encoder whose network or patches a baseline takes")
    seed: NonNegativeInt = Field(default=0, description="of the weights of checkpoint=random")
    precision: Literal["32", "bf16", "fp16"] = Field(default="32", description="halves are stored as float16")
    views: Literal["1", "8"] = Field(default="1", description="8: mean over the volume and its mirror images")
    batch_size: PositiveInt = Field(default=32, description="volumes in one forward")
    device: str | None = Field(default=None, description="cpu, cuda, mps; null: a GPU if there is one")
    restart: bool = Field(default=False, description="true: replace a table or parts that another request made")
    trusted_targets: str | None = Field(default=None, description="foreign encoders to build, commas between them")

    @model_validator(mode="after")
    def _fits_together(self) -> EmbedMedMNIST:
        if self.checkpoint == "random" and self.like is None:
            raise ValueError("checkpoint=random: which network? give like=ENCODER.safetensors")
        if self.checkpoint == "raw_voxels" and self.views != "1":
            raise ValueError("views=8: the mean of mirrored voxels says nothing")
        return self


def main(arguments: list[str]) -> None:
    """Embed, print a summary."""
    renamed = [OTHER_NAMES.get(key, key) + sign + value for key, sign, value in (a.partition("=") for a in arguments)]
    command = parse_command(EmbedMedMNIST, renamed)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from fmcib_ssl.evaluation.embedding import embed_to_file  # noqa: PLC0415  # the help is quick
    from fmcib_ssl.evaluation.embedding_sources import Inference  # noqa: PLC0415
    from fmcib_ssl.evaluation.feature_table import FeatureTableError  # noqa: PLC0415
    from fmcib_ssl.evaluation.medmnist_source import DATASETS, download_medmnist  # noqa: PLC0415
    from fmcib_ssl.models.export import EncoderFileError  # noqa: PLC0415

    try:
        source = source_of(command)
        inference = Inference(command.batch_size, command.precision, 8 if command.views == "8" else 1, command.device)
        encoder = encoder_of(command)
        if command.download:
            download_medmnist(source)
        outcome = embed_to_file(encoder, source, command.output, inference, restart=command.restart)
    except (FeatureTableError, EncoderFileError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(f"features  {outcome.output}")
    print(f"volumes   {outcome.num_lesions}, {outcome.num_embedded or 'none'} of them now")
    if outcome.num_rejected:
        print(f"rejected  {outcome.num_rejected}, see {outcome.output.with_suffix('.rejected.csv')}")
    print(
        f"next      python scripts/evaluate.py features={outcome.output} label=label "
        f"task={DATASETS[command.dataset].task} split=split group=null size=null output=results"
    )


def source_of(command: EmbedMedMNIST) -> dict[str, Any]:
    """Which data set, where, and how it becomes patches."""
    from fmcib_ssl.evaluation.medmnist_source import medmnist_source  # noqa: PLC0415

    return medmnist_source(
        command.dataset, int(command.size), command.root, window_hu=command.window_hu, fit=command.fit
    )


def encoder_of(command: EmbedMedMNIST) -> FrozenEncoder:
    """The encoder that is asked for; raw voxels without like= are the volumes as large as they are."""
    from fmcib_ssl.evaluation.embedding_sources import random_encoder, raw_voxels, trained_encoder  # noqa: PLC0415
    from fmcib_ssl.types import Preprocessing  # noqa: PLC0415

    trusted = [name.strip() for name in (command.trusted_targets or "").split(",") if name.strip()]
    if command.checkpoint not in ("random", "raw_voxels"):
        return trained_encoder(command.checkpoint, trusted_targets=trusted)
    if command.like is None:
        size = int(command.size)
        return raw_voxels(Preprocessing((size, size, size)))
    like = trained_encoder(command.like, trusted_targets=trusted)
    if command.checkpoint == "raw_voxels":
        return raw_voxels(like.preprocessing)
    return random_encoder(like.about["encoder"], like.preprocessing, command.seed, trusted_targets=trusted)


if __name__ == "__main__":
    main(sys.argv[1:])
