"""Turn lesions into features: one Parquet table with every column of the lesions' table.

`python scripts/embed.py --help` shows what can be set; docs/embed.md says more.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from fmcib_ssl.io import Command, parse_command

if TYPE_CHECKING:
    from fmcib_ssl.evaluation.embedding_encoders import FrozenEncoder
    from fmcib_ssl.evaluation.embedding_inference import Inference
    from fmcib_ssl.evaluation.embedding_parts import Outcome, Share

#: Other names that keys may be given by.
OTHER_NAMES = {"weights": "checkpoint", "out": "output"}
#: The number of this process, of all, and of this one on its machine, as torchrun and srun say it.
PROCESS_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class Embed(Command):
    """Turn lesions into features, one Parquet table with every column of the lesions' table.

    python scripts/embed.py checkpoint=runs/x store=/data/store output=features.parquet

    Stopped or killed, the same command goes on where it was. weights= is another name of checkpoint=, out= of output=.
    """

    checkpoint: str = Field(
        description="run folder, exported encoder or .ckpt; random: the one of like=, untrained; raw_voxels: no encoder"
    )
    output: Path = Field(description="FILE.parquet")
    store: Path | None = Field(default=None, description="folder of a store; or give annotations=")
    annotations: Path | None = Field(default=None, description="CSV of lesions, for which a store is prepared first")
    stores: Path = Field(default=Path("data/stores"), description="folder in which annotations= gets its own store")
    image_root: Path | None = Field(default=None, description="folder of relative paths; null: the table's own")
    path_prefix: str | None = Field(default=None, description="beginning of the paths that image_root replaces")
    coordinates: Literal["lps", "ras", "voxel"] = Field(default="lps", description="frame of the points")
    on_bad_row: Literal["skip", "refuse"] = Field(default="skip", description="rows of annotations that cannot be used")
    select: dict[str, Any] | None = Field(default=None, description="lesions to embed, such as '{split: [val, test]}'")
    like: Path | None = Field(default=None, description="run or encoder whose network or patches a baseline takes")
    seed: NonNegativeInt = Field(default=0, description="of the weights of checkpoint=random")
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        default=None, description="z,y,x, for raw_voxels without like=; else the encoder's"
    )
    padding: Literal["constant", "edge"] = Field(
        default="constant", description="outside a scan, where patch_size says the patch: air, or its nearest voxel"
    )
    precision: Literal["32", "bf16", "fp16"] = Field(default="32", description="halves are stored as float16")
    views: Literal["1", "8"] = Field(default="1", description="8: mean over the patch and its mirror images")
    batch_size: PositiveInt = Field(default=32, description="patches in one forward")
    device: str | None = Field(default=None, description="cpu, cuda, mps; null: a GPU if there is one")
    devices: PositiveInt = Field(default=1, description="processes to start on this machine, a GPU each")
    num_workers: NonNegativeInt | None = Field(
        default=None, description="processes that read patches; null: 0 for a store on the CPU, else up to 4"
    )
    shard: str | None = Field(default=None, pattern=r"^\d+/\d+$", description="part of the lesions, such as 1/8")
    restart: bool = Field(default=False, description="true: replace a table or parts that another request made")
    trusted_targets: str | None = Field(default=None, description="foreign encoders to build, commas between them")

    @model_validator(mode="after")
    def _fits_together(self) -> Embed:
        if (self.store is None) == (self.annotations is None):
            raise ValueError("give store=DIR or annotations=FILE.csv, one of them")
        if self.checkpoint == "random" and self.like is None:
            raise ValueError("checkpoint=random: which network? give like=ENCODER.safetensors")
        if self.checkpoint == "raw_voxels" and (self.like is None) == (self.patch_size is None):
            raise ValueError("checkpoint=raw_voxels: give like=ENCODER.safetensors or patch_size=z,y,x, one of them")
        if self.checkpoint != "raw_voxels" and self.patch_size is not None:
            raise ValueError("patch_size is for checkpoint=raw_voxels; an encoder says itself which patches it takes")
        if self.patch_size is None and self.padding != "constant":
            raise ValueError("padding is for patch_size=; an encoder says itself what stands outside a scan")
        if self.checkpoint == "raw_voxels" and self.views != "1":
            raise ValueError("views=8: the mean of mirrored voxels says nothing")
        return self


def main(arguments: list[str]) -> None:
    """Embed, print a summary."""
    arguments = [_renamed(argument) for argument in arguments]
    command = parse_command(Embed, arguments)
    if command.devices > 1 and command.shard is None and "RANK" not in os.environ:
        sys.exit(start_processes(command.devices, arguments))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from fmcib_ssl.data.store import StoreError  # noqa: PLC0415  # the help is quick
    from fmcib_ssl.data.tables import AnnotationsError  # noqa: PLC0415
    from fmcib_ssl.data.workers import WorkerDiedError  # noqa: PLC0415
    from fmcib_ssl.evaluation.embedding_parts import embed_to_file  # noqa: PLC0415
    from fmcib_ssl.evaluation.feature_table import FeatureTableError  # noqa: PLC0415
    from fmcib_ssl.models.export import EncoderFileError  # noqa: PLC0415
    from fmcib_ssl.training.run_folder import RunFolderError  # noqa: PLC0415

    try:
        share, local = process(command)
        outcome = embed_to_file(
            encoder_of(command),
            source_of(command),
            command.output,
            inference_of(command, local),
            share=share,
            restart=command.restart,
            progress=local == 0,
        )
    except (
        AnnotationsError, EncoderFileError, FeatureTableError, FileNotFoundError, RunFolderError, StoreError,
        WorkerDiedError,
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    report(outcome)


def start_processes(number: int, arguments: list[str]) -> int:
    """Run this command in several processes; none waits for another, so what one has done stays if another fails."""
    from fmcib_ssl.io import num_cores  # noqa: PLC0415

    threads = str(max(1, num_cores() // number))
    children = []
    for rank in range(number):
        place = {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **place}
        children.append(subprocess.Popen([sys.executable, __file__, *arguments], env=environment))
    while True:
        try:
            return max(abs(child.wait()) for child in children)
        except KeyboardInterrupt:  # the terminal has told the children too
            continue


def process(command: Embed) -> tuple[Share, int]:
    """Which share of the work this process has, and its number on this machine."""
    from fmcib_ssl.evaluation.embedding_parts import Share  # noqa: PLC0415

    if command.shard:
        number, total = map(int, command.shard.split("/"))
        return Share(number - 1, total), 0
    for names in PROCESS_VARIABLES:
        if all(name in os.environ for name in names):
            rank, total, local = (int(os.environ[name]) for name in names)
            return Share(rank, total), local
    return Share(), 0


def source_of(command: Embed) -> dict[str, Any]:
    """Where the lesions are; absolute, so that the table can be understood from another folder."""
    select = {"select": command.select} if command.select else {}
    if command.store is not None:
        return {"kind": "store", "path": str(command.store.absolute()), **select}
    assert command.annotations is not None
    return {
        "kind": "scans",
        "annotations": str(command.annotations.absolute()),
        "stores": str(command.stores.absolute()),
        "image_root": None if command.image_root is None else str(command.image_root.absolute()),
        "path_prefix": command.path_prefix,
        "coordinates": command.coordinates,
        "on_bad_row": command.on_bad_row,
        **select,
    }


def encoder_of(command: Embed) -> FrozenEncoder:
    """The encoder that is asked for."""
    from fmcib_ssl.evaluation.embedding_encoders import random_encoder, raw_voxels, trained_encoder  # noqa: PLC0415
    from fmcib_ssl.evaluation.embedding_sources import open_patches  # noqa: PLC0415
    from fmcib_ssl.types import Preprocessing  # noqa: PLC0415

    trusted = [name.strip() for name in (command.trusted_targets or "").split(",") if name.strip()]
    if command.checkpoint not in ("random", "raw_voxels"):
        return trained_encoder(_weights(Path(command.checkpoint)), trusted_targets=trusted)
    if command.like is None:
        assert command.patch_size is not None
        spacing_mm = 1.0 if command.store is None else open_patches(source_of(command))[2].spacing_mm
        return raw_voxels(Preprocessing(command.patch_size, spacing_mm, padding=command.padding))
    like = trained_encoder(_weights(command.like), trusted_targets=trusted)
    if command.checkpoint == "raw_voxels":
        return raw_voxels(like.preprocessing)
    return random_encoder(like.about["encoder"], like.preprocessing, command.seed, trusted_targets=trusted)


def _weights(path: Path) -> Path:
    """The file of weights that a path means: itself, or that of a run folder."""
    if not path.is_dir():
        return path
    from fmcib_ssl.training.checkpoints import weights_of_run  # noqa: PLC0415  (Lightning, which a file does without)

    return weights_of_run(path)


def inference_of(command: Embed, local: int) -> Inference:
    """How patches go through the encoder on this machine."""
    import torch  # noqa: PLC0415

    from fmcib_ssl.evaluation.embedding_inference import Inference  # noqa: PLC0415
    from fmcib_ssl.io import num_cores  # noqa: PLC0415

    device = command.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{local % max(1, torch.cuda.device_count())}"
    workers = command.num_workers
    if workers is None:
        workers = 0 if device == "cpu" and command.store is not None else min(4, num_cores())
    return Inference(command.batch_size, command.precision, 8 if command.views == "8" else 1, device, workers)


def report(outcome: Outcome) -> None:
    """Say what was done."""
    from fmcib_ssl.evaluation.embedding_parts import rejected_file  # noqa: PLC0415

    if outcome.num_missing:
        print(f"this share is done; {outcome.num_missing} of {outcome.num_lesions} lesions are with other processes,")
        print(f"the last of which writes {outcome.output}")
        return
    print(f"features  {outcome.output}")
    if outcome.num_embedded:
        rate = outcome.num_embedded / max(outcome.seconds, 1e-9)
        print(f"lesions   {outcome.num_lesions}, {outcome.num_embedded} of them now, {rate:.1f} a second")
    else:
        print(f"lesions   {outcome.num_lesions}, nothing was left to do")
    if outcome.num_rejected:
        print(f"rejected  {outcome.num_rejected}, see {rejected_file(outcome.output)}")


def _renamed(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return f"{OTHER_NAMES.get(key, key)}{equals}{value}"


if __name__ == "__main__":
    main(sys.argv[1:])
