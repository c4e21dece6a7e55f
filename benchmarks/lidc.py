"""What frozen features know of real lung nodules, judged by what four radiologists said of them.

    python benchmarks/lidc.py data=DIR                     # all contenders, 3 seeds: hours on one core
    python benchmarks/lidc.py data=DIR pretrain=false      # only what is in the workspace: minutes

For each of 5 folds by patient an encoder is pretrained, without labels, on the other folds' nodules; a probe of its
frozen features is fitted on the same nodules and scored on the fold that neither has seen. Its penalty is chosen on
folds of the training patients. `lidc_targets.py` says what is asked, `lidc_methods.py` who is.

Features of every contender, seed and fold, and scores of every question, are kept in the workspace: the same command
goes on where it was stopped. `data` holds `lidc_crops/` and `ct/`. The pictures and tables of docs/does_it_learn.md are
made from the results by `python benchmarks/lidc_figures.py`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lidc_data import PREPROCESSING, Nodules, load
from lidc_figures import Results, tables
from lidc_methods import BY_NAME, CONTENDERS, Contender, features
from lidc_targets import REFERENCES, Question, answers, published_split, questions, splits_of, within_sizes
from measure import RESULTS, one_line_a_row
from pydantic import Field
from tqdm import tqdm

from fmcib_ssl.evaluation import (
    NUM_COMPONENTS,
    Inputs,
    Split,
    SplitScores,
    check_duplicates,
    check_patch_borders,
    check_patients,
    score,
)
from fmcib_ssl.io import Command, atomic_write, parse_command
from fmcib_ssl.training import environment
from fmcib_ssl.types import Array

METHODS = (
    *(contender.name for contender in CONTENDERS), "recipe+hu_statistics", "recipe+mined", "recipe+diameter",
)  # fmt: skip
#: Asked with a share of the labels, and for the published split.
FEW_LABELS = ("recipe", "hu_statistics", "recipe+hu_statistics", *REFERENCES)
PUBLISHED = ("recipe", "recipe+diameter", "random", "raw_voxels", "hu_statistics", "lightly_simclr", "diameter")


class LidcBenchmark(Command):
    """Pretrain on real nodules, probe the frozen features, and write benchmarks/results/lidc.json.

    python benchmarks/lidc.py data=DIR
    python benchmarks/lidc.py data=DIR methods=recipe,mined,recipe+mined seeds=1 epochs=15 output=short.json
    """

    data: Path = Field(description="folder with lidc_crops/ and ct/")
    workspace: Path = Field(Path("runs/lidc"), description="store, features and scores; a stopped run goes on from it")
    output: Path = Field(RESULTS / "lidc.json", description="results")
    methods: list[str] = Field(list(METHODS), description="contenders; a+b: the features of both, side by side")
    seeds: int = Field(3, ge=1, description="pretrainings of each fold")
    epochs: int | None = Field(None, ge=1, description="of each pretraining; null: the recipe's")
    pretrain: bool = Field(True, description="false: leave out what has no features in the workspace yet")
    accelerator: Literal["cpu", "gpu"] = Field("cpu", description="what is trained on")
    num_threads: int = Field(1, ge=1, description="of torch")


class Benchmark:
    """The nodules, the workspace, and what is asked.

    Args:
        command: the settings.
        nodules: what is measured on.
    """

    def __init__(self, command: LidcBenchmark, nodules: Nodules) -> None:
        names = {name for method in command.methods for name in method.split("+")}
        if unknown := sorted(names - BY_NAME.keys()):
            raise SystemExit(f"methods={unknown[0]}: contenders are {', '.join(BY_NAME)}")
        self.command, self.nodules = command, nodules
        self.splits = {split.name: split for split in [*splits_of(nodules), published_split(nodules)]}

    @cached_property
    def questions(self) -> list[Question]:
        """Everything that is asked."""
        return list(questions(self.nodules))

    def seeds(self, method: str) -> range:
        """What does not depend on a seed is asked once."""
        seeded = any(BY_NAME[name].kind in ("trained", "random") for name in method.split("+"))
        return range(self.command.seeds if seeded else 1)

    def features(self, contender: Contender, seed: int, split: Split) -> Array | None:
        """Features of all nodules, `(n, dim)`, pretrained without the patients that are tested; kept in the workspace.

        None if there are none yet and nothing is to be pretrained.
        """
        is_trained = contender.kind == "trained"
        seed = seed if contender.kind in ("trained", "random") else 0
        # What is not trained is the same for every fold.
        name = f"features-seed{seed}-{split.name if is_trained else 'all'}.npy"
        file = self.command.workspace / "pieces" / contender.key(self.command.epochs) / name
        if not file.is_file():
            if is_trained and not self.command.pretrain:
                return None
            computed = features(
                contender, self.nodules, pretraining_rows(self.nodules.patients, split),
                seed=seed, epochs=self.command.epochs, accelerator=self.command.accelerator,
            )  # fmt: skip
            with atomic_write(file) as unfinished:
                np.save(unfinished, computed)
        return np.asarray(np.load(file))

    def inputs(self, method: str, seed: int, split: Split) -> Inputs | None:
        """What the probe is given: raw voxels first, as only they are reduced; None where features are missing."""
        parts = sorted((BY_NAME[name] for name in method.split("+")), key=lambda part: part.kind != "voxels")
        blocks = [x for part in parts if (x := self.features(part, seed, split)) is not None]
        if len(blocks) < len(parts):
            return None
        x = np.hstack(blocks)
        return Inputs(method, x, NUM_COMPONENTS if parts[0].kind == "voxels" else None, x.shape[1] - blocks[0].shape[1])

    def scores(self, question: Question, method: str, seed: int) -> list[SplitScores] | None:
        """Scores of every split, computed once; None where features are missing."""
        labels, splits = question.protocol.labels, question.protocol.splits
        parts = [BY_NAME[name] for name in method.split("+")]
        folder = self.command.workspace / "pieces" / "+".join(part.key(self.command.epochs) for part in parts)
        cache = folder / f"scores-seed{seed}-{labels.name}-{question.fraction:g}.npy"
        if not cache.is_file():
            scored = []
            for split, protocol in zip(splits, question.protocols, strict=True):
                inputs = self.inputs(method, seed, self.splits[split.name])
                if inputs is None:
                    return None
                own = replace(inputs, x=inputs.x[labels.rows])
                scored += score(question.probe, own, protocol, question.fraction)
            with atomic_write(cache) as file:
                np.save(file, np.concatenate([one.scores for one in scored]))
        ends = np.cumsum([len(split.test) for split in splits])
        by_split = zip(splits, np.split(np.load(cache), ends[:-1]), strict=True)
        return [SplitScores(split.name, split.test, own, float("nan"), len(split.train)) for split, own in by_split]

    def results(self) -> dict[str, Any]:
        """Compute what is missing, seed by seed, and compare what is complete."""
        jobs = [
            (question, method, seed)
            for seed, method in itertools.product(range(self.command.seeds), self.command.methods)
            for question in self.questions
            if seed in self.seeds(method)
            and (question.fraction == 1 or method in FEW_LABELS)
            and (question.target != "published" or method in PUBLISHED)
        ]
        scored: dict[Question, dict[str, list[SplitScores]]] = {}
        for question, method, seed in (bar := tqdm(jobs, "probing")):
            bar.set_postfix_str(f"{method}, seed {seed}")
            scored.setdefault(question, {}).setdefault(method, []).extend(self.scores(question, method, seed) or [])
        asked = [
            (question, {method: scores for method, scores in by_method.items() if scores})
            for question, by_method in scored.items()
        ]
        diameters = self.nodules.lesions["diameter_mm"].to_numpy(np.float64)
        asked += [
            one
            for question, by_method in asked
            if question.task == "malignancy" and question.target in ("mean", "majority")
            for one in within_sizes(question, diameters, by_method)
        ]
        found: dict[str, list[dict[str, Any]]] = {"targets": [], "rows": [], "differences": []}
        for question, by_method in tqdm(asked, "comparing"):
            for name, entries in answers(question, by_method).items():
                found[name] += entries
        return {
            "command": "python benchmarks/lidc.py data=DIR",
            "versions": environment()["packages"],
            "written": time.strftime("%Y-%m-%d %H:%M"),
            "nodules": len(self.nodules.lesions),
            "patients": len(np.unique(self.nodules.patients)),
            **found,
        }


def pretraining_rows(patients: Array, split: Split) -> Array:
    """Nodules of all patients but those that are tested."""
    return np.flatnonzero(~np.isin(patients, patients[split.test]))


def leakage(benchmark: Benchmark) -> Iterator[str]:
    """What the package's own checks say of the patches: patients, equal images, padding, repeated edges."""
    nodules = benchmark.nodules
    voxels = PREPROCESSING.normalize(nodules.patches).flatten(1).numpy()
    folds = splits_of(nodules)
    findings = [check_patients(folds, nodules.patients)]
    findings += [check_duplicates("patches", voxels, folds, np.arange(len(voxels)).astype(str))]
    for question in benchmark.questions:
        if question.target == "mode":
            borders = check_patch_borders(voxels, PREPROCESSING, question.protocol)
            findings += [replace(finding, message=f"{question.task}: {finding.message}") for finding in borders]
    for finding in findings:
        yield f"{'WARNING' if finding.found else 'ok'} {finding.check}: {finding.message}"


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    command = parse_command(LidcBenchmark, arguments)
    torch.set_num_threads(command.num_threads)
    benchmark = Benchmark(command, load(command.data, command.workspace))
    print(*leakage(benchmark), sep="\n")
    try:
        results = benchmark.results()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    with atomic_write(command.output) as file:
        file.write(one_line_a_row(results).encode())
    print(*tables(Results(results)).values(), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
