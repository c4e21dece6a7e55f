"""When do mined negatives pay? Encoders pretrained on places in 51 sarcomas, with negatives of the same scans.

    python benchmarks/sarcoma.py data=DIR                  # all contenders, 3 seeds: hours on one core
    python benchmarks/sarcoma.py data=DIR form=short       # one seed, the contenders that matter

For each of 3 folds by patient an encoder is pretrained, without labels, on places in the other patients' tumours. Its
frozen features are asked, of patches alone: is a place in the tumour or at least 10 mm off; do two places of a tumour
find each other among the tumours of the fold; and what do readers say of lung nodules, which it has never seen.
Every finished piece (a contender, a seed, a fold) is kept in the workspace: the same command goes on where it was
stopped, and writes the results in the end. `data` holds `ct/sarcoma/` and `lidc_crops/`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lidc_data import folds_of
from measure import RESULTS, machine, one_line_a_row
from pydantic import Field
from sarcoma_data import NUM_FOLDS, PREPROCESSING, Sarcomas, load
from sarcoma_methods import BY_NAME, CONTENDERS, Contender, features
from sarcoma_probes import figures, judged
from tqdm import tqdm

from fmcib_ssl.evaluation import NUM_COMPONENTS, hu_statistics, interval
from fmcib_ssl.io import Command, atomic_write, parse_command

Array = npt.NDArray[Any]

SHORT = ("mined", "lesions", "both", "random", "hu_statistics", "raw_voxels")
REFERENCES = ("random", "hu_statistics", "lesions", "mined", "both")


class SarcomaBenchmark(Command):
    """Pretrain on places in sarcomas, judge the frozen features, and write benchmarks/results/sarcoma.json.

    python benchmarks/sarcoma.py data=DIR [form=short]
    """

    data: Path = Field(description="folder with ct/sarcoma/ and lidc_crops/")
    form: Literal["full", "short"] = Field("full", description="short: fewer contenders, one seed")
    workspace: Path = Field(Path("runs/sarcoma"), description="store, features and scores; a stopped run resumes")
    output: Path | None = Field(None, description="results; null: benchmarks/results/sarcoma.json, short: in workspace")
    methods: str | None = Field(None, description="only these, with commas between them; null: those of the form")
    seeds: int | None = Field(None, ge=1, description="pretrainings of each fold; null: 3, short 1")
    epochs: int = Field(16, ge=1, description="of each pretraining")
    num_threads: int = Field(1, ge=1, description="of torch")


class Job(NamedTuple):
    """One piece of work: a contender with a seed, for a fold."""

    contender: Contender
    seed: int
    fold: int


class Benchmark:
    """The places, the workspace, and what is known so far.

    Args:
        command: the settings.
        sarcomas: what is measured on.
    """

    def __init__(self, command: SarcomaBenchmark, sarcomas: Sarcomas) -> None:
        self.command, self.sarcomas = command, sarcomas
        short = command.form == "short"
        self.num_seeds = command.seeds or (1 if short else 3)
        names = command.methods.split(",") if command.methods else SHORT if short else list(BY_NAME)
        if unknown := [name for name in names if name not in BY_NAME]:
            raise SystemExit(f"methods={unknown[0]}: there is {', '.join(BY_NAME)}")
        self.contenders = [contender for contender in CONTENDERS if contender.name in names]
        self.fold = folds_of(sarcomas.patients, NUM_FOLDS)

    def jobs(self) -> Iterator[Job]:
        """All pieces of work, seed by seed; what does not depend on a seed is asked once."""
        for seed, contender, fold in itertools.product(range(self.num_seeds), self.contenders, range(NUM_FOLDS)):
            if seed == 0 or contender.kind in ("trained", "random"):
                yield Job(contender, seed, fold)

    def features(self, job: Job) -> list[Array]:
        """Features of places and of nodules, pretrained without the patients that are tested; kept in the workspace."""
        patches = (self.sarcomas.patches, self.sarcomas.nodule_patches)
        if job.contender.kind == "voxels":
            return [PREPROCESSING.normalize(some).flatten(1).numpy() for some in patches]
        part = job.fold if job.contender.kind == "trained" else "all"
        file = self.folder(job.contender) / f"features-seed{job.seed}-{part}.npz"
        if not file.is_file():
            if job.contender.kind == "statistics":
                made = [hu_statistics(some) for some in patches]
            else:
                train = np.unique(self.sarcomas.patients[self.fold != job.fold])
                made = features(job.contender, self.sarcomas, train, seed=job.seed, epochs=self.command.epochs)
            with atomic_write(file) as unfinished:
                np.savez(unfinished, *made)
        with np.load(file) as kept:
            return list(kept.values())

    def folder(self, contender: Contender) -> Path:
        """Where a contender's pieces are kept."""
        return self.command.workspace / "pieces" / contender.key(self.command.epochs)

    def answers(self, job: Job, *, only_kept: bool = False) -> dict[str, Array] | None:
        """What the features of a piece answer; None where it is not in the workspace and is only to be looked up."""
        file = self.folder(job.contender) / f"answers-seed{job.seed}-{job.fold}.npz"
        if not file.is_file():
            if only_kept:
                return None
            components = NUM_COMPONENTS if job.contender.kind == "voxels" else None
            made = judged(self.sarcomas, self.features(job), components, self.fold == job.fold)
            with atomic_write(file) as unfinished:
                np.savez(unfinished, **made)
        with np.load(file) as kept:
            return dict(kept)

    def work(self) -> None:
        """Do what is not done yet."""
        with tqdm(list(self.jobs()), unit="piece", smoothing=0.1) as bar:
            for job in bar:
                bar.set_postfix_str(f"{job.contender.name}, seed {job.seed}, fold {job.fold}")
                self.answers(job)

    def write(self) -> dict[str, Any]:
        """The tables of all contenders that are through all folds with at least one seed."""
        drawn = {}
        for contender in self.contenders:
            by_seed: dict[int, list[dict[str, Array]]] = {}
            for job in self.jobs():
                if job.contender is contender and (kept := self.answers(job, only_kept=True)) is not None:
                    by_seed.setdefault(job.seed, []).append(kept)
            whole = [of_seed for of_seed in by_seed.values() if len(of_seed) == NUM_FOLDS]
            if whole:
                drawn[contender.name] = figures(self.sarcomas, self.fold, whole), len(whole)
        rows, differences = [], []
        for method, (values, num_seeds) in drawn.items():
            for question, of_method in values.items():
                about = {"method": method, **dict(zip(("task", "target", "metric"), question, strict=True))}
                rows.append({**about, **_estimate(of_method), "seeds": num_seeds})
                for other in REFERENCES:
                    if other in drawn and other != method:
                        difference = _estimate(of_method - drawn[other][0][question])
                        differences.append({**about, "against": other, **difference})
        results = {
            "command": f"python benchmarks/sarcoma.py data=DIR form={self.command.form}",
            "machine": f"{machine(gpu=False)}, {self.command.num_threads} thread(s)",
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "patients": len(np.unique(self.sarcomas.patients)),
            "places": self.sarcomas.places["kind"].value_counts().to_dict(),
            "nodules": len(self.sarcomas.nodules),
            "mining": self.sarcomas.mining,
            "rows": rows,
            "differences": differences,
        }
        full = self.command.form == "full"
        output = self.command.output or (RESULTS if full else self.command.workspace) / "sarcoma.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(one_line_a_row(results), encoding="utf-8")
        return results


def _estimate(drawn: Array) -> dict[str, float]:
    """The value and its interval, for JSON."""
    estimate = interval(drawn)
    return {name: round(getattr(estimate, name), 4) for name in ("value", "low", "high")}


def table(results: dict[str, Any]) -> str:
    """The results for people, in Markdown; the highest area under the curve first."""
    rows = {(row["method"], row["task"], row["target"], row["metric"]): row for row in results["rows"]}
    questions = list(dict.fromkeys(key[1:] for key in rows))
    methods = sorted({key[0] for key in rows}, key=lambda name: -rows[name, "tumour", "similar", "auc"]["value"])
    lines = ["| features | " + " | ".join(" ".join(question) for question in questions) + " | seeds |"]
    lines.append("| --- |" + " --- |" * len(questions) + " ---: |")
    for method in methods:
        of_method = [rows[method, *question] for question in questions]
        cells = [f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for row in of_method]
        lines.append(f"| {method} | {' | '.join(cells)} | {of_method[0]['seeds']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    command = parse_command(SarcomaBenchmark, arguments)
    torch.set_num_threads(command.num_threads)
    benchmark = Benchmark(command, load(command.data, command.workspace))
    try:
        benchmark.work()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    print(table(benchmark.write()))


if __name__ == "__main__":
    main(sys.argv[1:])
