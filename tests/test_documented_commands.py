"""Every command on the pages has an existing verb, existing keys and allowed values; it is run, or marked."""

from __future__ import annotations

import pytest
from documented_commands import REPO, Documented, check, documented_commands, verb_and_arguments

ALL = list(documented_commands())
#: Verbs that take seconds on a small archive, and are run.
CHEAP = {"check-data", "prepare", "embed", "evaluate", "report", "robustness", "split", "phantom", "runs"}


def name(one: Documented) -> str:
    return f"{one.page.stem}: {' '.join(one.words)}"


def test_there_are_many() -> None:
    assert len(ALL) > 100 and len({one.page for one in ALL}) > 15


@pytest.mark.parametrize("one", ALL, ids=name)
def test_a_command_is_right(one: Documented) -> None:
    check(one.words)


@pytest.mark.parametrize("one", [one for one in ALL if one.reason is None], ids=name)
def test_what_is_not_marked_can_be_run(one: Documented) -> None:
    ours = verb_and_arguments(one.words)
    assert one.words[0] == "fmcib-ssl" and ours is not None and ours[0] in CHEAP, (
        f"{one.page.relative_to(REPO)}: say why this is not run, <!-- not run: reason --> before its block"
    )


@pytest.mark.parametrize(
    "words",
    ["fmcib-ssl embd store=x", "fmcib-ssl prepare annotation=x store=y", "make tests", "python benchmarks/none.py"],
)
def test_wrong_commands_are_found(words: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(words.split())
