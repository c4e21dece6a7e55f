"""Make an archive of synthetic chest CTs with lesions of two classes: `python scripts/phantom.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from fmcib_ssl.io import Command, num_cores, parse_command


class Phantom(Command):
    """Make an archive of synthetic chest CTs, written as real files, with a table of their lesions.

    python scripts/phantom.py folder=data/phantom num_scans=140

    If interrupted, the same command resumes.
    """

    folder: Path = Field(description="where scans/ and annotations.csv go; made if missing")
    num_scans: PositiveInt = Field(default=140, description="one scan a patient, each with one to three lesions")
    seed: NonNegativeInt = Field(default=0, description="of everything that is drawn")
    num_workers: PositiveInt = Field(default=num_cores(), description="processes")


def main(arguments: list[str]) -> None:
    """Make the archive and name its table."""
    command = parse_command(Phantom, arguments)
    from fmcib_ssl.data import make_archive  # noqa: PLC0415  (--help needs no SimpleITK)

    try:
        table = make_archive(
            command.folder, command.num_scans, seed=command.seed, num_workers=command.num_workers, progress=True
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"lesions   {table}")


if __name__ == "__main__":
    main(sys.argv[1:])
