"""Turn lesions into features: one Parquet table with every column of the lesions' table.

`fmcib-ssl embed --help` shows what can be set; docs/embed.md says more.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from fmcib_ssl.command import run_command, weights_file
from fmcib_ssl.io import Command, num_cores

if TYPE_CHECKING:
    from fmcib_ssl.evaluation import FrozenEncoder, Inference, Outcome

#: The number of this process, of all, and of this one on its machine, as torchrun and srun say it.
PROCESS_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
ENCODER = "run folder, exported encoder or .ckpt; of like=: random, hu_statistics, raw_voxels, radiomics"
WITHOUT_WEIGHTS = ("random", "hu_statistics", "raw_voxels", "radiomics")


class Embed(Command):
    """Turn lesions into features, one Parquet table with every column of the lesions' table.

    fmcib-ssl embed checkpoint=runs/x store=/data/store output=features.parquet

    Stopped or killed, the same command resumes. weights= is another name of checkpoint=, out= of output=.
    """

    checkpoint: str = Field(description=ENCODER)
    output: Path = Field(description="FILE.parquet")
    store: Path | None = Field(None, description="folder of a store; or give annotations=")
    annotations: Path | None = Field(None, description="CSV of lesions; a store is prepared for it first")
    stores: Path = Field(Path("data/stores"), description="folder for the stores of tables")
    image_root: Path | None = Field(None, description="folder of relative paths; null: the table's own")
    path_prefix: str | None = Field(None, description="beginning of the paths that image_root replaces")
    coordinates: Literal["lps", "ras", "voxel"] = Field("lps", description="frame of the points")
    on_bad_row: Literal["skip", "refuse"] = Field("skip", description="rows of annotations that cannot be used")
    select: dict[str, Any] | None = Field(None, description="lesions to embed, such as '{split: [val, test]}'")
    like: Path | None = Field(None, description="run or encoder whose network or patches a baseline takes")
    seed: NonNegativeInt = Field(0, description="of the weights of checkpoint=random")
    precision: Literal["32", "bf16", "fp16"] = Field("32", description="bf16 and fp16 are stored as float16")
    views: Literal["1", "8"] = Field("1", description="8: mean over the patch and its mirror images")
    batch_size: PositiveInt = Field(32, description="patches in one forward")
    device: str | None = Field(None, description="cpu, cuda, mps; null: a GPU if there is one")
    num_workers: NonNegativeInt | None = Field(None, description="that read patches; null: 0 on the CPU, else up to 4")
    shard: str | None = Field(None, pattern=r"^[1-9]\d*/\d+$", description="part of the lesions, 1/8 to 8/8")
    restart: bool = Field(False, description="true: replace a table or parts that another request made")
    trusted_targets: list[str] = Field([], description="foreign encoders to build, comma-separated")

    @model_validator(mode="after")
    def _fits_together(self) -> Embed:
        if (self.store is None) == (self.annotations is None):
            raise ValueError("give store=DIR or annotations=FILE.csv, one of them")
        if self.checkpoint in WITHOUT_WEIGHTS and self.like is None:
            raise ValueError(f"checkpoint={self.checkpoint}: whose network and patches? give like=ENCODER.safetensors")
        number, _, total = (self.shard or "1/1").partition("/")
        if int(number) > int(total):
            raise ValueError(f"shard={self.shard}: there are {total} parts")
        if self.checkpoint in WITHOUT_WEIGHTS[1:] and self.views != "1":
            raise ValueError(f"views=8 does not apply to checkpoint={self.checkpoint}")
        return self


def run(command: Embed) -> None:
    """Embed, print a summary."""
    from fmcib_ssl.evaluation import embed_to_file  # noqa: PLC0415  # the help is quick

    share, local = process(command)
    encoder, inference = encoder_of(command), inference_of(command, local)
    outcome = embed_to_file(
        encoder, source_of(command), command.output, inference,
        share=share, restart=command.restart, progress=local == 0,
    )  # fmt: skip
    report(outcome)


def process(command: Embed) -> tuple[tuple[int, int], int]:
    """Number of this process and of all, and its number on this machine."""
    if command.shard:
        number, total = map(int, command.shard.split("/"))
        return (number - 1, total), 0
    for names in PROCESS_VARIABLES:
        if all(name in os.environ for name in names):
            rank, total, local = (int(os.environ[name]) for name in names)
            return (rank, total), local
    return (0, 1), 0


def source_of(command: Embed) -> dict[str, Any]:
    """Where the lesions are; absolute, so that the table can be understood from another folder."""
    keys = ("annotations", "stores", "image_root", "path_prefix", "coordinates", "on_bad_row")
    values: dict[str, Any] = {"kind": "scans", **{key: getattr(command, key) for key in keys}}
    if command.store is not None:
        values = {"kind": "store", "path": command.store}
    source = {key: str(value.absolute()) if isinstance(value, Path) else value for key, value in values.items()}
    return source | ({"select": command.select} if command.select else {})


def encoder_of(command: Embed) -> FrozenEncoder:
    """The encoder that is asked for, of a file or, for a folder, of the run in it."""
    from fmcib_ssl.evaluation import radiomics_encoder, rebuilt_encoder, trained_encoder  # noqa: PLC0415

    is_trained = command.checkpoint not in WITHOUT_WEIGHTS
    file = Path(command.checkpoint) if is_trained else command.like
    assert file is not None
    encoder = trained_encoder(weights_file(file), trusted_targets=command.trusted_targets)
    if is_trained:
        return encoder
    if command.checkpoint == "radiomics":
        return radiomics_encoder(encoder.preprocessing)
    about = {
        "kind": "random_weights" if command.checkpoint == "random" else command.checkpoint,
        "preprocessing": encoder.preprocessing.to_dict(),
        "encoder": encoder.about["encoder"],
        "seed": command.seed,
    }
    return rebuilt_encoder(about, command.trusted_targets)


def inference_of(command: Embed, local: int) -> Inference:
    """How patches go through the encoder on this machine."""
    import torch  # noqa: PLC0415

    from fmcib_ssl.evaluation import Inference  # noqa: PLC0415

    device = command.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{local % max(1, torch.cuda.device_count())}"
    workers = command.num_workers
    if workers is None:
        workers = 0 if device == "cpu" else min(4, num_cores())
    return Inference(command.batch_size, command.precision, 8 if command.views == "8" else 1, device, workers)


def report(outcome: Outcome) -> None:
    """Say what was done."""
    from fmcib_ssl.evaluation import rejected_file  # noqa: PLC0415

    if outcome.num_missing:
        print(f"this share is done; {outcome.num_missing} of {outcome.num_lesions} lesions are with other processes,")
        print(f"the last of which writes {outcome.output}")
        return
    rate = outcome.num_embedded / max(outcome.seconds, 1e-9)
    now = f"{outcome.num_embedded} of them now, {rate:.1f} a second" if outcome.num_embedded else "nothing to do"
    print(f"features  {outcome.output}\nlesions   {outcome.num_lesions}, {now}")
    if outcome.num_rejected:
        print(f"rejected  {outcome.num_rejected}, see {rejected_file(outcome.output)}")


main = partial(
    run_command, Embed, run, errors=(OSError, ValueError, ImportError),
    other_names={"weights": "checkpoint", "out": "output"}, interrupted="stopped; the same command resumes from here",
)  # fmt: skip
