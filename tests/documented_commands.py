"""The commands on the pages, and whether they are right.

A block of commands, fenced or indented, is run by `tests/integration/test_documented_commands.py` in a folder with a
small archive, unless the page says why not, in a comment before the block or, for all its blocks, under its title:
`<!-- not run: reason -->`. Every command is parsed: verb, keys, values, options and files have to exist.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fmcib_ssl.command import VERBS
from fmcib_ssl.io import config_dir, parse_command
from fmcib_ssl.training import check_command_line

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")])
#: What a block's line may begin with to be a command; others' options are not ours to check.
_OTHERS = (
    "apptainer", "cd", "ch-run", "docker", "export", "git", "mkdocs", "pip", "sbatch", "scancel", "scontrol",
    "squeue", "srun", "tail", "torchrun", "wandb",
)  # fmt: skip
_OURS = ("fmcib-ssl", "make", "python", "scripts/docker/run.sh")
_REASON = re.compile(r"<!-- not run: (.+?) -->")
_BLOCK = re.compile(r"^ *```(\w*)\n(?P<fenced>.*?)^ *```$|(?P<indented>(?:^ {4,}\S.*\n)+)", re.MULTILINE | re.DOTALL)


class Documented(NamedTuple):
    """A command, where it stands, and why it is not run; None: it is."""

    page: Path
    words: list[str]
    reason: str | None


def documented_commands() -> Iterator[Documented]:
    """All commands of all pages, in their order."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        whole_page = _REASON.search(text.partition("\n## ")[0].partition("```")[0])
        for block in _BLOCK.finditer(text):
            own = re.search(_REASON.pattern + r"\s*\Z", text[: block.start()])
            reason = own or whole_page
            for line in re.sub(r"\\\n\s*", "", block["fenced"] or block["indented"]).splitlines():
                try:
                    words = shlex.split(line, comments=True)
                except ValueError:  # prose or code
                    continue
                while words and re.match(r"\w+=", words[0]):
                    words = (
                        [words[0].partition("=")[2].removeprefix("$("), *words[1:]] if "$(" in words[0] else words[1:]
                    )
                if words and words[0] in (*_OTHERS, *_OURS):
                    yield Documented(page, words, reason and reason[1])


def verb_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """What of a command is ours: the verb and its words, wherever it stands behind a launcher; None: nothing is."""
    for place, word in enumerate(words):
        rest = [one if "(" in one else one.rstrip(")") for one in words[place + 1 :] if one != "..."]
        if word == "fmcib-ssl" and rest:
            return rest[0], rest[1:]
        name = Path(word).stem
        if word == "scripts/docker/run.sh":
            ours = rest[rest.index("--") + 1 :] if "--" in rest else rest
            return (ours[0], ours[1:]) if "--entrypoint" not in rest else None
        if word == "train.py" or word.startswith("scripts/slurm/pretrain"):
            return "train", rest
        if word == "scripts/slurm/prepare.sbatch":
            return "prepare", [*rest, "shard=1/2"] if "merge=true" not in rest else rest
        if word.startswith("scripts/") and word.endswith(".py"):
            return name.replace("_", "-"), rest
    return None


def check(words: list[str]) -> None:
    """Parse a command without running it.

    Raises:
        SystemExit, ValueError, AssertionError: no such verb, key, value, target or file.
    """
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    for word in words:
        if re.match(r"(scripts|benchmarks)/\S+\.\w+$", word):
            assert (REPO / word).is_file(), word
    ours = verb_and_arguments(words)
    if ours is None:
        return
    verb, arguments = ours
    arguments = [word.replace("$SLURM_ARRAY_TASK_ID", "1") for word in arguments]
    assert verb in VERBS or verb.startswith("--"), f"no verb {verb!r}"
    if verb == "train":
        if "--config-dir" not in arguments:  # with one's own parts, as test_develop_page trains
            lesions = ["data.store=x"] if "+experiment=..." in arguments else []
            arguments = [word.replace("=...", "=ct_ntxent_mined") for word in arguments]
            check_command_line([*arguments, *lesions], config_dir())
    elif verb in VERBS and "--help" not in arguments:
        main = importlib.import_module(f"fmcib_ssl.command.{verb.replace('-', '_')}").main
        if isinstance(main, partial):  # of `run_command`
            kind, other = main.args[0], main.keywords.get("other_names") or {}
            pairs = [(other.get(key, key), value) for key, _, value in (word.partition("=") for word in arguments)]
            if "..." in words:
                assert {key for key, _ in pairs} <= set(kind.model_fields), words
            else:
                parse_command(kind, [f"{key}={value}" for key, value in pairs])
