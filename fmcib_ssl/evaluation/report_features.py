"""What the report says of a table of features: maps, nearest neighbours, and what a probe's answer rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from torch import Tensor

from fmcib_ssl.data.store import StoreError
from fmcib_ssl.data.tables import AnnotationsError, text_of
from fmcib_ssl.evaluation.embedding_maps import (
    MAX_POINTS,
    MIN_UMAP,
    columns_to_color,
    has_umap,
    is_measurement,
    is_name,
    map_of_columns,
    point_colors,
    principal_components,
    umap_places,
)
from fmcib_ssl.evaluation.embedding_sources import open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.figures import LUNG_WINDOW_HU
from fmcib_ssl.evaluation.lesion_sheet import SOFT_TISSUE_WINDOW_HU
from fmcib_ssl.evaluation.probes import nearest_lesions
from fmcib_ssl.evaluation.report import PointMap, ReportFigure, Section
from fmcib_ssl.evaluation.retrieval import agreement, retrieval_sheet, spread_queries
from fmcib_ssl.evaluation.saliency import LinearReadout, SalientLesion, has_captum, occlusion, saliency_sheet
from fmcib_ssl.io import Identifiers, identifier
from fmcib_ssl.models.export import EncoderFileError, load_encoder
from fmcib_ssl.types import Preprocessing, ScanError

Array = npt.NDArray[Any]
ReadPatch = Callable[[int], Tensor]

WINDOWS = {"lung": LUNG_WINDOW_HU, "soft_tissue": SOFT_TISSUE_WINDOW_HU}
#: Patches that the map can show, of lesions spread over the table, about 1 KB each; reading them from scans is slow.
MAX_TILES, MAX_TILES_OF_SCANS = 600, 150
TILE_EDGE, TILES_ACROSS = 64, 30
#: What keeps patches from being shown; the page says so and goes on.
_UNREADABLE = (FeatureTableError, StoreError, AnnotationsError, ScanError, OSError)


@dataclass(frozen=True)
class FeatureOptions:
    """What is shown of a table of features.

    Attributes:
        color_by: columns that colour the maps; None chooses up to four.
        label: column whose classes neighbours and saliency are about; None takes the first such column of `color_by`.
        group: column of the patient; None takes `PatientID`, or where there is none the scan.
        num_queries: lesions whose neighbours are shown; 0 shows none.
        num_neighbors: of each.
        num_salient: lesions whose saliency is shown; 0 shows none.
        window: of the pictures of patches.
        identifiers: whether scans and patients are named, on the page as a whole.
    """

    color_by: Sequence[str] | None = None
    label: str | None = None
    group: str | None = None
    num_queries: int = 6
    num_neighbors: int = 5
    num_salient: int = 4
    window: Literal["lung", "soft_tissue"] = "lung"
    identifiers: Identifiers = "show"


@dataclass(frozen=True)
class _Subject:
    """A table, and the columns that its pictures are about."""

    table: FeatureTable
    options: FeatureOptions
    label: str | None
    group: str
    pictures: Path

    @property
    def name(self) -> str:
        return str(self.table.provenance.get("name") or "features")

    def picture(self, kind: str) -> Path:
        return self.pictures / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in self.name)}_{kind}.png"

    @property
    def patients(self) -> Array:
        return text_of(self.table.lesions[self.group]).fillna("").to_numpy()

    def why(self, error: Exception) -> str:
        """The reason, which names files and lesions, behind a colon."""
        return f": {error}" if self.options.identifiers == "show" else ""


def feature_sections(table: FeatureTable, options: FeatureOptions, pictures: Path) -> list[Section]:
    """Maps, nearest neighbours and saliency.

    Args:
        table: of features; its provenance says where patches and weights are.
        options: what is shown.
        pictures: folder for PNGs.

    Raises:
        FeatureTableError: a column that the table has not.
    """
    lesions = table.lesions
    for column in (*(options.color_by or ()), options.label, options.group):
        if column is not None and column not in lesions:
            raise FeatureTableError(
                f"{table.provenance.get('name')} has no column {column!r}; it has {', '.join(map(str, lesions))}"
            )
    group = options.group or next(column for column in ("PatientID", "scan_id", ID_COLUMN) if column in lesions)
    if options.identifiers == "hash" and (names := {group, *filter(is_name, map(str, lesions))} & _shown(options)):
        raise FeatureTableError(
            f"identifiers=hash shows no names, but {', '.join(sorted(names))} has such: leave it out"
        )
    hidden = group if options.identifiers == "hash" else None
    colors = list(options.color_by or columns_to_color(lesions.drop(columns=hidden or [])))
    if options.label and options.label not in colors:
        colors = [options.label, *colors]
    label = options.label or next((column for column in colors if not is_measurement(lesions[column])), None)
    subject = _Subject(table, options, label, group, pictures)
    if not table.provenance.get("source"):
        return [_maps(subject, colors, None)]
    try:
        read, preprocessing = _patches(table)
        sections = [_maps(subject, colors, read)]
        if options.num_queries:
            sections.append(_neighbors(subject, read))
        if options.num_salient:
            sections.append(_saliency(subject, label, read, preprocessing))
    except _UNREADABLE as error:
        told = f"The patches cannot be read, so neighbours and saliency are not shown{subject.why(error)}"
        sections = [_maps(subject, colors, None), Section(f"Patches: {subject.name}", told)]
    return sections


def _shown(options: FeatureOptions) -> set[str]:
    return {*(options.color_by or ()), *([options.label] if options.label else [])}


def _maps(subject: _Subject, columns: list[str], read: ReadPatch | None) -> Section:
    table = subject.table
    rows = np.arange(len(table))
    if len(rows) > MAX_POINTS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MAX_POINTS])
    features, lesions = table.features[rows], table.lesions.iloc[rows]
    where, shares = principal_components(features)
    axes = tuple(f"component {k + 1} ({100 * share:.0f} % of variance)" for k, share in enumerate(shares))
    places: dict[str, Any] = {"PCA": (where, axes)}
    note = ""
    if len(rows) < MIN_UMAP:
        note = f" Fewer than {MIN_UMAP} lesions have no neighbourhoods that UMAP could lay out."
    elif has_umap():
        places["UMAP"] = (umap_places(features), ("UMAP 1", "UMAP 2"))
    else:
        note = " For a UMAP beside it: pip install 'fmcib_ssl[report]'."
    if len(rows) < len(table):
        note += f" {len(rows)} of {len(table)} lesions, drawn at random."
    shown = lesions[columns] if columns else pd.DataFrame({"all lesions": [""] * len(rows)})
    picture = map_of_columns(places, shown, subject.picture("maps"))
    caption = (
        "Each point a lesion. PCA of standardised features shows what varies most; UMAP, who is near whom by cosine."
    )
    text = f"{len(table)} lesions, {table.features.shape[1]} features, nothing fitted to any label.{note}"
    points = _points(subject, {name: where for name, (where, _) in places.items()}, shown, rows, read)
    return Section(f"Map: {subject.name}", text, figures=[ReportFigure(picture, caption, wide=True)], points=points)


def _points(
    subject: _Subject, places: dict[str, Array], shown: pd.DataFrame, rows: Array, read: ReadPatch | None
) -> PointMap:
    """The same map for the page's script, with the axial plane through the middle of lesions spread over the table."""
    columns = {}
    for name in map(str, shown):
        colors, legend = point_colors(shown[name])
        columns[name] = {"values": [_short(value) for value in shown[name]], "colors": colors, "legend": legend}
    tile_of = np.full(len(rows), -1)
    tiles = b""
    if read is not None:
        from_store = subject.table.provenance["source"].get("kind") == "store"
        most = min(len(rows), MAX_TILES if from_store else MAX_TILES_OF_SCANS)
        chosen = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
        tile_of[chosen] = np.arange(len(chosen))
        sheet = Image.new("L", (TILES_ACROSS * TILE_EDGE, -(-len(chosen) // TILES_ACROSS) * TILE_EDGE))
        low, high = WINDOWS[subject.options.window]
        for k, place in enumerate(chosen):
            patch = read(int(rows[place]))[0].float().numpy()
            grey = np.clip(255 * (patch[len(patch) // 2] - low) / (high - low), 0, 255).astype(np.uint8)
            tile = Image.fromarray(grey).resize((TILE_EDGE, TILE_EDGE))
            sheet.paste(tile, (k % TILES_ACROSS * TILE_EDGE, k // TILES_ACROSS * TILE_EDGE))
        held = BytesIO()
        sheet.save(held, "JPEG", quality=80)
        tiles = held.getvalue()
    layouts = {name: np.asarray(where, float).round(3).tolist() for name, where in places.items()}
    return PointMap(layouts, columns, tiles, tile_of.tolist(), TILES_ACROSS, TILE_EDGE)


def _neighbors(subject: _Subject, read: ReadPatch) -> Section:
    options, label, lesions = subject.options, subject.label, subject.table.lesions
    known = lesions[label].notna().to_numpy() if label else np.ones(len(lesions), dtype=bool)
    rows = np.flatnonzero(known)
    labels = None if label is None else text_of(lesions[label]).to_numpy()[rows]
    features, patients = subject.table.features[rows], subject.patients[rows]
    queries = spread_queries(labels, len(rows), options.num_queries)
    found = nearest_lesions(features, patients, queries, options.num_neighbors)

    def caption(row: int) -> str:
        named = (
            f"{label} {_short(labels[row])}" if labels is not None else identifier(patients[row], options.identifiers)
        )
        return _short(named) if labels is None else named

    picture = retrieval_sheet(
        queries,
        found,
        lambda row: read(int(rows[row])),
        caption,
        subject.picture("neighbors"),
        window_hu=WINDOWS[options.window],
    )
    text = "Lesions spread over the table, and those of other patients whose features have the highest cosine."
    if labels is not None:
        everyone = list(range(len(rows)))[:MAX_POINTS]
        all_found = nearest_lesions(features, patients, everyone, options.num_neighbors)
        hits, chance = agreement(all_found, everyone, labels, patients)
        text += (
            ""
            if np.isnan(hits)
            else (
                f" Over all {len(everyone)} lesions {hits:.1%} of the {options.num_neighbors} nearest have the same "
                f"{label}; by chance {chance:.1%} would."
            )
        )
    figure = ReportFigure(picture, "Framed: the query. Under each patch its label and the cosine", wide=True)
    return Section(f"Nearest neighbours: {subject.name}", text, figures=[figure])


def _saliency(subject: _Subject, label: str | None, read: ReadPatch, preprocessing: Preprocessing) -> Section:
    """What a probe's answer rests on, or why that cannot be shown."""
    table, options = subject.table, subject.options
    title = f"What the answer rests on: {subject.name}"
    if reason := _no_saliency(subject, label):
        return Section(title, f"Saliency is not shown: {reason}")
    values = table.lesions[label].astype(object)
    kinds = sorted(values.dropna().unique(), key=str)
    try:
        encoder = load_encoder(table.provenance["weights"])
    except (EncoderFileError, OSError, KeyError, TypeError) as error:
        return Section(title, f"The weights cannot be read, so saliency is not shown{subject.why(error)}")
    rows = np.flatnonzero(values.notna())
    labels = (values.iloc[rows] == kinds[1]).to_numpy(int)
    patients = subject.patients[rows]
    # Half of the patients fit the probe, lesions of the other half are shown.
    names = np.unique(patients)
    fitting = np.isin(patients, np.random.default_rng(0).permutation(names)[: (len(names) + 1) // 2])
    if len(np.unique(labels[fitting])) < 2 or fitting.all():
        return Section(title, "Saliency is not shown: half of the patients do not have both classes to fit a probe on.")
    readout = LinearReadout(encoder, table.features[rows][fitting], labels[fitting])
    weight, bias = readout.weight.numpy(), float(readout.bias)
    logits = table.features[rows] @ weight + bias
    chosen = _surest(logits, labels, ~fitting, options.num_salient)
    lesions = []
    for row in chosen:
        patch = read(int(rows[row]))
        right = "right" if (logits[row] > 0) == labels[row] else "wrong"
        told = f"{label} {_short(kinds[labels[row]])}; log-odds of {_short(kinds[1])}: {logits[row]:+.1f} ({right})"
        lesions.append(SalientLesion(told, patch, occlusion(readout, patch, preprocessing)))
    picture = saliency_sheet(lesions, subject.picture("saliency"), window_hu=WINDOWS[options.window])
    text = (
        f"Logistic regression for {label} = {_short(kinds[1])} against {_short(kinds[0])} on half of the patients; "
        "lesions of the other half. Cubes a quarter as wide as the patch are blurred one by one, and the log-odds "
        "asked again."
    )
    caption = "The surest right answers of both classes, and the surest mistakes"
    return Section(title, text, figures=[ReportFigure(picture, caption, wide=True)])


def _no_saliency(subject: _Subject, label: str | None) -> str:
    """Why there is nothing to show; empty where there is."""
    if subject.table.provenance.get("kind", "encoder") != "encoder":
        return "it is of a trained encoder, and these features are of none."
    if label is None:
        return "no column has two classes to tell apart; name one with label=."
    if (num := subject.table.lesions[label].nunique()) != 2:
        return f"it needs a label of two classes, and {label} has {num}."
    return "" if has_captum() else "it needs captum: pip install 'fmcib_ssl[report]'."


def _surest(logits: Array, labels: Array, shown: Array, number: int) -> list[int]:
    """Of both classes the surest right answer, then the surest mistake, then the next surest right ones."""
    sure = np.where(labels == 1, logits, -logits)
    order = [row for row in np.argsort(-sure) if shown[row]]
    right = {c: [row for row in order if labels[row] == c and sure[row] > 0] for c in (0, 1)}
    wrong = {c: [row for row in order[::-1] if labels[row] == c and sure[row] < 0] for c in (0, 1)}
    longest = max(map(len, right.values()), default=0)
    line = [*right[1][:1], *right[0][:1], *wrong[1][:1], *wrong[0][:1]]
    line += [row for k in range(1, longest) for c in (1, 0) for row in right[c][k : k + 1]]
    return [int(row) for row in line[:number]]


def _patches(table: FeatureTable) -> tuple[ReadPatch, Preprocessing]:
    """Reads the patch of a row of the table, wherever that row is in the source."""
    held = table.provenance.get("preprocessing")
    lesions, patches, preprocessing = open_patches(
        table.provenance["source"], Preprocessing.from_dict(held) if held else None
    )
    place_of = {name: place for place, name in enumerate(lesions[ID_COLUMN])}
    if absent := [name for name in table.lesions[ID_COLUMN] if name not in place_of]:
        raise FeatureTableError(f"{len(absent)} of its lesions are not in its source any more, such as {absent[0]}")
    places = [place_of[name] for name in table.lesions[ID_COLUMN]]
    return (lambda row: patches[places[row]]), preprocessing


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 18 else f"{text[:17]}…"
