"""Completion in the shell, `eval "$(fmcib-ssl -sc install=bash)"`: Hydra's, with the verbs and their keys before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import escape, glob

from fmcib_ssl.command import VERBS, main_of


def main(arguments: Sequence[str]) -> None:
    """Print the shell's function for `install=SHELL`; for `query=SHELL` what may follow the line in `COMP_LINE`."""
    line = os.environ.get("COMP_LINE", "")
    program, *words = [*line.split(), *[""] * line.endswith(" ")] or [""]
    if len(words) == 1:
        print(*VERBS, sep="\n")
    elif words and words[0] not in ("train", "demo"):
        print(*_choices(words[0], words[-1]), sep="\n")
    else:
        from fmcib_ssl.command import train  # noqa: PLC0415  (Hydra, which the other verbs do without)

        os.environ["COMP_LINE"] = " ".join([program, *words[1:]])  # Hydra knows no verbs
        train.main(["-sc", *arguments])


def _choices(verb: str, word: str) -> list[str]:
    """A verb's keys; of a key that is typed its values, as far as they are known, or files."""
    if verb not in VERBS:
        return []
    keys = main_of(verb).args[0].model_json_schema()["properties"]
    key, equals, value = word.partition("=")
    if not equals or key not in keys:
        return [f"{name}=" for name in keys]
    kinds = [keys[key], *keys[key].get("anyOf", ())]
    values = [str(choice) for kind in kinds for choice in kind.get("enum", ())]
    if any(kind.get("type") == "boolean" for kind in kinds):
        values += ["true", "false"]
    if any(kind.get("format") == "path" for kind in kinds):
        values += glob(f"{escape(value)}*")  # noqa: PTH207  (the beginning of a name)
    return [f"{key}={choice}" for choice in values]
