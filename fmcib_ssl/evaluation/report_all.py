"""The whole report: one page of a run, its features and its evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import fmcib_ssl
from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.figures import Palette
from fmcib_ssl.evaluation.report import Section, is_own_file, write_report
from fmcib_ssl.evaluation.report_features import FeatureOptions, feature_sections
from fmcib_ssl.evaluation.report_results import RESULTS_FILE, answer, read_results, result_sections
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
        run: folder of a training run, pretraining or fine-tuning.
        features: tables that `scripts/embed.py` wrote, or as they are in memory.
        results: folders that `scripts/evaluate.py` or a fine-tuning wrote; that of `run` need not be named.
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
    options, palette = options or FeatureOptions(), Palette()
    places = [Path(place) for place in results]
    if folder is not None and is_own_file(folder / RESULTS_FILE) and folder not in places:
        places.insert(0, folder)
    evaluations = [read_results(place) for place in places]
    sections: list[Section | None] = [Section("About", introduction)] if introduction else []
    learned = None if folder is None else learning_section(folder)
    if answers := "\n\n".join(filter(None, map(answer, evaluations))):
        learned = learned or Section("Did it learn?")
        learned = replace(learned, text=f"{answers}\n\n{learned.text}")
    sections.append(learned)
    for place in places:
        logger.info("results of %s", place)
        sections += result_sections(place, pictures / place.name, palette, options.identifiers)
    labels = [found.get("provenance", {}).get("arguments", {}).get("label") for found in evaluations]
    for given in features:
        table = given if isinstance(given, FeatureTable) else FeatureTable.read(given)
        logger.info("features %s: maps, neighbours, saliency", table.provenance.get("name"))
        evaluated = next((label for label in labels if label in table.lesions), None)
        own = replace(options, label=options.label or evaluated)
        # Two tables may have one name.
        sections += feature_sections(table, own, pictures / f"features_{len(sections)}")
    if folder is not None:
        sections += [
            training_section(folder, pictures),
            contact_section(folder, options.identifiers),
            provenance_section(folder, options.identifiers),
        ]
    shown = [section for section in sections if section is not None]
    if not shown:
        raise ValueError(
            "nothing to report on: give run=FOLDER with metrics.csv, features=TABLE.parquet or results=FOLDER"
        )
    config = {} if folder is None else read_config(folder)
    name = title or (f"Report of {config.get('name') or folder.name}" if folder is not None else "Report")
    whose = "" if folder is None else f"{folder.name if options.identifiers == 'hash' else folder}, "
    subtitle = f"{whose}fmcib_ssl {fmcib_ssl.__version__}, {datetime.now():%Y-%m-%d %H:%M}"
    return write_report(out, name, shown, subtitle)
