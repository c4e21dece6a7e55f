"""Commands of the form `python scripts/NAME.py key=value ...`, checked before anything heavy is imported."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fmcib_ssl.safety import no_world_write


class Command(BaseModel):
    """What a command takes: a field for each key, with its type, default and `Field(description=...)`.

    The docstring of a subclass is the beginning of its help.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


Settings = TypeVar("Settings", bound=Command)


def parse_command(command: type[Settings], arguments: Sequence[str]) -> Settings:
    """The settings that a command line gives; for `--help` the help, and the end of the program.

    A value is taken as text and turned into the type of its field; `null` is None.

    Args:
        command: the class that says what is allowed.
        arguments: the command line, without the program.

    Raises:
        SystemExit: with 0 after the help; with 2, and a message on stderr, for an unknown key or a wrong value.
    """
    no_world_write()
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # on import it says how many threads it takes
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(_help(command))
        raise SystemExit(0)
    values: dict[str, str | None] = {}
    problems = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            problems.append(f"{argument!r} is not of the form key=value")
        elif key not in command.model_fields:
            close = difflib.get_close_matches(key, command.model_fields, 1)
            problems.append(f"there is no {key!r}" + (f": do you mean {close[0]!r}?" if close else ""))
        elif key in values:
            problems.append(f"{key!r} is given twice")
        else:
            values[key] = None if value == "null" else value
    if not problems:
        try:
            return command.model_validate(values)
        except ValidationError as error:
            for found in error.errors():
                key = ".".join(map(str, found["loc"]))
                what = "is missing" if found["type"] == "missing" else f"is {found['input']!r}: {found['msg']}"
                problems.append(f"{key} {what}" if key else found["msg"])
    print("\n".join([*problems, "--help shows what can be set"]), file=sys.stderr)
    raise SystemExit(2)


def _help(command: type[Command]) -> str:
    lines = [(command.__doc__ or "").strip(), ""]
    width = max(map(len, command.model_fields))
    for key, field in command.model_fields.items():
        default = "" if field.is_required() else f" [{'null' if field.default is None else field.default}]"
        lines.append(f"  {key:<{width}}  {field.description or ''}{default}")
    return "\n".join(lines)
