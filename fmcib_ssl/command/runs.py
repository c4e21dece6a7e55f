"""Which runs there are, how far they came, and what two of them differ in.

`fmcib-ssl runs --help` shows what can be set.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command
from fmcib_ssl.training import RunFolderError, flat_settings, last_value, read_metrics, read_state, saved_settings

#: Columns of the list, and those of `metrics.csv` that they are the last value of.
_FIGURES = {"loss": "train/loss", "probe": "online/linear_auc"}


class Runs(Command):
    """List run folders, or compare two: the settings that differ, and their curves in one picture.

    fmcib-ssl runs
    fmcib-ssl runs compare=runs/pretrain/A,runs/pretrain/B output=curves.png

    A run is `finished`, or `not finished`: it trains, or the same command resumes it. `loss`, and `probe`, the AUC of
    the online probe where there is one, are the last that were logged.
    """

    folder: Path = Field(Path("runs"), description="folder below which runs are searched")
    compare: list[Path] | None = Field(None, description="two or more run folders, comma-separated")
    output: Path = Field(Path("runs.png"), description="with compare: picture of the curves; NAME.png")


def run(command: Runs) -> None:
    """Print the list, or the comparison."""
    from fmcib_ssl.evaluation import compare_curves, results_table  # noqa: PLC0415  (matplotlib, for a comparison alone)

    if command.compare is None:
        folders = sorted(file.parent for file in command.folder.rglob("run.json"))
        if not folders:
            raise ValueError(f"{command.folder} holds no run folder; give folder=DIR")
        print(results_table(pd.DataFrame([_line(folder, command.folder) for folder in folders])))
        return
    if len(command.compare) < 2:
        raise ValueError("compare= needs two run folders or more, with a comma between them")
    print(results_table(_differences(command.compare)))
    curves = {str(folder): folder / "metrics.csv" for folder in command.compare}
    print(f"\ncurves    {compare_curves(curves, command.output)}")


def _line(folder: Path, root: Path) -> dict[str, Any]:
    """What the files of a run say; a damaged one is named as such."""
    line: dict[str, Any] = {"run": folder.relative_to(root).as_posix(), "started": "", "state": "damaged"}
    try:
        state = read_state(folder)
    except RunFolderError:
        return {**line, "step": "", **dict.fromkeys(_FIGURES, ""), "encoder": ""}
    assert state is not None  # there is a run.json
    rows = read_metrics(folder / "metrics.csv")
    line["started"] = state["starts"][0]["time"][:16].replace("T", " ") if state["starts"] else ""
    line["state"] = "finished" if state["finished"] else "not finished"
    line["step"] = (state["finished"] or {}).get("step", int(rows[-1]["step"]) + 1 if rows else 0)
    for name, column in _FIGURES.items():
        line[name] = "" if (value := last_value(rows, column)) is None else value
    return {**line, "encoder": "yes" if (folder / "encoder.safetensors").is_file() else "no"}


def _differences(folders: list[Path]) -> pd.DataFrame:
    """A row for each setting in which the runs differ, a column a run."""
    settings = []
    for folder in folders:
        if (saved := saved_settings(folder)) is None:
            raise ValueError(f"{folder} is no run folder: it has no config.yaml")
        flat = flat_settings(saved)
        own = str(flat.get("paths.run"))  # files of the run's own differ in its folder, which is no setting
        settings.append({name: str(value).replace(own, "RUN") for name, value in flat.items()})
    names = sorted(set().union(*settings))
    rows = [(name, *(values.get(name, "-") for values in settings)) for name in names]
    return pd.DataFrame([row for row in rows if len(set(row[1:])) > 1], columns=["setting", *map(str, folders)])


main = partial(run_command, Runs, run)
