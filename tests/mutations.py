"""Damage to files, a function of a seed: bytes, nested values, and pickles that would run something."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: What stands in a file instead of what should.
WRONG_VALUES: list[Any] = [
    None, "", "no", -1, 0, 1e308, float("nan"), float("inf"), 2**70, -(2**70), True, [], {}, [[[]]], "x" * 100_000,
    {"_target_": "os.system"}, ["../../etc/passwd"], "../../../etc/passwd", "\x00", "\ud800", "${oc.env:HOME}", 10**400,
]  # fmt: skip


def seeds(number: int) -> list[Any]:
    """Of damage: one of each of the eight kinds always, more of them where there is time."""
    return [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 8 else []) for seed in range(number)]


def damaged(content: bytes, seed: int) -> bytes:
    """Some of: cut off, bits turned over, a stretch lost, doubled, zeroed or made noise, lengths made huge."""
    draw = random.Random(seed)
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3, 30))):
        kind = seed % 8 if seed < 16 else draw.randrange(8)
        place = draw.randrange(max(1, len(data)))
        length = draw.choice((1, 4, 8, 64, 1024))
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == 5:
            data[place : place + length] = draw.randbytes(len(data[place : place + length]))
        elif kind == 6:
            start = draw.choice((0, 4, 8, place))
            data[start : start + 8] = b"\xff" * 7 + b"\x7f"
        elif kind == 7 and data:
            data[draw.randrange(min(len(data), 64))] ^= 0xFF
    return bytes(data)


def changed(values: Any, seed: int) -> Any:
    """Nested values with one or a few of them lost, renamed, or replaced by what should not be there."""
    draw = random.Random(seed)
    values = copy.deepcopy(values)
    for _ in range(draw.choice((1, 1, 2, 5))):
        places = list(_places(values))
        if not places:
            return draw.choice(WRONG_VALUES)
        holder, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(WRONG_VALUES[(seed + draw.randrange(3)) % len(WRONG_VALUES)])
    return values


def _places(values: Any) -> Any:
    if isinstance(values, dict):
        for key in list(values):
            yield values, key
            yield from _places(values[key])
    elif isinstance(values, list):
        for index in range(len(values)):
            yield values, index
            yield from _places(values[index])


class _Runs:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def harmful_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles, and torch files round them, that make a file if anything unpickles them."""
    ways = {
        "system": _Runs(os.system, f"touch {canary}"),
        "eval": _Runs(eval, f"open({str(canary)!r}, 'w')"),
        "path": _Runs(Path.touch, canary),
        "getattr": _Runs(getattr, _Runs(Path, str(canary)), "touch"),
    }
    found: dict[str, bytes] = {}
    for name, way in ways.items():
        for protocol in (0, 2, 4):
            found[f"{name}-{protocol}"] = pickle.dumps({"state_dict": {}, "fmcib_ssl": way}, protocol)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", found[f"{name}-2"])
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
        found[f"{name}-torch"] = buffer.getvalue()
    return found


MOST_MEMORY = 2_000_000_000


def peak_memory() -> int:
    """The most bytes that this process has held."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


@contextmanager
def only(*refusals: type[Exception]) -> Iterator[None]:
    """A block that does what it should, or refuses in our words, and without much memory."""
    # Else a test before this one may have held so much that nothing here would be seen.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    try:
        yield
    except refusals as error:
        message = str(error)
        assert len(message) > 20 and "Traceback" not in message, message
    assert peak_memory() - before < MOST_MEMORY
