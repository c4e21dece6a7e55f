"""What the report says of a table of features: maps, nearest neighbours and saliency.

Saliency needs captum: `pip install 'fmcib_ssl[report]'`. Cubes of a patch are blurred one after the other, and the
answer is asked again. Nothing is linearised: a value says by how much the log-odds that the encoder and the probe give
to the patch fall when that place is blurred.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int16
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fmcib_ssl.data import AnnotationsError, StoreError, text_of
from fmcib_ssl.evaluation.embedding_sources import open_patches
from fmcib_ssl.evaluation.feature_table import ID_COLUMN, FeatureTable, FeatureTableError
from fmcib_ssl.evaluation.figures import WINDOWS_HU, SalientLesion, retrieval_sheet, saliency_sheet
from fmcib_ssl.evaluation.probes import Neighbors, nearest_lesions
from fmcib_ssl.evaluation.report_maps import (
    MAX_POINTS,
    columns_to_color,
    is_measurement,
    is_name,
    map_section,
    shortened,
    spread,
)
from fmcib_ssl.evaluation.report_results import ReportFigure, Section, safe_name
from fmcib_ssl.io import Identifiers, identifier
from fmcib_ssl.models import EncoderFileError, load_encoder
from fmcib_ssl.types import Array, Preprocessing

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
        neighbors: shown of each query.
        salient: lesions whose saliency is shown; 0 shows none.
        window: HU that patches are shown in.
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


def feature_sections(table: FeatureTable, options: FeatureOptions, pictures: Path) -> list[Section]:
    """Maps, nearest neighbours and saliency.

    Args:
        table: of features; its provenance says where patches and weights are.
        options: columns, numbers of lesions, window, and whether names are shown.
        pictures: folder for PNGs.

    Raises:
        FeatureTableError: a column that the table has not.
    """
    report = _FeatureReport(table, options, pictures)
    if not table.provenance.get("source"):
        return [report.map()]
    try:
        report.open_patches()
        sections = [report.map()]
        if options.queries:
            sections.append(report.neighbors())
        if options.salient:
            sections.append(report.saliency())
    except _UNREADABLE as error:
        text = f"The patches cannot be read, so neighbours and saliency are not shown{report.why(error)}"
        report.patch = None
        sections = [report.map(), Section(f"Patches: {table.name}", text)]
    return sections


class _FeatureReport:
    """The sections of a table; `patch` reads that of a row where the source can be opened."""

    def __init__(self, table: FeatureTable, options: FeatureOptions, pictures: Path) -> None:
        self.table, self.lesions, self.options, self.pictures = table, table.lesions, options, pictures
        self.window_hu = WINDOWS_HU[options.window]
        self.patch: Callable[[int], Tensor] | None = None
        lesions, named = table.lesions, {*(options.color_by or ()), *filter(None, [options.label])}
        for column in (*sorted(named), options.group):
            if column is not None and column not in lesions:
                raise FeatureTableError(f"{table.name} has no column {column!r}; it has {', '.join(map(str, lesions))}")
        group = options.group or next(column for column in ("PatientID", "scan_id", ID_COLUMN) if column in lesions)
        self.patients: Array = text_of(lesions[group]).fillna("").to_numpy()
        is_hidden = options.identifiers == "hash"
        if is_hidden and (names := {group, *filter(is_name, map(str, lesions))} & named):
            raise FeatureTableError(
                f"identifiers=hash shows no names, but {', '.join(sorted(names))} has such: leave it out"
            )
        columns = list(options.color_by or columns_to_color(lesions.drop(columns=group if is_hidden else [])))
        self.columns = list(dict.fromkeys(columns if options.label is None else [options.label, *columns]))
        kinds = (column for column in self.columns if not is_measurement(lesions[column]))
        self.label = options.label or next(kinds, None)

    def open_patches(self) -> None:
        """Find the patch of each row, wherever that row is in the source."""
        cut = self.table.provenance.get("preprocessing")
        patches = open_patches(self.table.provenance["source"], Preprocessing.from_dict(cut) if cut else None)
        ids = self.lesions[ID_COLUMN]
        rows = pd.Index(patches.lesions[ID_COLUMN]).get_indexer(pd.Index(ids))
        if (absent := ids[rows < 0]).size:
            raise FeatureTableError(
                f"{absent.size} of its lesions are no longer in its source, such as {absent.iloc[0]}"
            )
        self.patch, self.preprocessing = (lambda row: patches.read(int(rows[row]))), patches.preprocessing

    def why(self, error: Exception) -> str:
        """The reason, which names files and lesions, behind a colon."""
        return f": {error}" if self.options.identifiers == "show" else ""

    def _picture(self, kind: str) -> Path:
        return self.pictures / f"{safe_name(self.table.name)}_{kind}.png"

    def map(self) -> Section:
        """The map, with patches where they can be read."""
        return map_section(self.table, self.columns, self._picture("maps"), self.patch, self.window_hu)

    def neighbors(self) -> Section:
        """Lesions of each label, with the nearest of other patients."""
        options, label, read = self.options, self.label, self.patch
        assert read is not None
        rows = np.arange(len(self.lesions)) if label is None else np.flatnonzero(self.lesions[label].notna())
        labels = np.zeros(len(rows)) if label is None else text_of(self.lesions[label]).to_numpy()[rows]
        features, patients = self.table.features[rows], self.patients[rows]
        groups = [np.flatnonzero(labels == kind) for kind in np.unique(labels)]
        share = max(1, options.queries // len(groups))
        queries = np.concatenate([spread(group, share) for group in groups])[: options.queries].tolist()

        def caption(row: int) -> str:
            if label is not None:
                return f"{label} {shortened(labels[row])}"
            return shortened(identifier(patients[row], options.identifiers))

        picture = retrieval_sheet(
            queries,
            nearest_lesions(features, patients, queries, options.neighbors),
            lambda row: read(int(rows[row])),
            caption,
            self._picture("neighbors"),
            window_hu=self.window_hu,
        )
        text = "Lesions spread over the table, and those of other patients with the highest cosine similarity."
        if label is not None and len(np.unique(patients)) > 1:
            everyone = range(min(len(rows), MAX_POINTS))
            neighbors = nearest_lesions(features, patients, everyone, options.neighbors)
            hits, chance = agreement(neighbors, everyone, labels, patients)
            text += (
                f" Over all {len(everyone)} lesions {hits:.1%} of the {options.neighbors} nearest have the same "
                f"{label}; by chance {chance:.1%} would."
            )
        figure = ReportFigure(picture, "Framed: the query. Below each patch: label and cosine similarity", wide=True)
        return Section(f"Nearest neighbours: {self.table.name}", text, figures=[figure])

    def saliency(self) -> Section:
        """What a probe's log-odds depend on, or why that cannot be shown."""
        title, label, read = f"Saliency: {self.table.name}", self.label, self.patch
        assert read is not None
        values = pd.Series(dtype=object) if label is None else self.lesions[label].astype(object)
        kinds, reason = sorted(values.dropna().unique(), key=str), ""
        if self.table.provenance.get("kind", "encoder") != "encoder":
            reason = "it needs features of a trained encoder."
        elif label is None:
            reason = "no column has two classes to tell apart; name one with label=."
        elif len(kinds) != 2:
            reason = f"it needs a label of two classes, and {label} has {len(kinds)}."
        elif importlib.util.find_spec("captum") is None:
            reason = "it needs captum: pip install 'fmcib_ssl[report]'."
        if reason:
            return Section(title, f"Saliency is not shown: {reason}")
        try:
            encoder = load_encoder(self.table.provenance["weights"])
        except (EncoderFileError, OSError, KeyError, TypeError) as error:
            return Section(title, f"The weights cannot be read, so saliency is not shown{self.why(error)}")
        rows = np.flatnonzero(values.notna())
        features, labels, patients = self.table.features[rows], values.iloc[rows] == kinds[1], self.patients[rows]
        # Half of the patients fit the probe, lesions of the other half are shown.
        names = np.unique(patients)
        fitting = np.isin(patients, np.random.default_rng(0).permutation(names)[: (len(names) + 1) // 2])
        if labels[fitting].nunique() < 2 or fitting.all():
            return Section(title, "Saliency is not shown: half of the patients lack a class to fit a probe on.")
        readout = linear_readout(encoder, features[fitting], labels[fitting].to_numpy(int))
        logits = readout[1:](torch.from_numpy(features)).detach().numpy()
        answers = pd.DataFrame({"row": rows, "one": labels.to_numpy(int), "logit": logits})[~fitting]
        answers["wrong"] = (answers["logit"] > 0) != answers["one"]
        surest = answers["logit"].abs().groupby([answers["one"], answers["wrong"]]).rank("first", ascending=False)
        answers = answers.assign(rank=surest).sort_values(["rank", "wrong", "one"], ascending=[True, True, False])
        lesions, (zero, one) = [], map(shortened, kinds)
        for answer in answers[: self.options.salient].to_dict("records"):
            patch, verdict = read(answer["row"]), "wrong" if answer["wrong"] else "correct"
            text = f"{label} {(zero, one)[answer['one']]}; log-odds of {one}: {answer['logit']:+.1f} ({verdict})"
            lesions.append(SalientLesion(text, patch, occlusion(readout, patch, self.preprocessing)))
        picture = saliency_sheet(lesions, self._picture("saliency"), window_hu=self.window_hu)
        text = (
            f"Logistic regression for {label} = {one} against {zero} on half of the patients; lesions of the other "
            "half. Cubes a quarter as wide as the patch are blurred one by one, and the log-odds computed again."
        )
        caption = "The most confident correct predictions of both classes, and the most confident errors"
        return Section(title, text, figures=[ReportFigure(picture, caption, wide=True)])


def agreement(neighbors: Neighbors, queries: Sequence[int], labels: Array, patients: Array) -> tuple[float, float]:
    """How often a neighbour has the query's label, and how often a lesion drawn from the other patients would."""
    known, own = neighbors.rows >= 0, labels[np.asarray(queries)]
    hits = (labels[neighbors.rows] == own[:, None])[known].mean()
    chances = [(labels[patients != patients[query]] == labels[query]).mean() for query in queries]
    return float(hits), float(np.mean(chances))


def linear_readout(encoder: nn.Module, features: Array, labels: Array, c: float = 0.01) -> nn.Sequential:
    """A frozen encoder and logistic regression on its standardised features: log-odds of class 1, `(batch,)`.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        features: that the encoder gives, `(n, features)`, to fit on.
        labels: 0 or 1, `(n,)`.
        c: inverse strength of the penalty.
    """
    scaler, probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(features, labels)
    weight = probe.coef_ / scaler.scale_
    linear = nn.Linear(features.shape[1], 1)
    linear.weight.data = torch.as_tensor(weight, dtype=torch.float32)
    linear.bias.data = torch.as_tensor(probe.intercept_ - weight @ scaler.mean_, dtype=torch.float32)
    return nn.Sequential(encoder, linear, nn.Flatten(0)).eval()


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
        preprocessing: normalises the patch for the encoder.
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
