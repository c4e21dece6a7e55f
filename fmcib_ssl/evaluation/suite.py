"""Several models on several tasks, beside the rivals that explain a figure, and a ranking with its doubts.

Each model embeds the lesions of each table once, each task is evaluated once: what is done is kept in the output's
folder by a digest of what it was made from, so that the same command resumes. With a further model only that one is
embedded, and probes are fitted again.

Rows of results are `{model, task, probe, metric, value, low, high}`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fmcib_ssl.data import AnnotationsError, run_jobs
from fmcib_ssl.evaluation.conditions import CLEAN
from fmcib_ssl.evaluation.embedding import embed_to_file
from fmcib_ssl.evaluation.embedding_sources import Inference, rebuilt_encoder, trained_encoder
from fmcib_ssl.evaluation.evaluate import Evaluation, evaluate_features, find_leakage, gather, without_shared_patients
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable, shared_lesions
from fmcib_ssl.evaluation.metrics import METRICS, interval
from fmcib_ssl.evaluation.patients import by_patient
from fmcib_ssl.evaluation.probes import LINEAR_PROBE, PROBES, Inputs, Protocol, resampled, within
from fmcib_ssl.evaluation.ranking import Ranking, chance_corrected, rank_models, retraining_share
from fmcib_ssl.evaluation.report_results import safe_name
from fmcib_ssl.evaluation.robustness import embed_conditions, measure_robustness
from fmcib_ssl.evaluation.tasks import Task, join_further_labels, protocol_of, read_task
from fmcib_ssl.io import atomic_write, checksum_of, digest_of, read_json, write_atomically, write_json
from fmcib_ssl.types import Array, Preprocessing

logger = logging.getLogger(__name__)

#: Columns of robustness: what is done to a lesion, and what the metric is called then.
CONDITIONS_SHOWN = {
    "point moved by 3 mm": "3 mm beside", "slices of 5 mm": "slices of 5 mm", "lesion removed": "lesion removed",
    "voxels shuffled": "voxels shuffled",
}  # fmt: skip
SIZE = "size"
BASELINES = {"hu_statistics": "HU statistics", "raw_voxels": "raw voxels"}
WITHIN_SIZES = "within thirds of size"
#: Why a process has no result.
KILLED = "its process was killed: most likely there is too little memory"


@dataclass(frozen=True)
class Suite:
    """What is compared, where it lies, and how.

    Attributes:
        models: by name what `rebuilt_encoder` builds: `kind`, `weights` and `sha256`, or `encoder` and `seed`; and
            `preprocessing`, None for that of each task.
        tasks: by name.
        tables: folder that the tasks' tables lie in.
        images: folder that the tasks' folders of scans lie in.
        output: features, results and page go there.
        robustness: embed every lesion under `CONDITIONS_SHOWN`, too.
        num_bootstrap: resamples of the patients.
        num_workers: processes, each with one model or task at a time; 0 works in this one.
        seed: of folds, resamples and random weights.
        device: null: a GPU if there is one.
        trusted_targets: foreign encoders that may be built.
    """

    models: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Task]
    tables: Path
    images: Path
    output: Path
    robustness: bool = True
    num_bootstrap: int = 2000
    num_workers: int = 0
    seed: int = 0
    device: str | None = None
    trusted_targets: Sequence[str] = ()


@dataclass(frozen=True)
class TaskResult:
    """What was found on one task; plain values, but for `drawn`.

    Attributes:
        rows: as in the module; a metric may be the task's first one under a condition, or within thirds of size.
        differences: `features`, `against`, `probe`, `metric`, `value`, `low`, `high`, on the same resamples.
        leakage: findings of the checks, with `refused` where one speaks against the task's figures.
        notes: on lesions, split and readers.
        missing: `features` that have no value, and the `reason`.
        metric: the first of the kind of label.
        retraining: as of `rank_models`.
        drawn: by model the score of the linear probe, 0 at chance, `(1 + resamples,)`.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    leakage: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    metric: str = ""
    retraining: float = 0.0
    drawn: dict[str, Array] = field(default_factory=dict)

    @property
    def refused(self) -> list[str]:
        """Names of the checks that speak against the figures: the task does not count in a ranking."""
        return [finding["check"] for finding in self.leakage if finding["refused"]]


def contenders(
    files: Mapping[str, Path],
    baselines: Sequence[str] = (),
    networks: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    trusted_targets: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """What `Suite.models` takes: encoders from files, and what is compared with each of their networks and patches.

    Args:
        files: encoders by name.
        baselines: `random`, weights never trained, of each network; `hu_statistics` and `raw_voxels`, of each way in
            which the encoders cut their patches, or without encoders in that of each task.
        networks: by name `_target_` and arguments of further networks with random weights, for such patches.
        seed: of the random weights.
        trusted_targets: foreign encoders that may be built.

    Raises:
        EncoderFileError: a file that holds no encoder.
    """
    made: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        encoder = trained_encoder(file, trusted_targets=trusted_targets)
        made[name] = {**encoder.about, "preprocessing": encoder.preprocessing.to_dict()}
    cuts = list({digest_of(one["preprocessing"]): one["preprocessing"] for one in made.values()}.values()) or [None]
    untrained = [(name, network, cut) for name, network in (networks or {}).items() for cut in cuts]
    if "random" in baselines:
        untrained = [(name, one["encoder"], one["preprocessing"]) for name, one in made.items()] + untrained
    taken = set()
    for name, network, cut in untrained:
        if (digest := digest_of(dict(network), cut)) not in taken:
            taken.add(digest)
            made[f"random weights ({name}{_size(cut, cuts)})"] = {
                "kind": "random_weights", "encoder": dict(network), "seed": seed, "preprocessing": cut
            }  # fmt: skip
    for baseline in (name for name in baselines if name in BASELINES):
        made |= {f"{BASELINES[baseline]}{_size(cut, cuts)}": {"kind": baseline, "preprocessing": cut} for cut in cuts}
    return made


def _size(cut: Mapping[str, Any] | None, cuts: Sequence[object]) -> str:
    """The patch, where there is more than one."""
    if cut is None or len(cuts) == 1:
        return ""
    return ", " + " x ".join(map(str, cut["patch_size_zyx"])) + f" at {cut['spacing_mm']:g} mm"


def run_suite(suite: Suite) -> tuple[dict[str, TaskResult], Ranking]:
    """Embed, evaluate, rank; write `results.json` with the rows of all tasks, the ranking and what is missing.

    A model that cannot embed the lesions of a task is missing there, with the reason; the others go on.

    Raises:
        EvaluationError: a task's tables are missing, or it cannot be asked of them.
    """
    lesions = {name: _write_lesions(suite, task) for name, task in suite.tasks.items()}
    jobs = {
        _features_file(suite, model, name, lesions[name]): _Embedding(suite, model, name, lesions[name])
        for name in suite.tasks
        for model in suite.models
    }
    failures = {}
    for job, reason in run_jobs(_embed, list(jobs.values()), suite.num_workers, lambda _: KILLED):
        failures[_features_file(*job)] = reason
        logger.info("%d of %d: %s, %s%s", len(failures), len(jobs), job.model, job.table.stem, reason and f": {reason}")
    population = sorted({name for key, task in suite.tasks.items() for name in _patients(task, lesions[key])})
    to_evaluate = []
    for name in suite.tasks:
        files = {model: _features_file(suite, model, name, lesions[name]) for model in suite.models}
        reasons = {model: failures[file] for model, file in files.items() if failures[file]}
        to_evaluate.append(_Evaluation(suite, name, lesions[name], population, reasons))
    found = {}
    for evaluated, result in run_jobs(_evaluate, to_evaluate, suite.num_workers, _given_up):
        found[evaluated.task] = result
        logger.info("%d of %d: %s is evaluated", len(found), len(to_evaluate), evaluated.task)
    results = {name: found[name] for name in suite.tasks}
    counted = {name: one for name, one in results.items() if one.drawn and not one.refused}
    ranking = rank_models(
        {name: one.drawn for name, one in counted.items()}, {name: one.retraining for name, one in counted.items()}
    )
    write_json(
        suite.output / "results.json",
        {
            "rows": [row for one in results.values() for row in one.rows],
            "ranking": {**vars(ranking), "verdict": ranking.verdict},
            "tasks": {name: {k: v for k, v in vars(one).items() if k not in ("rows", "drawn")}
                      for name, one in results.items()},
            "models": suite.models,
        },
    )  # fmt: skip
    return results, ranking


def _write_lesions(suite: Suite, task: Task) -> Path:
    """The task's lesions as a table to embed; tasks with the same lesions have the same one."""
    text = read_task(task, suite.tables).to_csv(index=False)
    file = suite.output / "lesions" / f"{safe_name(task.images or task.importer)}-{digest_of(text)[:8]}.csv"
    if not file.is_file():
        write_atomically(file, text)
    return file


def _patients(task: Task, lesions: Path) -> Iterable[str]:
    return _in_population(lesions, pd.read_csv(lesions, dtype=str)[task.group].dropna()) if task.group else ()


def _in_population(lesions: Path, patients: Iterable[str]) -> list[str]:
    """Names that no patient of another table has."""
    return [f"{lesions.stem} {name}" for name in patients]


class _Embedding(NamedTuple):
    suite: Suite
    model: str
    task: str
    table: Path


def _cut(about: Mapping[str, Any], task: Task) -> str:
    """How the model's patches are cut; what has no preprocessing of its own takes the task's."""
    return str(digest_of(about.get("preprocessing") or Preprocessing(**task.patch).to_dict()))


def _features_file(suite: Suite, model: str, task: str, table: Path) -> Path:
    about = suite.models[model]
    digest = digest_of(about, _cut(about, suite.tasks[task]))[:8]
    return suite.output / "features" / table.stem / f"{safe_name(model)}-{digest}.parquet"


def _embed(job: _Embedding) -> str:
    """Embed the lesions, under the conditions too; why that failed, or nothing."""
    suite, task = job.suite, job.suite.tasks[job.task]
    about = dict(suite.models[job.model])
    about["preprocessing"] = about.get("preprocessing") or Preprocessing(**task.patch).to_dict()
    places = {
        "annotations": job.table, "image_root": suite.images / task.images, "stores": suite.output / "stores"
    }  # fmt: skip
    source = {"kind": "scans", **{key: str(place.absolute()) for key, place in places.items()}}
    file = _features_file(suite, job.model, job.task, job.table)
    try:
        encoder = rebuilt_encoder(about, suite.trusted_targets)
        embed_to_file(encoder, source, file, Inference(device=suite.device), progress=False)
        if suite.robustness and about["kind"] != "raw_voxels":
            _conditions(suite, file)
    except (OSError, ValueError, RuntimeError, AnnotationsError) as error:
        return str(error)
    return ""


def _conditions(suite: Suite, file: Path) -> dict[str, list[FeatureTable]]:
    options: dict[str, Any] = {"device": suite.device, "trusted_targets": suite.trusted_targets}
    return embed_conditions([file], conditions=[CLEAN, *CONDITIONS_SHOWN], **options)


class _Evaluation(NamedTuple):
    suite: Suite
    task: str
    table: Path
    population: Sequence[str]
    failures: Mapping[str, str]


def _given_up(job: _Evaluation) -> TaskResult:
    return TaskResult(missing=[{"features": "all models", "reason": KILLED}])


def _evaluate(job: _Evaluation) -> TaskResult:
    """Evaluate a task, or read what was found before from the same features and settings."""
    suite, task = job.suite, job.suite.tasks[job.task]
    folder = suite.output / "tasks" / safe_name(job.task)
    able = [model for model in suite.models if model not in job.failures]
    files = {model: _features_file(suite, model, job.task, job.table) for model in able}
    further = [suite.tables / task.labels] if task.labels else []
    settings = (suite.robustness, suite.num_bootstrap, suite.seed)
    request = digest_of(task.model_dump(), checksum_of([job.table, *further, *files.values()]), list(files),
                        list(job.failures.items()), job.population, settings)  # fmt: skip
    result_file, drawn_file = folder / "results.json", folder / "resamples.parquet"
    if result_file.is_file() and drawn_file.is_file():
        values = read_json(result_file)
        if values.pop("request") == request:
            drawn = pd.read_parquet(drawn_file)
            return TaskResult(**values, drawn={str(name): drawn[name].to_numpy() for name in drawn})
    try:
        result = _evaluated(job, {model: FeatureTable.read(file) for model, file in files.items()}, files)
    except ValueError as error:  # of this task, and no reason to lose the others overnight
        result = TaskResult(missing=[{"features": "all models", "reason": str(error)}])
    result.missing.extend({"features": name, "reason": reason} for name, reason in job.failures.items())
    with atomic_write(drawn_file) as file:
        pd.DataFrame(result.drawn).to_parquet(file)
    write_json(result_file, {"request": request, **{k: v for k, v in vars(result).items() if k != "drawn"}})
    return result


def _evaluated(job: _Evaluation, tables: Mapping[str, FeatureTable], files: Mapping[str, Path]) -> TaskResult:
    suite, task = job.suite, job.suite.tasks[job.task]
    if not tables or (lesions := shared_lesions(tables.values())).empty:
        return TaskResult(notes=["no lesion has features"])
    protocol, lesions, notes = protocol_of(task, join_further_labels(task, lesions, suite.tables), seed=suite.seed)
    protocol = replace(
        protocol, patients=np.array(_in_population(job.table, protocol.patients)), population=job.population
    )
    candidates = gather(tables, lesions, task.size)
    findings = find_leakage(protocol, lesions, candidates)
    if (apart := without_shared_patients(protocol)) is not None:
        protocol, notes = apart, [*notes, "tested patients are left out of training and of the choice of a setting"]
    accepted = {"patients", *task.allow_leakage}  # of patients the split is rid
    leakage = [vars(one) | {"refused": one.found and one.refuses and one.check not in accepted} for one in findings]
    if task.patients is not None:
        protocol, lesions, candidates = by_patient(protocol, lesions, candidates, task.patients)
        notes.append(f"{len(lesions)} patients, whose lesions are pooled: {task.patients}")
    kind = protocol.labels.kind
    metric = next(iter(METRICS[kind]))
    linear = LINEAR_PROBE[kind] if task.patients != "attention" else "attention"
    probes = [linear, *(["knn"] if kind in PROBES["knn"].kinds and task.patients != "attention" else [])]
    evaluation = evaluate_features(
        [protocol], lesions, candidates, probes=probes,
        num_bootstrap=suite.num_bootstrap, progress=False,
    )  # fmt: skip
    about = {"task": job.task}
    drawn, rows = _linear_scores(evaluation, protocol, {linear, LINEAR_PROBE[kind]}, _thirds(candidates.inputs), suite)
    rows = [{"model": _model(row["features"]), **row, **about} for row in (*evaluation.rows, *rows)]
    if suite.robustness and task.patients is None:
        rows += _robustness_rows(suite, files, protocol, lesions, about | {"probe": linear})
    keys = ("model", "task", "probe", "metric", "value", "low", "high")
    return TaskResult(
        rows=[{key: row[key] for key in keys} for row in rows],
        differences=[
            {**row, "against": _model(row["against"])} for row in evaluation.differences if row["metric"] == metric
        ],
        leakage=leakage,
        notes=[*notes, *_of_readers(evaluation.readers, metric)],
        missing=evaluation.missing,
        metric=metric,
        retraining=retraining_share(protocol.splits),
        drawn=drawn,
    )


def _linear_scores(
    evaluation: Evaluation, protocol: Protocol, probes: Collection[str], thirds: Array | None, suite: Suite
) -> tuple[dict[str, Array], list[dict[str, Any]]]:
    """Scores of every resample by model, and a row each within thirds of the size; not of features beside the size."""
    weights, labels = protocol.weights(suite.num_bootstrap), protocol.labels
    metric, function = next(iter(METRICS[labels.kind].items()))
    drawn, rows = {}, []
    for (_, features, probe, _), scores in evaluation.scores.items():
        if probe not in probes or features.endswith(" + size"):
            continue
        drawn[_model(features)] = chance_corrected(metric, resampled(function, labels.values, scores, weights))
        if thirds is None:
            continue
        values = resampled(function, labels.values, within(scores, thirds), weights)
        if np.isfinite(values[0]):
            about = {"features": features, "probe": probe, "metric": f"{metric}, {WITHIN_SIZES}"}
            rows.append(about | vars(interval(values)))
    return drawn, rows


def _model(features: str) -> str:
    """Of the size without its columns, which differ from task to task."""
    return SIZE if features.startswith("size (") else features


def _thirds(inputs: Sequence[Inputs]) -> Array | None:
    """The third of the lesions by size that each is in, `(n,)`; None where there is no size for all."""
    size = next((one.x[:, 0] for one in inputs if one.linear_only), None)
    return None if size is None else np.searchsorted(np.quantile(size, [1 / 3, 2 / 3]), size)


def _robustness_rows(
    suite: Suite, files: Mapping[str, Path], protocol: Protocol, lesions: pd.DataFrame, about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    features = {}
    for model, file in files.items():
        if suite.models[model]["kind"] != "raw_voxels":
            tables = _conditions(suite, file)
            features[model] = {
                condition: [table.aligned(lesions[ID_COLUMN]).features for table in draws]
                for condition, draws in tables.items()
            }
    metric = next(iter(METRICS[protocol.labels.kind]))
    measured = measure_robustness(features, protocol, num_bootstrap=suite.num_bootstrap)
    return [
        {"model": row["features"], **about, **row, "metric": f"{metric}, {CONDITIONS_SHOWN[row['condition']]}"}
        for row in measured.rows
        if row["metric"] == metric and row["condition"] in CONDITIONS_SHOWN
    ]


def _of_readers(readers: Mapping[str, Any], metric: str) -> list[str]:
    """What one reader and infinitely many reach, in words."""
    notes = [
        f"{row['features']} against the others: {metric} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        for row in readers.get("rows", ())
        if row["metric"] == metric and row["probe"] == "-"
    ]
    ceiling = readers.get("ceiling", {}).get(metric)
    return notes + ([f"ceiling by the readers' agreement: {metric} {ceiling:.3f}"] if ceiling is not None else [])
