"""Take a step that was not finite again, in float32, and say which layer gave the first value that is not.

`python scripts/replay.py --help` shows what can be set; docs/guards.md says more.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pydantic import Field, NonNegativeInt

from fmcib_ssl.io import Command, parse_command


class Replay(Command):
    """Take a step that was left out of a run again, and say where its first NaN or infinity comes from.

    python scripts/replay.py run=runs/pretrain/2026-01-01_12-00-00

    Nothing is trained and nothing is written.
    """

    run: Path = Field(description="folder of the run, with config.yaml and faults/")
    step: NonNegativeInt | None = Field(default=None, description="which of faults/step-N; null: the last one")
    device: str = Field(default="cpu", description="cpu, cuda, mps")
    trusted_modules: str | None = Field(
        default=None, description="your own packages that the run is built from, commas between them"
    )


def main(arguments: list[str]) -> None:
    """Replay, print what was found."""
    command = parse_command(Replay, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    from fmcib_ssl.replay import replay  # noqa: PLC0415  # the help is quick
    from fmcib_ssl.training.settings import ConfigError  # noqa: PLC0415

    trusted = [name.strip() for name in (command.trusted_modules or "").strip("[]").split(",") if name.strip()]
    try:
        for line in replay(command.run, command.step, device=command.device, trusted_modules=trusted):
            print(line)
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
