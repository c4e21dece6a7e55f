"""The whole report: one page of a run, its features and its evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import fmcib_ssl
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.report import Section, write_report
from fmcib_ssl.evaluation.report_features import FeatureOptions, feature_sections
from fmcib_ssl.evaluation.report_results import result_sections
from fmcib_ssl.evaluation.report_run import (
    contact_section,
    learning_section,
    provenance_section,
    read_config,
    training_section,
)

logger = logging.getLogger(__name__)


def report_all(
    out: Path | str,
    *,
    run: Path | str | None = None,
    features: Sequence[Path | str | FeatureTable] = (),
    results: Sequence[Path | str] = (),
    title: str | None = None,
    introduction: str = "",
    options: FeatureOptions | None = None,
) -> Path:
    """Write one self-contained page, and its pictures as PNGs into a folder beside it.

    Args:
        out: of the page, `NAME.html`; pictures go to `NAME_pictures/`.
        run: folder of a training run.
        features: tables that `scripts/embed.py` wrote, or as they are in memory.
        results: folders that `scripts/evaluate.py` wrote.
        title: of the page; by default the run's name.
        introduction: first words on the page; paragraphs parted by blank lines.
        options: what is shown of the features.

    Raises:
        ValueError: nothing to report on, or a table that cannot be drawn.
        FileNotFoundError: a run, a table or results that are not there.
    """
    out = Path(out)
    pictures = out.with_name(f"{out.stem}_pictures")
    folder = None if run is None else Path(run)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such run folder")
    pictures.mkdir(parents=True, exist_ok=True)
    sections: list[Section | None] = [Section("About", introduction)] if introduction else []
    if folder is not None:
        sections.append(learning_section(folder))
    for place in map(Path, results):
        logger.info("results of %s", place)
        sections += result_sections(place, pictures / place.name)
    for given in features:
        table = given if isinstance(given, FeatureTable) else FeatureTable.read(given)
        logger.info("features %s: maps, neighbours, saliency", table.origin.get("name"))
        # Two tables may have one name.
        sections += feature_sections(table, options or FeatureOptions(), pictures / f"features_{len(sections)}")
    if folder is not None:
        sections += [training_section(folder, pictures), contact_section(folder), provenance_section(folder)]
    shown = [section for section in sections if section is not None]
    if not shown:
        raise ValueError(
            "nothing to report on: give run=FOLDER with metrics.csv, features=TABLE.parquet or results=FOLDER"
        )
    config = {} if folder is None else read_config(folder)
    name = title or (f"Report of {config.get('name') or folder.name}" if folder is not None else "Report")
    subtitle = f"{folder or ''}  fmcib_ssl {fmcib_ssl.__version__}, {datetime.now():%Y-%m-%d %H:%M}".strip()
    return write_report(out, name, shown, subtitle)
