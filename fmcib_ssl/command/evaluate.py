"""What frozen features know: probes with intervals beside their baselines, after checks for leakage.

`fmcib-ssl evaluate --help` shows what can be set; docs/evaluate.md says more.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command, config_dir, write_json

if TYPE_CHECKING:
    from fmcib_ssl.evaluation import Evaluation, FeatureTable

Probe = Literal["logistic", "knn", "ridge", "cox"]
Share = Annotated[float, Field(gt=0, le=1)]
#: Other names that keys may be given by.
OTHER_NAMES = {"out": "output", "groups": "group", "seeds": "repeats"}


class Labelled(Command):
    """What is predicted of which lesions, and who is trained on and tested."""

    features: list[Path] = Field(
        min_length=1,
        description="tables that `embed` wrote, comma-separated; a.parquet+b.parquet: side by side",
    )
    output: Path = Field(description="folder for the results")
    label: str | None = Field(None, description="column to predict")
    task: str = Field("binary", description="binary, multiclass, ordinal, continuous, survival; or of configs/task")
    threshold: str | None = Field(None, description="binary: what is 1, such as '<5' or '>=3'")
    readers: Literal["mean", "share", "majority", "unanimous"] | None = Field(
        None, description="label was rated by several, in columns LABEL_1, LABEL_2, ...: what is made of their ratings"
    )
    time: str | None = Field(None, description="survival: column with the time to the event or last contact")
    event: str | None = Field(None, description="survival: column that is 1 where the event was seen")
    labels: Path | None = Field(None, description="CSV or Parquet with further columns, joined to the features")
    labels_on: str = Field("lesion_id", description="column to join labels by, or OURS:THEIRS")
    tables: Path | None = Field(None, description="published tasks: folder with deeplesion/, luna16/, lung1/")
    folds: PositiveInt = Field(5, description="folds of patients, unless split= or the task has one")
    split: str | None = Field(None, description="column with train, test and perhaps val, instead of folds")
    repeats: PositiveInt = Field(1, description="times that the folds are drawn anew")
    group: str | None = Field("PatientID", description="column of the patient; null: each lesion is its own")
    num_bootstrap: PositiveInt = Field(2000, description="resamples of the patients for the intervals")
    seed: NonNegativeInt = Field(0, description="of folds, shares of the labels, resamples and random weights")
    device: str | None = Field(None, description="for encoders that are run; null: a GPU if there is one")

    def feature_files(self) -> dict[str, list[Path]]:
        """Files by the name of their features; several under one name stand side by side."""
        files = [[path] if path.exists() else [Path(part) for part in str(path).split("+")] for path in self.features]
        stems = [" + ".join(part.stem for part in parts) for parts in files]
        names = zip(self.features, stems, strict=True)
        return dict(zip((s if stems.count(s) == 1 else str(path) for path, s in names), files, strict=True))


class Evaluate(Labelled):
    """Probe frozen features of lesions, beside random weights, raw voxels and the lesion's size.

    fmcib-ssl evaluate features=features.parquet label=texture threshold='<5' output=results
    fmcib-ssl evaluate features=features.parquet label=texture readers=majority threshold='<5' output=results
    fmcib-ssl evaluate features=a.parquet,b.parquet task=survival time=days event=died output=results
    fmcib-ssl evaluate features=features.parquet task=luna16_malignancy tables=/data/annotations output=results

    Written are results.json and predictions.parquet. out= is another name of output=, groups= of group=.
    """

    probe: list[Probe] | None = Field(None, description="logistic, knn, ridge, cox; null: the linear one of the label")
    patients: Literal["mean", "max", "attention"] | None = Field(
        None, description="label of patients: pool the features of a patient's lesions, or let the probe learn weights"
    )
    fractions: list[Share] = Field([1.0], description="shares of the training patients, such as 1,0.5,0.2,0.1")
    size: list[str] | None = Field(["diameter_mm"], description="columns with the lesion's size, a baseline of its own")
    baselines: bool = Field(True, description="false: no random weights, no raw voxels")
    allow_leakage: list[Literal["patients", "duplicates", "padding"]] = Field([], description="leakage to accept")


def run(command: Evaluate) -> None:
    """Read, check for leakage, evaluate, write."""
    from fmcib_ssl.evaluation import (  # noqa: PLC0415
        LINEAR_PROBE,
        FeatureTable,
        evaluate_features,
        find_leakage,
        gather,
        without_shared_patients,
    )
    from fmcib_ssl.training import environment  # noqa: PLC0415

    tables = {
        name: FeatureTable.side_by_side([FeatureTable.read(file) for file in files])
        for name, files in command.feature_files().items()
    }
    protocol, lesions, published, notes = read_protocol(command, tables)
    print(*(f"note      {note}" for note in notes), sep="\n")
    make = None
    if command.baselines:
        from fmcib_ssl.evaluation import baseline_tables  # noqa: PLC0415  # torch and MONAI take seconds

        make = partial(baseline_tables, seed=command.seed, device=command.device)
    candidates = gather(tables, lesions, command.size or [], make)
    allowed = {*command.allow_leakage, *(published.allow_leakage if published else ())}
    findings = find_leakage(protocol, lesions, candidates)
    for finding in findings:
        verdict = ("refused" if finding.refuses else "warning") if finding.found else "ok"
        verdict = "allowed" if finding.found and finding.check in allowed else verdict
        print(f"leakage   {finding.check}: {verdict}: {finding.message}")
    if refused := {one.check: None for one in findings if one.found and one.refuses and one.check not in allowed}:
        raise ValueError(
            f"data leakage: results would be optimistic. Fix the split, or accept it with "
            f"allow_leakage={','.join(refused)}"
        )
    apart = without_shared_patients(protocol)
    probes: list[str] = [*(command.probe or ())] or [LINEAR_PROBE[protocol.labels.kind]]
    protocols = [protocol, *([apart] if apart else [])]
    if command.patients is not None:
        from fmcib_ssl.evaluation import by_patient  # noqa: PLC0415

        pooled, lesions, candidates = by_patient(protocols[-1], lesions, candidates, command.patients)
        protocols, probes = [pooled], ["attention"] if command.patients == "attention" else probes
        print(f"note      {len(lesions)} patients, whose lesions are pooled: {command.patients}")
    result = evaluate_features(
        protocols,
        lesions,
        candidates,
        probes=probes,
        fractions=command.fractions,
        num_bootstrap=command.num_bootstrap,
    )
    command.output.mkdir(parents=True, exist_ok=True)
    result.predictions.to_parquet(command.output / "predictions.parquet", index=False)
    labels = protocol.labels
    values: dict[str, Any] = result.plain() | {
        "leakage": [vars(finding) for finding in findings],
        "published": published.published if published else [],
        "notes": notes,
        "label": {"name": labels.name, "kind": labels.kind, "classes": list(labels.classes)},
        "provenance": {
            "arguments": json.loads(command.model_dump_json()),
            "features": {name: table.provenance for name, table in tables.items()},
            **environment(),
        },
    }
    write_json(command.output / "results.json", values)
    show(result)
    for figure in published.published if published else ():
        print(f"published {figure['method']}: {figure['metric']} {figure['value']:.3f}")
    print(f"\nresults   {command.output / 'results.json'}\nscores    {command.output / 'predictions.parquet'}")


def read_protocol(command: Labelled, tables: dict[str, FeatureTable]) -> tuple[Any, ...]:
    """Who is labelled how, trained on and tested; the rows of the lesions, the published task, and notes on them."""
    from fmcib_ssl.evaluation import Kind, Task, join_labels, join_task, load_task, protocol_of, shared_lesions  # noqa: PLC0415

    lesions = shared_lesions(tables.values())
    notes, published = [], None
    if lost := max(map(len, tables.values())) - len(lesions):
        notes.append(f"{lost} lesions are not in every table of features and are skipped")
    options: dict[str, Any] = {key: getattr(command, key) for key in ("threshold", "readers", "folds")}
    if command.task in get_args(Kind):
        names = ("label", "time", "event", "split", "group")
        task = Task(title="", kind=command.task, **{key: getattr(command, key) for key in names}, **options)  # type: ignore[arg-type]
    else:
        published = load_task(command.task, config_dir() / "task")
        if command.tables is None:
            raise ValueError(f"task={command.task} needs tables=, the folder with the published tables")
        lesions, more = join_task(published, lesions, command.tables)
        notes += more
        task = published.model_copy(update={key: value for key, value in options.items() if value is not None})
    if command.labels is not None:
        lesions, absent = join_labels(lesions, command.labels, command.labels_on)
        notes += [f"{absent} lesions are not in {command.labels}"] if absent else []
    protocol, lesions, more = protocol_of(task, lesions, seed=command.seed, num_repeats=command.repeats)
    return protocol, lesions, published, notes + more


def show(result: Evaluation) -> None:
    """Print the tables: what was reached, and who is ahead of whom."""
    import pandas as pd  # noqa: PLC0415

    from fmcib_ssl.evaluation import Estimate, results_lines, results_table  # noqa: PLC0415

    rows, differences = pd.DataFrame(result.rows), pd.DataFrame(result.differences)
    for table in (rows, differences):
        if len(table):
            table["labels"] = [f"{fraction:.0%}" for fraction in table["fraction"]]
    names = ["features", "probe", "labels", *(["split"] if len(rows) and rows["split"].nunique() > 1 else [])]
    if len(rows):
        print(f"\n{results_table(results_lines(rows, names, digits=3))}")
    if len(differences):
        first = differences[(differences["metric"] == rows["metric"].iloc[0]) & differences["value"].notna()]
        numbers = first[["value", "low", "high"]].itertuples(index=False)
        by = [f"{Estimate(*row):+.3f} {metric}" for row, metric in zip(numbers, first["metric"], strict=True)]
        ahead = first.assign(by=by).rename(columns={"against": "ahead of"})
        print(f"\n{results_table(ahead[[*names[:1], 'ahead of', *names[1:3], 'by', *names[3:]]])}")
    if readers := result.readers:
        table = pd.DataFrame(readers["rows"])
        if len(table):
            print("\nagainst the other readers, where one is drawn for each lesion")
            print(results_table(results_lines(table, ["features", "probe"], digits=3)))
        for row in readers["differences"]:
            if row["metric"] == table["metric"].iloc[0]:
                lead = Estimate(row["value"], row["low"], row["high"])
                print(
                    f"readers   {row['features']}, {row['probe']}: ahead of one reader by {lead:+.3f} {row['metric']}"
                )
        for what in ("ceiling", "reliability"):
            print(f"readers   {what}: " + ", ".join(f"{name} {value:.3f}" for name, value in readers[what].items()))
    for curve in result.survival:
        p = "-" if curve["log_rank_p"] is None else f"{curve['log_rank_p']:.2g}"
        print(f"log-rank  {curve['features']}, {curve['fraction']:.0%}: p = {p} between the halves by risk")
    for lacking in result.missing:
        print(f"missing   {lacking['features']}: {lacking['reason']}")


main = partial(run_command, Evaluate, run, other_names=OTHER_NAMES)
