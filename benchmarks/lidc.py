"""What frozen features know of real lung nodules: the shipped recipe, the baselines, and what needs no training.

    python benchmarks/lidc.py data=DIR                     # all contenders, 3 seeds: hours on one core
    python benchmarks/lidc.py data=DIR form=short          # within 20 minutes on two cores

For each of 5 folds by patient an encoder is pretrained, without labels, on the other folds' nodules; a logistic
regression on its frozen features is fitted on the same nodules and scored on the fold that neither has seen. Its
strength is chosen on folds of the training patients. An AUC is the mean over folds, then over seeds; intervals are
from 2000 resamples of the patients, and differences are taken on the same resamples.

Every finished piece (a contender, a seed, a fold) is kept in the workspace: the same command goes on where it was
stopped, and writes its table anew from what there is. `data` holds `lidc_crops/` and `ct/`.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import numpy.typing as npt
import sklearn
import torch
from lidc_data import NUM_FOLDS, PREPROCESSING, TASKS, Nodules, load
from lidc_methods import BY_NAME, CONTENDERS, Contender, features
from lidc_probes import NUM_BOOTSTRAP, Question, mean_auc, scores_of, setup_of, told
from pydantic import Field
from tqdm import tqdm

import fmcib_ssl
from fmcib_ssl.evaluation import (
    NUM_COMPONENTS,
    Inputs,
    Split,
    SplitScores,
    check_duplicates,
    check_patch_borders,
    check_patients,
    compact,
    hu_statistics,
    without_shared,
)
from fmcib_ssl.io import Command, atomic_write, parse_command

Array = npt.NDArray[Any]

RESULTS = Path(__file__).parent / "results" / "lidc.json"
REFERENCES = (
    "random", "random_concentric", "raw_voxels", "hu_statistics", "lightly_simclr", "lightly_simclr_concentric",
    "diameter",
)  # fmt: skip
FIRST = ("recipe", *(name for name in REFERENCES if name != "lightly_simclr_concentric"))
#: Contenders that are also asked with a share of the labels, and for the published split.
FEW_LABELS = ("recipe", *(name for name in REFERENCES if name != "diameter"))
PUBLISHED = ("recipe", "random", "raw_voxels", "lightly_simclr", "diameter")
FRACTIONS = (0.5, 0.2, 0.1)
SHORT = ("recipe", "random", "random_concentric", "raw_voxels", "diameter", "lightly_simclr", "mined")
PUBLISHED_TASK = "published_malignancy"


class LidcBenchmark(Command):
    """Pretrain on real nodules, probe the frozen features, and write benchmarks/results/lidc.json.

    python benchmarks/lidc.py data=DIR [form=short]
    """

    data: Path = Field(description="folder with lidc_crops/ and ct/")
    form: Literal["full", "short"] = Field("full", description="short: fewer contenders, one seed, fewer epochs")
    workspace: Path = Field(Path("runs/lidc"), description="store, features and scores; a stopped run goes on from it")
    output: Path | None = Field(None, description="results; null: benchmarks/results/lidc.json, short: in workspace")
    methods: str | None = Field(None, description="only these, with commas between them; null: those of the form")
    seeds: int | None = Field(None, ge=1, description="pretrainings of each fold; null: 3, short 1")
    epochs: int | None = Field(None, ge=1, description="of each pretraining; null: the recipe's, short 15")
    accelerator: Literal["cpu", "gpu"] = Field("cpu", description="what is trained on")
    num_threads: int = Field(1, ge=1, description="of torch")


@dataclass(frozen=True)
class Job:
    """One piece of work: a contender's features with a seed, for a fold, and their scores."""

    contender: Contender
    seed: int
    part: Split
    questions: tuple[Question, ...]


class Benchmark:
    """The nodules, the workspace, and what is known so far.

    Args:
        command: the settings.
        nodules: what is measured on.
    """

    def __init__(self, command: LidcBenchmark, nodules: Nodules) -> None:
        self.command, self.nodules = command, nodules
        short = command.form == "short"
        self.epochs = command.epochs or (15 if short else None)
        self.num_seeds = command.seeds or (1 if short else 3)
        names = command.methods.split(",") if command.methods else [c.name for c in CONTENDERS]
        if command.methods is None and short:
            names = list(SHORT)
        if unknown := [name for name in names if name not in BY_NAME]:
            raise SystemExit(f"methods={unknown[0]}: there is {', '.join(BY_NAME)}")
        self.contenders = [BY_NAME[name] for name in names]
        self.parts = folds(nodules)
        self.published = published_part(nodules)

    def seeds(self, contender: Contender) -> range:
        """What does not depend on a seed is asked once."""
        return range(self.num_seeds if contender.kind in ("trained", "random") else 1)

    def jobs(self) -> Iterator[Job]:
        """All pieces of work: first what the recipe must be ahead of, all seeds, then the others, seed by seed."""
        compared = [c for c in self.contenders if c.name in FIRST]
        others = [c for c in self.contenders if c not in compared]
        for group in (compared, others):
            for seed, contender in itertools.product(range(self.num_seeds), group):
                if seed not in self.seeds(contender):
                    continue
                questions = [Question(task, labels) for task, labels in self.nodules.labels.items()]
                if contender.name in FEW_LABELS:
                    questions += [
                        Question(task, self.nodules.labels[task], share)
                        for task in ("texture", "margin")
                        for share in FRACTIONS
                    ]
                for part in self.parts:
                    yield Job(contender, seed, part, tuple(questions))
                if contender.name in PUBLISHED:
                    yield Job(contender, seed, self.published, self.published_questions(contender))

    def published_questions(self, contender: Contender) -> tuple[Question, ...]:
        """Malignancy on the published split, alone and with the diameter beside the features."""
        names = [PUBLISHED_TASK] + ([f"{PUBLISHED_TASK}_with_diameter"] if contender.kind != "diameter" else [])
        return tuple(Question(name, self.nodules.published_malignancy) for name in names)

    def features(self, job: Job) -> Array:
        """Features of all nodules, pretrained without the patients that are tested; kept in the workspace."""
        contender = job.contender
        if contender.kind == "diameter":
            return self.nodules.lesions[["diameter_mm"]].to_numpy(np.float32)
        if contender.kind == "voxels":
            return compact(self.nodules.patches.flatten(1).clamp_min(-1024).float().numpy()).astype(np.float32)
        # What is not trained is the same for every fold.
        part = job.part.name if contender.kind == "trained" else "all"
        file = self.folder(contender) / f"features-seed{job.seed}-{part}.npy"
        if not file.is_file():
            found = self._made(job)
            with atomic_write(file) as unfinished:
                np.save(unfinished, found)
        kept: Array = np.load(file)
        return kept

    def _made(self, job: Job) -> Array:
        """Features that are not in the workspace yet."""
        nodules = self.nodules
        if job.contender.kind == "statistics":
            return hu_statistics(nodules.patches)
        rows = pretraining_rows(nodules.patients, job.part)
        return features(
            job.contender, nodules.patches, rows, nodules.pool,
            seed=job.seed, epochs=self.epochs, accelerator=self.command.accelerator,
        )  # fmt: skip

    def inputs(self, job: Job, question: Question) -> Inputs:
        """What the probe is given."""
        x = self.features(job)
        beside = question.task.endswith("_with_diameter")
        if beside:
            x = np.hstack([x, self.nodules.lesions[["diameter_mm"]].to_numpy(np.float32)])
        components = NUM_COMPONENTS if job.contender.kind == "voxels" else None
        return Inputs(job.contender.name, x, components, int(beside))

    def folder(self, contender: Contender) -> Path:
        """Where a contender's pieces are kept."""
        return self.command.workspace / "pieces" / contender.key(self.epochs)

    def scores(self, job: Job, question: Question, *, only_cached: bool = False) -> SplitScores | None:
        """Scores of one question; None where they are wanted from the workspace only, and are not there."""
        cache = self.folder(job.contender) / f"scores-seed{job.seed}-{job.part.name}-{question.file}.npy"
        if only_cached and not cache.is_file():
            return None
        return scores_of(question, lambda: self.inputs(job, question), self.nodules.patients, job.part, cache)

    def work(self) -> None:
        """Do what is not done yet, and write the results after every contender."""
        jobs = list(self.jobs())
        before: Contender | None = None
        with tqdm(jobs, unit="piece", smoothing=0.1) as bar:
            for job in bar:
                if before is not None and job.contender is not before:
                    self.write()
                before = job.contender
                bar.set_postfix_str(f"{job.contender.name}, seed {job.seed}, {job.part.name}")
                for question in job.questions:
                    self.scores(job, question)
        self.write()

    def write(self) -> dict[str, Any]:
        """The tables of all contenders that are finished for at least one seed."""
        drawn: dict[tuple[str, str, float], tuple[Array, int]] = {}
        pieces: dict[tuple[str, str, float], dict[int, list[SplitScores]]] = {}
        answers: dict[tuple[str, float], Question] = {}
        for job in self.jobs():
            for question in job.questions:
                answers[question.task, question.fraction] = question
                found = self.scores(job, question, only_cached=True)
                if found is not None:
                    name = (job.contender.name, question.task, question.fraction)
                    pieces.setdefault(name, {}).setdefault(job.seed, []).append(found)
        weights = setup_of("", self.nodules.labels["texture"], self.nodules.patients, []).weights(NUM_BOOTSTRAP)
        for name, by_seed in pieces.items():
            num_parts = 1 if name[1].startswith(PUBLISHED_TASK) else len(self.parts)
            whole = [parts for parts in by_seed.values() if len(parts) == num_parts]
            if whole:
                drawn[name] = mean_auc(answers[name[1], name[2]].labels, whole, weights), len(whole)
        results = self.tables(drawn)
        results["by_rating"] = self.by_rating(pieces, weights)
        output = self.command.output or (
            RESULTS if self.command.form == "full" else self.command.workspace / "lidc_short.json"
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return results

    def by_rating(
        self, pieces: dict[tuple[str, str, float], dict[int, list[SplitScores]]], weights: Array
    ) -> list[Any]:
        """AUC of the nodules of one rating against those that the raters call plainly 0: which of the 1s are missed."""
        found: list[Any] = []
        for (method, task, fraction), by_seed in pieces.items():
            whole = [parts for parts in by_seed.values() if len(parts) == len(self.parts)]
            if method != "recipe" or task not in ("texture", "margin") or fraction < 1 or not whole:
                continue
            ratings = self.nodules.lesions[task].to_numpy(np.int64)
            for rating in range(1, 5):
                kept = [
                    [SplitScores(p.split, p.rows[among], p.scores[among], p.setting, p.num_train)
                     for p in parts for among in [np.isin(ratings[p.rows], (rating, 5))]]
                    for parts in whole
                ]  # fmt: skip
                drawn = mean_auc((ratings == rating).astype(np.int64), kept, weights)
                about = {"method": method, "task": task, "rating": rating, "against": 5}
                found.append({**about, "nodules": int((ratings == rating).sum()), **told(drawn)})
        return found

    def tables(self, drawn: dict[tuple[str, str, float], tuple[Array, int]]) -> dict[str, Any]:
        """All that is written."""
        rows: list[dict[str, Any]] = []
        fractions: list[dict[str, Any]] = []
        differences: list[dict[str, Any]] = []
        for (method, task, fraction), (values, num_seeds) in drawn.items():
            row = {"method": method, "task": task, **told(values), "seeds": num_seeds}
            (rows if fraction == 1 else fractions).append(row if fraction == 1 else {**row, "fraction": fraction})
            if method != "recipe":
                continue
            for other in REFERENCES:
                # The diameter beside itself is the diameter; raw voxels are given all labels always.
                its_task = PUBLISHED_TASK if other == "diameter" and task.startswith(PUBLISHED_TASK) else task
                theirs = drawn.get((other, its_task, 1.0 if other == "raw_voxels" else fraction))
                if theirs is not None:
                    against = {"method": method, "against": other, "task": task, "fraction": fraction}
                    differences.append({**against, **told(values - theirs[0])})
        return {
            "command": " ".join(["python", "benchmarks/lidc.py", "data=DIR", f"form={self.command.form}"]),
            "machine": f"{platform.machine()}, {self.command.accelerator}, {self.command.num_threads} thread(s)",
            "versions": {
                "fmcib_ssl": fmcib_ssl.__version__, "python": platform.python_version(), "torch": torch.__version__,
                "lightning": lightning.__version__, "scikit-learn": sklearn.__version__,
            },
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "nodules": len(self.nodules.lesions),
            "patients": len(np.unique(self.nodules.patients)),
            "positives": {task: int(labels.sum()) for task, labels in self.nodules.labels.items()},
            "rows": rows,
            "differences": differences,
            "fractions": fractions,
        }  # fmt: skip


def folds(nodules: Nodules) -> list[Split]:
    """Each fold tested once."""
    return [
        Split(f"fold{k}", np.flatnonzero(nodules.fold != k), np.flatnonzero(nodules.fold == k))
        for k in range(NUM_FOLDS)
    ]


def published_part(nodules: Nodules) -> Split:
    """The published malignancy split, without the patients that it has on two sides in training and validation."""
    rows = {side: np.flatnonzero(nodules.published == side) for side in ("train", "val", "test")}
    return without_shared(Split("published", rows["train"], rows["test"], rows["val"]), nodules.patients)


def pretraining_rows(patients: Array, part: Split) -> Array:
    """Nodules of all patients but those that are tested."""
    return np.flatnonzero(~np.isin(patients, patients[part.test]))


def leakage(nodules: Nodules, parts: Sequence[Split]) -> Iterator[str]:
    """What the package's own checks say of the patches: patients, equal images, padding, repeated edges."""
    voxels = PREPROCESSING.normalize(nodules.patches).flatten(1).numpy()
    names = np.arange(len(voxels)).astype(str)
    findings = [check_patients(parts, nodules.patients), check_duplicates("patches", voxels, parts, names)]
    for task, labels in nodules.labels.items():
        setup = setup_of(task, labels, nodules.patients, parts)
        findings += [
            replace(f, message=f"{task}: {f.message}") for f in check_patch_borders(voxels, PREPROCESSING, setup)
        ]
    for finding in findings:
        yield f"{'WARNING' if finding.found else 'ok'} {finding.check}: {finding.message}"


def table(results: dict[str, Any]) -> str:
    """The results for people, in Markdown."""
    tasks = [*TASKS, PUBLISHED_TASK]
    found = {(row["method"], row["task"]): row for row in results["rows"]}
    methods: Sequence[str] = list(dict.fromkeys(row["method"] for row in results["rows"]))
    lines = ["| features | " + " | ".join(tasks) + " | seeds |", "| --- |" + " ---: |" * (len(tasks) + 1)]
    for method in sorted(methods, key=lambda name: -found.get((name, "texture"), {"auc": 0})["auc"]):
        cells = []
        for task in tasks:
            row = found.get((method, task))
            cells.append(f"{row['auc']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if row else "")
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {found[method, 'texture']['seeds']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    command = parse_command(LidcBenchmark, arguments)
    torch.set_num_threads(command.num_threads)
    benchmark = Benchmark(command, load(command.data, command.workspace))
    for finding in leakage(benchmark.nodules, benchmark.parts):
        print(finding)
    try:
        benchmark.work()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    print(table(benchmark.write()))


if __name__ == "__main__":
    main(sys.argv[1:])
