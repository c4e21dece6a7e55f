"""Look at every scan of a table once, its header or all of it: on all cores, and not again if it has not changed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from fmcib_ssl.data.geometry import ScanGeometry
from fmcib_ssl.data.jobs import run_jobs
from fmcib_ssl.data.prepare_scan import source_listing
from fmcib_ssl.data.scans import HuSummary, ScanSource, read_header, read_scan
from fmcib_ssl.io import num_cores
from fmcib_ssl.types import ScanError

Check = Literal["headers", "full"]

#: Of what is refused: results kept under another number are not used.
_RULES = 1
#: So long this process works alone, seconds: starting others takes as long.
_ALONE_S = 2.0
#: Scans that a process takes at a time.
_CHUNK_SCANS = {"headers": 32, "full": 4}


@dataclass(frozen=True)
class ScanReport:
    """A scan that can be used, as far as was looked: where it lies, and what its values are if it was decoded."""

    geometry: ScanGeometry
    values: HuSummary | None = None


Result = ScanReport | ScanError


def inspect_scans(
    sources: Collection[ScanSource], check: Check, *, num_workers: int | None = 0, cache: Path | None = None
) -> dict[ScanSource, Result]:
    """What each scan is, or why it cannot be used.

    Args:
        sources: of the scans.
        check: "headers", or "full" to decode each scan.
        num_workers: processes, if there is more work than for seconds; 0 stays in this one, None is all cores. With
            processes a script needs its `if __name__ == "__main__":`.
        cache: file of results, to which new ones are added at once; a scan whose files have not changed is not read
            again.
    """
    todo = sorted(set(sources), key=str)
    listings = {source: _listing(source) for source in todo} if cache else {}
    results = _read_cache(cache, listings, check) if cache else {}
    todo = [source for source in todo if source not in results]
    chunks = [todo[i : i + _CHUNK_SCANS[check]] for i in range(0, len(todo), _CHUNK_SCANS[check])]
    num_workers = num_cores() if num_workers is None else num_workers
    with tqdm(total=len(todo), desc=f"Checking scans ({check})", disable=None, unit="scan") as progress:
        for source, result in _inspected(check, chunks, num_workers):
            results[source] = result
            progress.update()
            if cache and listings[source]:
                _add_to_cache(cache, source, check, listings[source], result)
    return results


def _inspected(
    check: Check, chunks: Sequence[Sequence[ScanSource]], num_workers: int
) -> Iterator[tuple[ScanSource, Result]]:
    """Each scan with its result, in the order in which they are done."""
    began, alone = time.monotonic(), 0
    while alone < len(chunks) and (num_workers < 2 or time.monotonic() - began < _ALONE_S):
        yield from zip(chunks[alone], _inspect_chunk(check, chunks[alone]) or (), strict=True)
        alone += 1
    again: list[ScanSource] = []
    for chunk, results in run_jobs(partial(_inspect_chunk, check), chunks[alone:], num_workers, lambda _: None):
        if results is not None:
            yield from zip(chunk, results, strict=True)
        elif len(chunk) > 1:  # one of them killed its process
            again += chunk
        else:
            reason = "the process that read it was killed twice: most likely there is too little memory"
            yield chunk[0], ScanError(chunk[0].path, reason, "read it on a larger machine, or leave it out")
    if again:
        yield from _inspected(check, [[source] for source in again], num_workers)


def _inspect_chunk(check: Check, sources: Sequence[ScanSource]) -> list[Result] | None:
    return [_inspect(check, source) for source in sources]


def _inspect(check: Check, source: ScanSource) -> Result:
    try:
        if check == "headers":
            return ScanReport(read_header(*source))
        scan = read_scan(*source)
        return ScanReport(scan.geometry, scan.summary)
    except ScanError as error:
        return error


def _listing(source: ScanSource) -> str:
    """What the scan's files look like, or nothing if they cannot be looked at."""
    try:
        return f"{_RULES} {source_listing(source.path)}"
    except (OSError, ValueError):
        return ""


def _read_cache(cache: Path, listings: dict[ScanSource, str], check: Check) -> dict[ScanSource, Result]:
    """Results of scans whose files have not changed since, and that were read as far as they are to be."""
    known: dict[ScanSource, Result] = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else []:
        try:
            entry = json.loads(line)
            path, *how = entry["source"]
            source = ScanSource(Path(path), *how)
            if listings.get(source) != entry["listing"] or not (entry["error"] or check in ("headers", entry["check"])):
                continue
            if entry["error"]:
                known[source] = ScanError(*entry["error"])
            else:
                values = HuSummary(**entry["values"]) if entry["values"] else None
                known[source] = ScanReport(ScanGeometry.of(*entry["geometry"].values()), values)
        except (ValueError, KeyError, TypeError):  # cut off by an interrupt, or of another version
            continue
    return known


def _add_to_cache(cache: Path, source: ScanSource, check: Check, listing: str, result: Result) -> None:
    entry: dict[str, Any] = {"source": [str(source.path), *source[1:]], "check": check, "listing": listing}
    if isinstance(result, ScanError):
        entry["error"] = [result.path, result.reason, result.remedy]
    else:
        entry |= {"error": None, **dataclasses.asdict(result)}
    with cache.open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(entry)}")  # after whatever an interrupt has left
