"""Is this version slower than another? The same commands of both, alternating, on the same synthetic scans.

    python benchmarks/versions.py OTHER_CHECKOUT [ROUNDS]

Only commands that both versions have are used: preparing a store, training from it, embedding and evaluating. What is
compared is processor time of a command and its children, by the median over rounds; the ratio is this version's by the
other's. Both run with this Python and its packages.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
STEPS, NUM_SCANS = 40, 12


def commands(archive: Path, folder: Path) -> dict[str, list[str]]:
    """By what is measured; each needs what those before it have written."""
    table, store, run = archive / "annotations.csv", folder / "store", folder / "run"
    encoder, features, results = run / "encoder.safetensors", folder / "features.parquet", folder / "results"
    train = ["+experiment=ct_ntxent_mined", "encoder=small", "data.patch_size=[32,32,32]", "data.batch_size=8"]
    train += [f"trainer.max_steps={STEPS}", "trainer.max_epochs=-1", "contact_sheet_rows=0", "hardware.num_threads=1"]
    return {
        "prepare": ["scripts/prepare.py", f"annotations={table}", f"store={store}", "num_workers=0"],
        "train": ["train.py", *train, f"data.store={store}", f"hydra.run.dir={run}"],
        "embed": ["scripts/embed.py", f"checkpoint={encoder}", f"store={store}", f"output={features}"],
        "evaluate": ["scripts/evaluate.py", f"features={features}", "label=label", "folds=3", f"output={results}"],
    }


def cpu_seconds(checkout: Path, arguments: list[str]) -> float:
    """What a command of a checkout takes; its output is shown if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(checkout / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(other: Path, rounds: int) -> None:
    """Print a row a command."""
    checkouts = {"other": other.resolve(), "this": HERE}
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "archive"
        cpu_seconds(other, ["scripts/phantom.py", f"folder={archive}", f"num_scans={NUM_SCANS}"])
        for number in range(rounds):
            for name, checkout in checkouts.items():
                for what, arguments in commands(archive, Path(scratch) / f"{name}{number}").items():
                    seconds.setdefault((what, name), []).append(cpu_seconds(checkout, arguments))
    print("| command | other, CPU s | this, CPU s | ratio |\n| --- | ---: | ---: | ---: |")
    for what in dict.fromkeys(what for what, _ in seconds):
        theirs, ours = (statistics.median(seconds[what, name]) for name in checkouts)
        print(f"| {what} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
