"""The page of a suite: a ranking with its doubts, a table of all tasks, and what explains each task's figures."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

import fmcib_ssl
from fmcib_ssl.evaluation.figures import Palette
from fmcib_ssl.evaluation.metrics import Estimate
from fmcib_ssl.evaluation.ranking import Ranking
from fmcib_ssl.evaluation.report import write_report
from fmcib_ssl.evaluation.report_results import Section, interval_chart, safe_name
from fmcib_ssl.evaluation.suite import BASELINES, CONDITIONS_SHOWN, SIZE, WITHIN_SIZES, TaskResult
from fmcib_ssl.evaluation.tasks import Task

_HOW = (
    "Ranks and differences come from resamples of the patients, the same for all models and tasks. Score: 0 at chance, "
    "1 at best (2 AUC - 1, 2 C - 1, Spearman), of the linear probe, mean over tasks. Models with a letter in common "
    "cannot be told apart (two-sided, Holm's correction over all pairs, 5 %, other training sets included)."
)


def write_suite(results: Mapping[str, TaskResult], tasks: Mapping[str, Task], ranking: Ranking, page: Path) -> Path:
    """Write the page, and its pictures beside it.

    Args:
        results: by task.
        tasks: likewise.
        ranking: over the tasks that count.
        page: NAME.html.
    """
    palette, pictures = Palette(), page.with_name(f"{page.stem}_pictures")
    sections = [_ranking(ranking, results, palette, pictures), _overview(results)]
    for name, result in results.items():
        sections.append(_task(tasks[name], result, palette, pictures / safe_name(name)))
    subtitle = f"fmcib_ssl {fmcib_ssl.__version__}, {datetime.now():%Y-%m-%d %H:%M}"
    return write_report(page, "Models on the same lesions", sections, subtitle)


def _ranking(ranking: Ranking, results: Mapping[str, TaskResult], palette: Palette, pictures: Path) -> Section:
    rows = pd.DataFrame(ranking.rows)
    left_out = [
        f"{name} does not count: {', '.join(one.refused) or 'no model has a value'}"
        for name, one in results.items()
        if name not in ranking.tasks
    ]
    ranked = set(rows["model"]) if len(rows) else set()
    unranked = sorted({model for one in results.values() for model in one.drawn} - ranked)
    if ranked and unranked:
        left_out.append(f"Not ranked, since without a value on one of the tasks: {', '.join(unranked)}")
    text = "\n\n".join([ranking.verdict, *left_out, *([_HOW] if ranked else [])])
    if not ranked:
        return Section("Ranking", text)
    table = pd.DataFrame({
        "model": rows["model"],
        f"score, {len(ranking.tasks)} tasks": rows["score"],
        "mean rank": [f"{Estimate(*row):.1f}" for row in rows[["rank", "low", "high"]].itertuples(index=False)],
        "cannot be told apart": rows["group"],
    })  # fmt: skip
    own = rows.rename(columns={"rank": "value"}).assign(features=rows["model"], name=rows["model"])
    figure = interval_chart({"Mean rank over tasks, 1 is best": own}, pictures / "ranking", palette, "mean rank")
    return Section("Ranking", text, table, [figure])


def _overview(results: Mapping[str, TaskResult]) -> Section:
    """A line a model, a column a task: the linear probe's first metric."""
    columns = {}
    for name, result in results.items():
        title = f"{name}, {result.metric}" + (" (refused)" if result.refused else "")
        columns[title] = {row["model"]: _text(row) for row in _linear(result)}
    return Section("All tasks", "Linear probe; 95 % intervals, bootstrap over patients.", _filled(columns))


def _task(task: Task, result: TaskResult, palette: Palette, stem: Path) -> Section:
    linear = _linear(result)
    fired = [f"{one['check']}: {one['message']}" for one in result.leakage if one["found"]]
    speaks_against = (
        f"Leakage, so that the figures are optimistic: {', '.join(result.refused)}." if result.refused else ""
    )
    published = [f"Published: {one['method']}: {one['metric']} {one['value']:.3f}." for one in task.published]
    reasons = [f"Not computed: {one['features']}: {one['reason']}" for one in result.missing]
    text = "\n\n".join(filter(None, [speaks_against, task.note, *result.notes, *published, *fired, *reasons]))
    if not linear:
        return Section(task.title, text)
    columns: dict[str, dict[str, str]] = {
        f"{result.metric}, {linear[0]['probe']}": {r["model"]: _text(r) for r in linear}
    }
    for row in result.rows:
        if row["metric"] == result.metric and row["probe"] != linear[0]["probe"]:
            columns.setdefault(f"{result.metric}, {row['probe']}", {})[row["model"]] = _text(row)
    ahead = [row for row in result.differences if row["probe"] == linear[0]["probe"]]
    rivals = [name for name in dict.fromkeys(row["against"] for row in ahead) if _is_rival(name)]
    for rival in rivals:
        own = [row for row in ahead if row["against"] == rival]
        columns[f"ahead of {rival}"] = {row["features"]: _text(row, "+") for row in own}
    for what in (WITHIN_SIZES, *CONDITIONS_SHOWN.values()):
        if own := [row for row in result.rows if row["metric"] == f"{result.metric}, {what}"]:
            columns[what] = {row["model"]: _text(row) for row in own}
    frame = pd.DataFrame(linear).assign(features=[r["model"] for r in linear], name=[r["model"] for r in linear])
    figures = [interval_chart({f"{result.metric}, {linear[0]['probe']}": frame}, stem, palette, result.metric)]
    drawn = pd.DataFrame([row for row in ahead if row["against"] in rivals and row["value"] is not None])
    if len(drawn):
        drawn["name"] = drawn["features"] + " minus " + drawn["against"]
        title = f"Difference in {result.metric}"
        figures.append(interval_chart({title: drawn}, stem, palette, result.metric, differences=True))
    return Section(task.title, text, _filled(columns), figures)


def _is_rival(name: str) -> bool:
    """What needs no training: the size and hand-made statistics."""
    return name == SIZE or name.startswith(BASELINES["hu_statistics"])


def _linear(result: TaskResult) -> list[dict[str, Any]]:
    """Rows of the linear probe's first metric, the best first."""
    rows = [row for row in result.rows if row["metric"] == result.metric and row["value"] is not None]
    rows = [row for row in rows if row["probe"] == rows[0]["probe"]]
    return sorted(rows, key=lambda row: -row["value"])


def _text(row: Mapping[str, Any], sign: str = "") -> str:
    if row["value"] is None:
        return "-"
    return f"{Estimate(row['value'], row['low'], row['high']):{sign}.2f}"


def _filled(columns: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """A line for every model of any column."""
    models = list(dict.fromkeys(model for column in columns.values() for model in column))
    return pd.DataFrame({"model": models, **{k: [one.get(m, "-") for m in models] for k, one in columns.items()}})
