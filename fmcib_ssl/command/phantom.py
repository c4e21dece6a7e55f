"""Make an archive of synthetic chest CTs with lesions of two classes: `fmcib-ssl phantom --help`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command, num_cores


class Phantom(Command):
    """Make an archive of synthetic chest CTs, written as real files, with a table of their lesions.

    fmcib-ssl phantom folder=data/phantom num_scans=140

    If interrupted, the same command resumes.
    """

    folder: Path = Field(description="where scans/ and annotations.csv go; made if missing")
    num_scans: PositiveInt = Field(default=140, description="one scan a patient, each with one to three lesions")
    seed: NonNegativeInt = Field(default=0, description="of everything that is drawn")
    num_workers: PositiveInt = Field(default=num_cores(), description="processes")


def run(command: Phantom) -> None:
    """Make the archive and name its table."""
    from fmcib_ssl.data import make_archive  # noqa: PLC0415  (--help needs no SimpleITK)

    table = make_archive(
        command.folder, command.num_scans, seed=command.seed, num_workers=command.num_workers, progress=True
    )
    print(f"lesions   {table}")


main = partial(run_command, Phantom, run)
