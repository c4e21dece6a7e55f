"""Put a run, its features and its evaluations on one page that opens offline.

`fmcib-ssl report --help` shows what can be set; docs/report.md says more.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command, Identifiers


class Report(Command):
    """One HTML page, with its pictures inside, and as PNGs in a folder beside it.

    fmcib-ssl report run=runs/pretrain/2026-01-31 features=features.parquet results=evaluated out=report.html

    Curves, maps of the features, nearest neighbours, saliency, tables with intervals; of what is given.
    """

    out: Path = Field(description="FILE.html")
    run: Path | None = Field(None, description="folder of a training run")
    features: list[Path] = Field([], description="tables of `embed`, comma-separated")
    results: list[Path] = Field([], description="folders of `evaluate`, comma-separated")
    title: str | None = Field(None, description="of the page; null: the run's name")
    about: str = Field("", description="first words on the page, such as what the label means")
    color_by: list[str] | None = Field(None, description="columns to colour maps by, comma-separated; null: up to four")
    label: str | None = Field(None, description="column that neighbours and saliency are about")
    group: str | None = Field(None, description="column of the patient; null: PatientID, or else the scan")
    queries: NonNegativeInt = Field(6, description="lesions whose neighbours are shown; 0: none")
    neighbors: PositiveInt = Field(5, description="of each")
    salient: NonNegativeInt = Field(4, description="lesions whose saliency is shown; 0: none")
    window: Literal["lung", "soft_tissue"] = Field("lung", description="of the pictures of patches")
    identifiers: Identifiers = Field("show", description="names of scans and patients: show, or hash them")


def run(command: Report) -> None:
    """Write the page."""
    from fmcib_ssl.evaluation import FeatureOptions, report_all  # noqa: PLC0415  (the help is quick)

    values = dict(command)
    given = {key: values.pop(key) for key in ("out", "run", "features", "results", "title")}
    about = values.pop("about")
    page = report_all(**given, introduction=about, options=FeatureOptions(**values))
    print(f"page      {page}\npictures  {page.with_name(f'{page.stem}_pictures')}")


main = partial(run_command, Report, run)
