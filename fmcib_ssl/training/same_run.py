"""What makes two runs the same: the settings that may not change, and a digest of them.

Every process asks before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fmcib_ssl.io import digest_of
from fmcib_ssl.training.run_folder import ANEW, STATE_FILE, RunFolderError, saved_settings

#: Where data lie on a machine, and how they are read.
DATA_ACCESS = (
    "data.store",
    "data.annotations",
    "data.image_root",
    "data.path_prefix",
    "data.cache_scans",
    "data.phantom.folder",
)
#: Settings that a run may be resumed with changed: where and how fast it runs, where its data lie, what is watched.
FREE_SETTINGS = (
    "name",
    "contact_sheet_rows",
    "hardware.",
    "logger",
    "callbacks",
    "paths.",
    "trainer.log_every_n_steps",
    "trainer.enable_",
    "trainer.profiler",
    *DATA_ACCESS,
)
#: Settings that earlier versions had not, with what they did: a run of theirs is the same run.
EARLIER = {"data.padding": "constant"}
#: These may only grow.
LENGTHS = ("trainer.max_epochs", "trainer.max_steps")
#: Files and folders: the same however they are typed.
PLACES = ("data.store", "data.annotations", "finetune.weights")

_NUM_DIGITS = 8
_MOST_SHOWN = 3


def settings_digest(settings: Mapping[str, Any], keyed: Collection[str] = ()) -> str:
    """Eight digits that follow from what may not change in a run, and from the place of its data.

    Args:
        settings: plain values; relative paths start from the current folder.
        keyed: settings that count besides, such as lengths that a sweep compares.
    """
    flat = flat_settings(settings)
    counted = (key in (*PLACES, *keyed) or not (_is_free(key) or key in LENGTHS) for key in sorted(flat))
    fixed = {key: _plain(flat[key]) for key, counts in zip(sorted(flat), counted, strict=True) if counts}
    return digest_of(fixed)[:_NUM_DIGITS]


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Compare the settings that a folder was trained with to those of now.

    Args:
        before: as in the folder's `config.yaml`.
        now: plain values.
        folder: for the message.

    Returns:
        What differs and may, in words.

    Raises:
        RunFolderError: naming what differs and may not.
    """
    allowed, refused = _differences(before, now)
    if refused:
        raise RunFolderError(
            f"{folder} holds a run with other settings:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nTo resume it give the settings it had; {ANEW}. "
            "Only hardware, logger, callbacks, paths and a longer training may differ"
        )
    return allowed


def unlike_the_last(folder: Path, now: Mapping[str, Any]) -> str | None:
    """What keeps a run from being the last one beside it, if that is not finished: a run of days would start over.

    Args:
        folder: of the run, which is about to begin.
        now: its settings.
    """
    others = [file for file in folder.parent.glob(f"*/{STATE_FILE}") if file.parent != folder]
    last = max(others, key=lambda file: file.stat().st_mtime, default=None)
    try:
        if last is None or json.loads(last.read_text()).get("finished") is not None:
            return None
        _, refused = _differences(saved_settings(last.parent) or now, now)
    except (ValueError, AttributeError, OSError):  # whoever resumes that one is told
        return None
    more = [f"and {len(refused) - _MOST_SHOWN} more"] if len(refused) > _MOST_SHOWN else []
    differences = "; ".join([*refused[:_MOST_SHOWN], *more])
    return f"{last.parent} is not finished; this is another run: {differences}" if refused else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The settings that differ: those that may, and those that may not."""
    old, new = flat_settings(before), flat_settings(now)
    allowed: list[str] = []
    refused: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key, "not set"), new.get(key, "not set")
        if was != is_now:
            free = _is_free(key) or (key in LENGTHS and _at_least(is_now, was))
            (allowed if free else refused).append(f"{key}: {was} before, {is_now} now")
    return allowed, refused


def _is_free(key: str) -> bool:
    return key.startswith(FREE_SETTINGS)


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, without `run`, which says which folder and not what is in it."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flat_settings(value, f"{name}."))
        elif name != "run" and (name, value) not in EARLIER.items():
            flat[name] = str(Path(value).resolve()) if name in PLACES and isinstance(value, str) else value
    return flat


def _plain(value: Any) -> Any:
    """1.0 as 1, which it is equal to."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at_least(asked: object, before: object) -> bool:
    """Whether one length of training is no shorter than another; none at all is the longest."""
    endless = (None, -1)
    if asked in endless:
        return True
    return isinstance(asked, int) and isinstance(before, int) and before not in endless and asked >= before
