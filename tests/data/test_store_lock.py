"""Claiming a store that others are at work on."""

from __future__ import annotations

from pathlib import Path

from fmcib_ssl.data.store import StoreSettings, read_settings_file
from fmcib_ssl.data.store_files import claim_store


def test_another_shard_is_just_writing_the_settings(tmp_path: Path) -> None:
    """Shards of a job array start at the same moment; the file is renamed when it is whole."""
    (tmp_path / ".store.json.7958.tmp").write_text('{"sett')
    with claim_store(tmp_path, StoreSettings(), (1, 3)):
        found = read_settings_file(tmp_path)
    assert found is not None and not found["complete"]
