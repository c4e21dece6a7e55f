"""What frozen features know: probes with intervals beside their baselines, after checks for leakage.

`python scripts/evaluate.py --help` shows what can be set; docs/evaluate.md says more.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from fmcib_ssl.io import Command, parse_command

if TYPE_CHECKING:
    import pandas as pd

    from fmcib_ssl.evaluation.evaluate import Evaluation
    from fmcib_ssl.evaluation.feature_table import FeatureTable
    from fmcib_ssl.evaluation.leakage import Finding
    from fmcib_ssl.evaluation.probes import Protocol
    from fmcib_ssl.evaluation.tasks import PublishedTask

TASKS = Path(__file__).resolve().parent / "tasks"
#: Other spellings that are taken.
ALIASES = {"out": "output", "groups": "group", "seeds": "repeats"}


class Evaluate(Command):
    """Probe frozen features of lesions, beside random weights, raw voxels and the lesion's size.

    python scripts/evaluate.py features=features.parquet label=texture threshold='<5' output=results
    python scripts/evaluate.py features=a.parquet,b.parquet task=survival time=days event=died output=results
    python scripts/evaluate.py features=features.parquet task=luna16_malignancy tables=/data/annotations output=results

    out= is another name of output=, groups= of group=.
    """

    features: str = Field(description="tables that scripts/embed.py wrote, commas between them")
    output: Path = Field(description="folder for results.json and predictions.parquet")
    label: str | None = Field(default=None, description="column to predict")
    task: str = Field(
        default="binary", description="binary, multiclass, ordinal, continuous, survival; or a task of scripts/tasks"
    )
    threshold: str | None = Field(default=None, description="binary: what is 1, such as '<5' or '>=3'")
    time: str | None = Field(default=None, description="survival: column with the time to the event or last contact")
    event: str | None = Field(default=None, description="survival: column that is 1 where the event was seen")
    labels: Path | None = Field(default=None, description="CSV or Parquet with further columns, joined to the features")
    labels_on: str = Field(default="lesion_id", description="column to join labels by, or OURS:THEIRS")
    tables: Path | None = Field(default=None, description="published tasks: folder with deeplesion/, luna16/, lung1/")
    folds: PositiveInt = Field(default=5, description="folds of patients, unless split= or the task has one")
    split: str | None = Field(default=None, description="column with train, test and perhaps val, instead of folds")
    repeats: PositiveInt = Field(default=1, description="times that the folds are drawn anew")
    group: str | None = Field(default="PatientID", description="column of the patient; null: each lesion is its own")
    probe: str | None = Field(default=None, description="logistic, knn, ridge, cox; null: the linear one of the label")
    fractions: str = Field(default="1", description="shares of the training patients, such as 1,0.5,0.2,0.1")
    size: str | None = Field(default="diameter_mm", description="columns with the lesion's size, a baseline of its own")
    extent: str | None = Field(default=None, description="columns with the extent of crops; null: those named like one")
    baselines: bool = Field(default=True, description="false: no random weights, no raw voxels")
    allow_leakage: str | None = Field(default=None, description="checks that may fire: patients, duplicates, padding")
    num_bootstrap: PositiveInt = Field(default=2000, description="resamples of the patients for the intervals")
    seed: NonNegativeInt = Field(default=0, description="of folds, shares of the labels, resamples and random weights")
    device: str | None = Field(default=None, description="for random weights; null: a GPU if there is one")


def main(arguments: list[str]) -> None:
    """Evaluate, write, print."""
    renamed = [ALIASES.get(key, key) + sign + value for key, sign, value in (a.partition("=") for a in arguments)]
    command = parse_command(Evaluate, renamed)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from fmcib_ssl.evaluation.labels import EvaluationError  # noqa: PLC0415  # the help is quick

    try:
        run(command)
    except (EvaluationError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def run(command: Evaluate) -> None:
    """Read, check for leakage, evaluate, write."""
    from fmcib_ssl.evaluation.evaluate import evaluate, find_leakage, gather, without_shared_patients  # noqa: PLC0415
    from fmcib_ssl.evaluation.leakage import REFUSING, refused  # noqa: PLC0415
    from fmcib_ssl.evaluation.probes import LINEAR_PROBE  # noqa: PLC0415

    allowed = set(_names(command.allow_leakage))
    if unknown := allowed - set(REFUSING):
        raise ValueError(f"allow_leakage={', '.join(sorted(unknown))}: the checks are {', '.join(REFUSING)}")
    tables = _read(_names(command.features))
    protocol, lesions, published, notes = _protocol(command, tables)
    _say(notes)
    make = None
    if command.baselines:
        from fmcib_ssl.evaluation.embedding import baseline_tables  # noqa: PLC0415

        def make(table: FeatureTable) -> dict[str, FeatureTable]:
            return baseline_tables(table, seed=command.seed, device=command.device)

    candidates = gather(tables, lesions, _names(command.size), make)
    findings = find_leakage(protocol, lesions, candidates, _names(command.extent) or None)
    for finding in findings:
        mark = ("refused" if finding.refuses else "warning") if finding.found else "ok"
        allowed_here = finding.found and finding.check in allowed | set(published.allow_leakage if published else ())
        print(f"leakage   {finding.check}: {'allowed' if allowed_here else mark}: {finding.message}")
    if found := refused(findings, allowed | set(published.allow_leakage if published else ())):
        names = ",".join(dict.fromkeys(finding.check for finding in found))
        raise ValueError(
            f"data leakage: results would be optimistic. Fix the split, or accept it with allow_leakage={names}"
        )
    protocols = [protocol]
    if any(finding.check == "patients" and finding.found for finding in findings):
        protocols += [other for other in [without_shared_patients(protocol)] if other is not None]
    probes = _names(command.probe) or [LINEAR_PROBE[protocol.labels.kind]]
    fractions = [float(text) for text in _names(command.fractions)]
    result = evaluate(
        protocols, lesions, candidates, probes=probes, fractions=fractions, num_bootstrap=command.num_bootstrap
    )
    _write(command, result, findings=findings, published=published, notes=notes, tables=tables, protocol=protocol)
    _print(result, published)
    print(f"\nresults   {command.output / 'results.json'}\nscores    {command.output / 'predictions.parquet'}")


def _protocol(
    command: Evaluate, tables: dict[str, FeatureTable]
) -> tuple[Protocol, pd.DataFrame, PublishedTask | None, list[str]]:
    """Who is labelled how, trained on and tested: the rows of the lesions, and what to know about them."""
    import numpy as np  # noqa: PLC0415

    from fmcib_ssl.evaluation.labels import (  # noqa: PLC0415
        column_text,
        cross_validation,
        given_split,
        join_labels,
        read_labels,
    )
    from fmcib_ssl.evaluation.metrics import Kind  # noqa: PLC0415
    from fmcib_ssl.evaluation.probes import Protocol  # noqa: PLC0415
    from fmcib_ssl.evaluation.tasks import join_task, load_task  # noqa: PLC0415

    first, *others = tables.values()
    shared = set.intersection(*(set(table.lesions["lesion_id"]) for table in tables.values()))
    lesions = first.lesions[first.lesions["lesion_id"].isin(shared)].reset_index(drop=True)
    notes = []
    if lost := max(len(table) for table in (first, *others)) - len(lesions):
        notes.append(f"{lost} lesions are not in every table of features and are left out")
    published = None
    kind, label, time, event = command.task, command.label, command.time, command.event
    split, group = command.split, command.group
    if kind not in get_args(Kind):
        published = load_task(kind, TASKS)
        if command.tables is None:
            raise ValueError(f"task={kind} needs tables=, the folder with the published tables")
        lesions, more = join_task(published, lesions, command.tables)
        notes += more
        kind, label, time, event = published.kind, published.label, published.time, published.event
        split, group = ("split" if published.has_split else None), published.group
    if command.labels is not None:
        lesions, absent = join_labels(lesions, command.labels, command.labels_on)
        notes += [f"{absent} lesions are not in {command.labels}"] if absent else []
    labels = read_labels(lesions, kind, label=label, threshold=command.threshold, time=time, event=event)  # type: ignore[arg-type]
    if lost := len(lesions) - len(labels.rows):
        notes.append(f"{lost} of {len(lesions)} lesions have no label and are left out")
    lesions = lesions.iloc[labels.rows].reset_index(drop=True)
    patients = lesions["lesion_id"].to_numpy(str) if group is None else column_text(lesions, group, "group")
    if split is not None:
        splits = [given_split(column_text(lesions, split, "split"))]
        name = "as published" if published else f"column {split}"
    else:
        splits = cross_validation(
            labels.kind, labels.values, patients,
            num_folds=command.folds, seed=command.seed, num_repeats=command.repeats,
        )  # fmt: skip
        times = f", {command.repeats} times" if command.repeats > 1 else ""
        name = f"{command.folds} folds by {group or 'lesion'}{times}"
    notes.append(f"{len(lesions)} lesions of {len(np.unique(patients))} patients, {labels.name}, {name}")
    return Protocol(labels, patients, splits, name, command.seed), lesions, published, notes


def _read(paths: list[str]) -> dict[str, FeatureTable]:
    """The tables by the names of their files, as far as these differ."""
    from fmcib_ssl.evaluation.feature_table import FeatureTable  # noqa: PLC0415

    if not paths:
        raise ValueError("features= names at least one table")
    stems = [Path(path).stem for path in paths]
    return {
        stem if stems.count(stem) == 1 else path: FeatureTable.read(path)
        for stem, path in zip(stems, paths, strict=True)
    }


def _write(
    command: Evaluate,
    result: Evaluation,
    *,
    findings: list[Finding],
    published: PublishedTask | None,
    notes: list[str],
    tables: dict[str, FeatureTable],
    protocol: Protocol,
) -> None:
    from fmcib_ssl.io import write_json  # noqa: PLC0415
    from fmcib_ssl.training.provenance import environment  # noqa: PLC0415

    command.output.mkdir(parents=True, exist_ok=True)
    result.predictions.to_parquet(command.output / "predictions.parquet", index=False)
    values: dict[str, Any] = {
        "rows": result.rows,
        "differences": result.differences,
        "leakage": [vars(finding) for finding in findings],
        "missing": result.missing,
        "survival": result.survival,
        "published": [figure.model_dump() for figure in published.published] if published else [],
        "notes": notes,
        "label": {"name": protocol.labels.name, "kind": protocol.labels.kind, "classes": list(protocol.labels.classes)},
        "provenance": {
            "arguments": json.loads(command.model_dump_json()),
            "features": {name: table.provenance for name, table in tables.items()},
            **environment(),
        },
    }
    write_json(values, command.output / "results.json")


def _print(result: Evaluation, published: PublishedTask | None) -> None:
    from fmcib_ssl.evaluation.report import results_table  # noqa: PLC0415

    metrics = list(dict.fromkeys(row["metric"] for row in result.rows))
    lines: dict[tuple[Any, ...], dict[str, object]] = {}
    for row in result.rows:
        key = (row["split"], row["features"], row["probe"], row["fraction"])
        empty = {"features": key[1], "probe": key[2], "labels": f"{key[3]:.0%}", "split": key[0]}
        lines.setdefault(key, {**empty, **dict.fromkeys(metrics, "-")})[row["metric"]] = _interval(row)
    if len({key[0] for key in lines}) == 1:
        for line in lines.values():
            del line["split"]
    table = list(lines.values())
    if table:
        print(f"\n{results_table(table)}")
    ahead = [
        {
            "features": row["features"], "ahead of": row["against"], "probe": row["probe"],
            "labels": f"{row['fraction']:.0%}", "by": f"{_interval(row, '+')} {row['metric']}",
        }
        for row in result.differences
        if row["metric"] == metrics[0]
    ]  # fmt: skip
    if len({row["split"] for row in result.rows}) > 1:
        splits = (row["split"] for row in result.differences if row["metric"] == metrics[0])
        ahead = [{**line, "split": split} for line, split in zip(ahead, splits, strict=True)]
    if ahead:
        print(f"\n{results_table(ahead)}")
    for curve in result.survival:
        p = "-" if curve["log_rank_p"] is None else f"{curve['log_rank_p']:.2g}"
        print(f"log-rank  {curve['features']}, {curve['fraction']:.0%}: p = {p} between the halves by risk")
    for lacking in result.missing:
        print(f"missing   {lacking['features']}: {lacking['reason']}")
    for figure in published.published if published else ():
        print(f"published {figure.method}: {figure.metric} {figure.value:.3f}")


def _interval(row: dict[str, Any], sign: str = "") -> str:
    if row["value"] is None:
        return "-"
    return f"{row['value']:{sign}.3f} ({row['low']:{sign}.3f} to {row['high']:{sign}.3f})"


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _say(notes: list[str]) -> None:
    for note in notes:
        print(f"note      {note}")


if __name__ == "__main__":
    main(sys.argv[1:])
