"""Runs that are killed over and over, at random moments, and started again with the same command until they end.

    python benchmarks/faults.py [num_kills=200] [only=PART_OF_A_KIND] [seed=0] [workspace=runs/faults]

What a killed run leaves in the end is compared, bit for bit, to that of a run nothing happened to; docs/faults.md has
the table and says what each fault is. Every finished case is kept in the workspace: the same command goes on.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from faults_cases import NUM_SCANS, Case, prepare_arguments, train_arguments
from faults_runs import Started, start, start_ranks
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from fmcib_ssl.data import make_archive
from fmcib_ssl.io import Command, parse_command, write_atomically

RESULTS = Path(__file__).parent / "results" / "faults.json"

#: Kinds of faults, and how many of 200 kills are of each.
KINDS = {
    "SIGKILL": 24,
    "SIGTERM": 20,
    "SIGUSR1": 20,
    "SIGKILL in a save": 24,
    "SIGKILL while results are written": 10,
    "any signal while Python starts": 12,
    "SIGKILL of a data worker, fork": 16,
    "SIGKILL of a data worker, forkserver": 12,
    "SIGKILL of a data worker, spawn": 8,
    "SIGKILL of a data worker that hands over a batch": 12,
    "SIGKILL of one of two ranks": 14,
    "SIGKILL of one of two ranks, Lightning's launcher": 4,
    "disk full": 12,
    "prepare: SIGKILL": 12,
    "prepare: SIGTERM": 8,
}
#: Of one kind: more that hit nothing would never end.
MOST_CASES = 100


class Faults(Command):
    """Kill runs at random moments and compare what they come to.

    python benchmarks/faults.py num_kills=200
    """

    num_kills: PositiveInt = Field(default=200, description="at least so many")
    only: str = Field(default="", description="kinds with this in their name, such as 'data worker'")
    seed: NonNegativeInt = Field(default=0, description="of all that is drawn")
    workspace: Path = Field(default=Path("runs/faults"), description="cases that are done, and what failed")


def references(workspace: Path) -> None:
    """The runs that nothing happens to, and the store that all read."""
    make_archive(workspace / "phantom", NUM_SCANS, progress=False)
    log = workspace / "references.log"
    todo: dict[str, Callable[[Path], list[Started]]] = {
        "store": lambda to: [start("scripts/prepare.py", prepare_arguments(workspace, to, num_workers=0), log)],
        "run": lambda to: [start("train.py", train_arguments(workspace, to, num_workers=0), log)],
        "two_ranks": lambda to: start_ranks(train_arguments(workspace, to, num_workers=0), log),
    }
    for name, begin in todo.items():
        if not (workspace / f"{name}.done").exists():
            shutil.rmtree(workspace / name, ignore_errors=True)
            if {one.wait(300) for one in begin(workspace / name)} != {0}:
                sys.exit(f"error: not even the run that nothing happens to ends well; see {log}")
            (workspace / f"{name}.done").touch()


def cases(wanted: dict[str, int], seed: int, workspace: Path) -> Iterator[dict[str, Any]]:
    """Cases of all kinds in turn, until there are enough kills of each; a run may end before it is hit."""
    left, number = dict(wanted), 0
    while any(num > 0 for num in left.values()) and number < MOST_CASES:
        for kind in [kind for kind, num in left.items() if num > 0]:
            result = Case(kind, number, left[kind], seed, workspace).result()
            left[kind] -= len(result["kills"])
            yield result
        number += 1


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of fault."""
    rows = []
    for kind in KINDS:
        own = [result for result in results if result["kind"] == kind]
        kills = [kill for result in own for kill in result["kills"]]
        if not kills:
            continue
        where = Counter(kill["where"] for kill in kills)
        rows.append({
            "fault": kind,
            "kills": len(kills),
            "where": {place: round(where[place] / len(kills), 2) for place in ("start", "step", "save", "end")},
            "runs": len(own),
            "runs_as_uninterrupted": sum(not result["problems"] for result in own),
            "genuine_starts": sum(kill["genuine"] for kill in kills),
            "exit_codes": dict(Counter(str(code) for kill in kills for code in kill["codes"])),
            "steps_lost_at_most": max(kill["lost"] for kill in kills),
            "median_end_s": median(kill["seconds"] for kill in kills),
            "longest_end_s": max(kill["seconds"] for kill in kills),
            "ended_by_launcher": sum(kill["by_launcher"] for kill in kills),
        })  # fmt: skip
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The same in Markdown."""
    columns = ("fault", "kills", "in the start / a step / a save / the end", "runs", "as uninterrupted", "steps lost",
               "gone after: median, longest")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        where = " / ".join(f"{100 * share:.0f}" for share in row["where"].values())
        lost = "-" if row["fault"].startswith("prepare") else f"<= {row['steps_lost_at_most']}"
        cells = (row["fault"], row["kills"], f"{where} %", row["runs"], row["runs_as_uninterrupted"], lost,
                 f"{row['median_end_s']:.1f} s, <= {row['longest_end_s']:.1f} s")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Kill, compare, and write what was seen."""
    command = parse_command(Faults, arguments)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job has it ignored, and passes that on
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    workspace = command.workspace.resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    references(workspace)
    shares = {kind: share for kind, share in KINDS.items() if command.only in kind}
    if not shares:
        sys.exit(f"error: only={command.only}: no kind has that in its name; there are {', '.join(KINDS)}")
    wanted = {kind: -(-command.num_kills * share // sum(shares.values())) for kind, share in shares.items()}
    results = []
    with tqdm(
        total=sum(wanted.values()), unit="kill", smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 60
    ) as bar:
        for result in cases(wanted, command.seed, workspace):
            results.append(result)
            bar.set_postfix(failed=sum(bool(one["problems"]) for one in results), refresh=False)
            bar.update(len(result["kills"]))
    rows = rows_of(results)
    problems = [problem for result in results for problem in result["problems"]]
    found = {
        "command": " ".join(["python benchmarks/faults.py", *arguments]),
        "machine": f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "kills": sum(row["kills"] for row in rows),
        "starts": sum(result["starts"] for result in results),
        "rows": rows,
        "problems": problems,
    }
    write_atomically(
        RESULTS if command.num_kills >= 200 and not command.only else workspace / "faults.json",
        json.dumps(found, indent=1) + "\n",
    )
    print(table_of(rows))
    print("\n".join([f"{found['kills']} kills, {found['starts']} starts", *problems]))
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
