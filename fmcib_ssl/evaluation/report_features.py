"""What the report says of a table of features: maps, nearest neighbours, and what a probe's answer rests on.

Saliency needs captum: `pip install 'fmcib_ssl[report]'`. Cubes of a patch are blurred one after the other, and the
answer is asked again. Nothing is linearised: a value says by how much the log-odds that the encoder and the probe give
to the patch fall when that place is blurred.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int16
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fmcib_ssl.data import AnnotationsError, StoreError, text_of
from fmcib_ssl.evaluation import charts
from fmcib_ssl.evaluation.embedding_sources import open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.figures import WINDOWS_HU, SalientLesion, retrieval_sheet, saliency_sheet
from fmcib_ssl.evaluation.probes import Neighbors, nearest_lesions
from fmcib_ssl.evaluation.report_sections import ReportFigure, Section, safe_name
from fmcib_ssl.io import Identifiers, identifier
from fmcib_ssl.models import EncoderFileError, load_encoder
from fmcib_ssl.types import Array, Preprocessing

#: Patches that the map can show, of lesions spread over the table, about 1 KB each.
_MAX_TILES = 600
_TILE_EDGE, _TILES_ACROSS = 64, 30
#: What keeps patches from being shown; the page says so and shows the rest.
_UNREADABLE = (FeatureTableError, StoreError, AnnotationsError, OSError)


@dataclass(frozen=True)
class FeatureOptions:
    """What is shown of a table of features.

    Attributes:
        color_by: columns that colour the maps; None chooses up to four.
        label: column whose classes neighbours and saliency are about; None takes the first such column of `color_by`.
        group: column of the patient; None takes `PatientID`, or where there is none the scan.
        queries: lesions whose neighbours are shown; 0 shows none.
        neighbors: of each.
        salient: lesions whose saliency is shown; 0 shows none.
        window: of the pictures of patches.
        identifiers: whether scans and patients are named, on the page as a whole.
    """

    color_by: Sequence[str] | None = None
    label: str | None = None
    group: str | None = None
    queries: int = 6
    neighbors: int = 5
    salient: int = 4
    window: Literal["lung", "soft_tissue"] = "lung"
    identifiers: Identifiers = "show"


@dataclass(frozen=True)
class _Subject:
    """A table, the columns that its pictures are about, and what reads the patch of a row where that can be."""

    table: FeatureTable
    options: FeatureOptions
    label: str | None
    group: str
    pictures: Path
    read: Callable[[int], Tensor] | None = None

    @property
    def name(self) -> str:
        return str(self.table.provenance.get("name") or "features")

    def picture(self, kind: str) -> Path:
        return self.pictures / f"{safe_name(self.name)}_{kind}.png"

    def patch(self, row: int) -> Tensor:
        assert self.read is not None
        return self.read(row)

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
    named = {*(options.color_by or ()), *([options.label] if options.label else [])}
    for column in (*sorted(named), options.group):
        if column is not None and column not in lesions:
            raise FeatureTableError(
                f"{table.provenance.get('name')} has no column {column!r}; it has {', '.join(map(str, lesions))}"
            )
    group = options.group or next(column for column in ("PatientID", "scan_id", ID_COLUMN) if column in lesions)
    is_hidden = options.identifiers == "hash"
    if is_hidden and (names := {group, *filter(charts.is_name, map(str, lesions))} & named):
        raise FeatureTableError(
            f"identifiers=hash shows no names, but {', '.join(sorted(names))} has such: leave it out"
        )
    colors = list(options.color_by or charts.columns_to_color(lesions.drop(columns=group if is_hidden else [])))
    if options.label and options.label not in colors:
        colors = [options.label, *colors]
    label = options.label or next((column for column in colors if not charts.is_measurement(lesions[column])), None)
    subject = _Subject(table, options, label, group, pictures)
    if not table.provenance.get("source"):
        return [_maps(subject, colors)]
    try:
        read, preprocessing = _patches(table)
        shown = replace(subject, read=read)
        sections = [_maps(shown, colors)]
        if options.queries:
            sections.append(_neighbors(shown))
        if options.salient:
            sections.append(_saliency(shown, preprocessing))
    except _UNREADABLE as error:
        text = f"The patches cannot be read, so neighbours and saliency are not shown{subject.why(error)}"
        sections = [_maps(subject, colors), Section(f"Patches: {subject.name}", text)]
    return sections


def _patches(table: FeatureTable) -> tuple[Callable[[int], Tensor], Preprocessing]:
    """Reads the patch of a row of the table, wherever that row is in the source."""
    held = table.provenance.get("preprocessing")
    patches = open_patches(table.provenance["source"], Preprocessing.from_dict(held) if held else None)
    places = pd.Index(patches.lesions[ID_COLUMN]).get_indexer(pd.Index(table.lesions[ID_COLUMN]))
    if (absent := table.lesions[ID_COLUMN][places < 0]).size:
        raise FeatureTableError(
            f"{absent.size} of its lesions are not in its source any more, such as {absent.iloc[0]}"
        )
    return (lambda row: patches[int(places[row])]), patches.preprocessing


def _maps(subject: _Subject, columns: list[str]) -> Section:
    table = subject.table
    rows = np.arange(len(table))
    if len(rows) > charts.MAX_POINTS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[: charts.MAX_POINTS])
    features, lesions = table.features[rows], table.lesions.iloc[rows]
    where, shares = charts.principal_components(features)
    first, second = (f"component {k + 1} ({100 * share:.0f} % of variance)" for k, share in enumerate(shares))
    places: dict[str, tuple[Array, tuple[str, str]]] = {"PCA": (where, (first, second))}
    note = ""
    if len(rows) < charts.MIN_UMAP:
        note = f" Fewer than {charts.MIN_UMAP} lesions have no neighbourhoods that UMAP could lay out."
    elif charts.has_umap():
        places["UMAP"] = (charts.umap_places(features), ("UMAP 1", "UMAP 2"))
    else:
        note = " For a UMAP beside it: pip install 'fmcib_ssl[report]'."
    if len(rows) < len(table):
        note += f" {len(rows)} of {len(table)} lesions, drawn at random."
    shown = lesions[columns] if columns else pd.DataFrame({"all lesions": [""] * len(rows)})
    picture = charts.map_of_columns(places, shown, subject.picture("maps"))
    caption = (
        "Each point a lesion. PCA of standardised features shows what varies most; UMAP, who is near whom by cosine."
    )
    text = f"{len(table)} lesions, {table.features.shape[1]} features, nothing fitted to any label.{note}"
    layouts = {name: np.asarray(where, float).round(3).tolist() for name, (where, _) in places.items()}
    colored = {}
    for name in map(str, shown):
        colors, legend = charts.point_colors(shown[name])
        colored[name] = {"values": [_short(value) for value in shown[name]], "colors": colors, "legend": legend}
    points = {"layouts": layouts, "columns": colored, **_tiles(subject, rows)}
    figures = [ReportFigure(picture, caption, wide=True)]
    return Section(f"Map: {subject.name}", text, figures=figures, points=points)


def _tiles(subject: _Subject, rows: Array) -> dict[str, Any]:
    """The axial plane through the middle of lesions spread over the table, as one JPEG, and the place of each in it."""
    tile_of, tiles, held = np.full(len(rows), -1), "", BytesIO()
    if subject.read is not None:
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MAX_TILES)).round().astype(int))
        tile_of[chosen] = np.arange(len(chosen))
        sheet = Image.new("L", (_TILES_ACROSS * _TILE_EDGE, -(-len(chosen) // _TILES_ACROSS) * _TILE_EDGE))
        low, high = WINDOWS_HU[subject.options.window]
        for k, place in enumerate(chosen):
            patch = subject.patch(int(rows[place]))[0].float().numpy()
            grey = np.clip(255 * (patch[len(patch) // 2] - low) / (high - low), 0, 255).astype(np.uint8)
            tile = Image.fromarray(grey).resize((_TILE_EDGE, _TILE_EDGE))
            sheet.paste(tile, (k % _TILES_ACROSS * _TILE_EDGE, k // _TILES_ACROSS * _TILE_EDGE))
        sheet.save(held, "JPEG", quality=80)
        tiles = base64.b64encode(held.getvalue()).decode()
    return {"tiles": tiles, "tile_of": tile_of.tolist(), "num_across": _TILES_ACROSS, "tile_edge": _TILE_EDGE}


def _neighbors(subject: _Subject) -> Section:
    options, label, lesions = subject.options, subject.label, subject.table.lesions
    rows = np.flatnonzero(lesions[label].notna()) if label else np.arange(len(lesions))
    labels = None if label is None else text_of(lesions[label]).to_numpy()[rows]
    features, patients = subject.table.features[rows], subject.patients[rows]
    queries = spread_queries(labels, len(rows), options.queries)

    def caption(row: int) -> str:
        if labels is not None:
            return f"{label} {_short(labels[row])}"
        return _short(identifier(patients[row], options.identifiers))

    picture = retrieval_sheet(
        queries,
        nearest_lesions(features, patients, queries, options.neighbors),
        lambda row: subject.patch(int(rows[row])),
        caption,
        subject.picture("neighbors"),
        window_hu=WINDOWS_HU[options.window],
    )
    text = "Lesions spread over the table, and those of other patients whose features have the highest cosine."
    if labels is not None:
        everyone = range(min(len(rows), charts.MAX_POINTS))
        neighbors = nearest_lesions(features, patients, everyone, options.neighbors)
        hits, chance = agreement(neighbors, everyone, labels, patients)
        if not np.isnan(hits):
            text += (
                f" Over all {len(everyone)} lesions {hits:.1%} of the {options.neighbors} nearest have the same "
                f"{label}; by chance {chance:.1%} would."
            )
    figure = ReportFigure(picture, "Framed: the query. Under each patch its label and the cosine", wide=True)
    return Section(f"Nearest neighbours: {subject.name}", text, figures=[figure])


def agreement(neighbors: Neighbors, queries: Sequence[int], labels: Array, patients: Array) -> tuple[float, float]:
    """How often a neighbour has the query's label, and how often a lesion drawn from the other patients would.

    Both are NaN where all lesions are of one patient.
    """
    known = neighbors.rows >= 0
    if not known.any():
        return np.nan, np.nan
    own = labels[np.asarray(queries)]
    hits = (labels[neighbors.rows] == own[:, None])[known].mean()
    chances = [(labels[patients != patients[query]] == labels[query]).mean() for query in queries]
    return float(hits), float(np.mean(chances))


def spread_queries(labels: Array | None, num_lesions: int, num_queries: int) -> list[int]:
    """Lesions to ask for: as many of each label as can be, spread evenly over the table."""
    labels = np.zeros(num_lesions) if labels is None else labels
    groups = [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
    num_queries = min(num_queries, num_lesions)
    share = max(1, num_queries // len(groups))
    chosen: list[int] = []
    for group in groups:
        chosen += group[np.linspace(0, len(group) - 1, min(share, len(group))).round().astype(int)].tolist()
    return chosen[:num_queries]


def _saliency(subject: _Subject, preprocessing: Preprocessing) -> Section:
    """What a probe's answer rests on, or why that cannot be shown."""
    table, options, label = subject.table, subject.options, subject.label
    title = f"What the answer rests on: {subject.name}"
    if (reason := _no_saliency(subject)) or label is None:
        return Section(title, f"Saliency is not shown: {reason}")
    values = table.lesions[label].astype(object)
    kinds = sorted(values.dropna().unique(), key=str)
    try:
        encoder = load_encoder(table.provenance["weights"])
    except (EncoderFileError, OSError, KeyError, TypeError) as error:
        return Section(title, f"The weights cannot be read, so saliency is not shown{subject.why(error)}")
    rows = np.flatnonzero(values.notna())
    labels, patients = (values.iloc[rows] == kinds[1]).to_numpy(int), subject.patients[rows]
    # Half of the patients fit the probe, lesions of the other half are shown.
    names = np.unique(patients)
    fitting = np.isin(patients, np.random.default_rng(0).permutation(names)[: (len(names) + 1) // 2])
    if len(np.unique(labels[fitting])) < 2 or fitting.all():
        return Section(title, "Saliency is not shown: half of the patients do not have both classes to fit a probe on.")
    readout = LinearReadout(encoder, table.features[rows][fitting], labels[fitting])
    logits = table.features[rows] @ readout.weight.numpy() + float(readout.bias)
    lesions, (zero, one) = [], map(_short, kinds)
    for row in _surest(logits, labels, ~fitting, options.salient):
        patch = subject.patch(int(rows[row]))
        right = "right" if (logits[row] > 0) == labels[row] else "wrong"
        text = f"{label} {(zero, one)[labels[row]]}; log-odds of {one}: {logits[row]:+.1f} ({right})"
        lesions.append(SalientLesion(text, patch, occlusion(readout, patch, preprocessing)))
    picture = saliency_sheet(lesions, subject.picture("saliency"), window_hu=WINDOWS_HU[options.window])
    text = (
        f"Logistic regression for {label} = {one} against {zero} on half of the patients; lesions of the other half. "
        "Cubes a quarter as wide as the patch are blurred one by one, and the log-odds asked again."
    )
    caption = "The surest right answers of both classes, and the surest mistakes"
    return Section(title, text, figures=[ReportFigure(picture, caption, wide=True)])


def _no_saliency(subject: _Subject) -> str:
    """Why there is nothing to show; empty where there is."""
    if subject.table.provenance.get("kind", "encoder") != "encoder":
        return "it is of a trained encoder, and these features are of none."
    if subject.label is None:
        return "no column has two classes to tell apart; name one with label=."
    if (num := subject.table.lesions[subject.label].nunique()) != 2:
        return f"it needs a label of two classes, and {subject.label} has {num}."
    return "" if _has_captum() else "it needs captum: pip install 'fmcib_ssl[report]'."


def _surest(logits: Array, labels: Array, shown: Array, number: int) -> list[int]:
    """Of both classes the surest right answer, then the surest mistake, then the next surest right ones."""
    sure = np.where(labels == 1, logits, -logits)
    order = [int(row) for row in np.argsort(-sure) if shown[row]]
    right = {c: [row for row in order if labels[row] == c and sure[row] > 0] for c in (1, 0)}
    wrong = {c: [row for row in order[::-1] if labels[row] == c and sure[row] < 0] for c in (1, 0)}
    line = [*right[1][:1], *right[0][:1], *wrong[1][:1], *wrong[0][:1]]
    for k in range(1, len(order)):
        line += [*right[1][k : k + 1], *right[0][k : k + 1]]
    return line[:number]


def _has_captum() -> bool:
    """Whether captum is installed."""
    return importlib.util.find_spec("captum") is not None


class LinearReadout(nn.Module):
    """A frozen encoder and logistic regression on its standardised features, as one module.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        features: that the encoder gives, `(n, features)`, to fit on.
        labels: 0 or 1, `(n,)`.
        c: inverse strength of the penalty.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: nn.Module, features: Array, labels: Array, c: float = 0.01) -> None:
        super().__init__()
        self.encoder = encoder.eval()
        scaler, probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(features, labels)
        weight = probe.coef_[0] / scaler.scale_
        self.register_buffer("weight", torch.as_tensor(weight, dtype=torch.float32))
        self.register_buffer("bias", torch.as_tensor(probe.intercept_[0] - weight @ scaler.mean_, dtype=torch.float32))

    def forward(self, views: Float[Tensor, "batch 1 z y x"]) -> Float[Tensor, " batch"]:
        """Log-odds of class 1."""
        logits: Tensor = self.encoder(views).float() @ self.weight + self.bias
        return logits


def occlusion(
    readout: nn.Module,
    patch_hu: Int16[Tensor, "1 z y x"],
    preprocessing: Preprocessing,
    *,
    edge: int | None = None,
    batch_size: int = 32,
) -> Float[np.ndarray, "z y x"]:
    """By how much the log-odds fall when the cubes that cover a voxel are hidden, averaged over those cubes.

    A hidden cube shows the patch blurred by half its edge: edges and texture go, the mean stays, and no hole is made,
    which an encoder might take for a finding.

    Args:
        readout: `(batch, 1, z, y, x)` to `(batch,)`.
        patch_hu: the patch.
        preprocessing: what the encoder was trained to see.
        edge: of a cube, voxels; by default a quarter of the patch's shortest edge. Cubes overlap by half.
        batch_size: hidden patches in one pass.

    Raises:
        ImportError: captum is not installed.

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, in 3D.
    """
    view = preprocessing.normalize(patch_hu)[None]
    edge = edge or max(2, min(patch_hu.shape[1:]) // 4)
    sizes = [min(edge, n) for n in patch_hu.shape[1:]]
    blurred = torch.from_numpy(gaussian_filter(view[0, 0].numpy(), edge / 2, mode="nearest"))[None, None]
    method = importlib.import_module("captum.attr").Occlusion(readout)
    with torch.no_grad():
        falls = method.attribute(
            view,
            sliding_window_shapes=(1, *sizes),
            strides=(1, *[max(1, n // 2) for n in sizes]),
            baselines=blurred,
            perturbations_per_eval=batch_size,
        )
    result: Float[np.ndarray, "z y x"] = falls[0, 0].numpy()
    return result


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 18 else f"{text[:17]}…"
