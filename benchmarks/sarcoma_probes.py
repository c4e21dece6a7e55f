"""What benchmarks/sarcoma.py asks of frozen features, and the figures with intervals over patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sarcoma_data import SIZE_ZYX, Sarcomas
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from fmcib_ssl.evaluation import (
    METRICS,
    PROBES,
    Inputs,
    Labels,
    Protocol,
    Split,
    SplitScores,
    auc,
    cross_validation,
    patient_weights,
    resampled,
    score,
)

Array = npt.NDArray[Any]

NUM_BOOTSTRAP = 2000
#: Logistic regression; coarser than the package's own grid, as there are hundreds of fits.
LOGISTIC = replace(PROBES["logistic"], settings=(1e-4, 1e-3, 1e-2, 1e-1))
RATINGS = ("texture", "margin")
#: Two places of a tumour are at least so far apart, and their patches share no voxel, where the tumour allows.
MIN_DISTANCE_MM = 24.0
#: Galleries that are drawn, one place of every tumour in each.
NUM_GALLERIES = 50
#: What is reported: task, target, metric.
QUESTIONS = (
    ("tumour", "outside", "auc"), ("tumour", "similar", "auc"),
    ("same_tumour", "inside", "recall_at_1"), ("same_tumour", "inside", "reciprocal_rank"),
    ("same_scan", "similar", "recall_at_1"), ("same_scan", "similar", "reciprocal_rank"),
    ("texture", "mean", "spearman"), ("margin", "mean", "spearman"),
)  # fmt: skip


def judged(sarcomas: Sarcomas, features: Sequence[Array], components: int | None, test: Array) -> dict[str, Array]:
    """Scores of features on a fold, by task and target.

    Args:
        sarcomas: what they are features of.
        features: of all places and of all nodules.
        components: reduce them by a PCA first, as raw voxels need.
        test: which places are of patients that are tested, `(places,)`.
    """
    places, nodules = features
    answers: dict[str, Array] = {}
    for kind in ("outside", "similar"):
        rows, protocol = tumour_or_not(sarcomas, kind, test)
        (result,) = score(LOGISTIC, Inputs("", places[rows], components), protocol)
        answers[f"tumour-{kind}"] = result.scores
    steps: list[Any] = [StandardScaler()]
    if components is not None:
        steps.insert(0, PCA(components, svd_solver="randomized", random_state=0))
    standardised = make_pipeline(*steps).fit(places[~test]).transform(places)
    for task, kind in (("same_tumour", "inside"), ("same_scan", "similar")):
        rows = sarcomas.rows_of(kind)
        rows = rows[test[rows]]
        centers = sarcomas.places.loc[rows, ["z", "y", "x"]].to_numpy(float)
        asking, gallery = draw_pairs(sarcomas.patients[rows], centers)
        answers[f"{task}-{kind}"] = ranks_by_cosine(standardised[rows], asking, gallery)
    for name in RATINGS:
        rows, protocol = rating(sarcomas, name)
        results = score(PROBES["ridge"], Inputs("", nodules[rows], components), protocol)
        answers[f"{name}-mean"] = np.concatenate([result.scores for result in results])
    return answers


def tumour_or_not(sarcomas: Sarcomas, kind: str, test: Array) -> tuple[Array, Protocol]:
    """Rows of places inside (1) and of another kind (0), and who is trained on and tested."""
    rows = sarcomas.rows_of("inside", kind)
    values = (sarcomas.places["kind"].to_numpy()[rows] == "inside").astype(np.int64)
    labels = Labels(f"inside, not {kind}", "binary", values, np.arange(len(rows)), ("0", "1"))
    split = Split("fold", np.flatnonzero(~test[rows]), np.flatnonzero(test[rows]))
    return rows, Protocol(labels, sarcomas.patients[rows], [split], "fold")


def rating(sarcomas: Sarcomas, name: str) -> tuple[Array, Protocol]:
    """Rows of nodules that several readers rated, and five folds of their patients."""
    labels = sarcomas.ratings(name).labels()
    patients = sarcomas.nodules["PatientID"].to_numpy(dtype=str)[labels.rows]
    splits = cross_validation("continuous", labels.values, patients, num_folds=5)
    return labels.rows, Protocol(labels, patients, splits, "folds")


def pairs_apart(centers_zyx: Array) -> Array:
    """Ordered pairs of places of a tumour, `(pairs, 2)`, that are far apart; where none are, those farthest apart.

    Far apart is at least `MIN_DISTANCE_MM`, and no voxel is in the patches of both.

    Args:
        centers_zyx: `(n, 3)` mm.
    """
    offsets = np.abs(centers_zyx[:, None] - centers_zyx)
    distance = np.linalg.norm(offsets, axis=2)
    apart = (distance >= MIN_DISTANCE_MM) & (offsets >= SIZE_ZYX).any(2)
    return np.argwhere(apart if apart.any() else distance == distance.max())


def draw_pairs(patients: Array, centers_zyx: Array, seed: int = 0) -> tuple[Array, Array]:
    """Places that ask and places that stand in a gallery, `(NUM_GALLERIES, patients)` each, in the patients' order.

    For each gallery a pair of places far apart is drawn in every tumour: one asks, the other stands in the gallery.

    Args:
        patients: of places, `(n,)`; a patient has one tumour.
        centers_zyx: of places, mm.
        seed: of the draws.
    """
    rng, drawn = np.random.default_rng(seed), []
    for patient in np.unique(patients):
        own = np.flatnonzero(patients == patient)
        pairs = own[pairs_apart(centers_zyx[own])]
        drawn.append(pairs[rng.integers(len(pairs), size=NUM_GALLERIES)])
    asking, gallery = np.stack(drawn).transpose(2, 1, 0)
    return asking, gallery


def ranks_by_cosine(features: Array, asking: Array, gallery: Array) -> Array:
    """Rank, from 1, of a tumour's own place among those of its gallery, `(patients, galleries)`.

    Args:
        features: of places, `(n, dim)`.
        asking: rows, `(galleries, patients)`; the right answer to `asking[g, p]` is `gallery[g, p]`.
        gallery: rows, likewise.
    """
    unit = normalize(features)
    cosines = np.einsum("gpd,gqd->pgq", unit[asking], unit[gallery])
    own = np.einsum("pgp->pg", cosines)[..., None]
    return np.asarray(1 + (cosines > own).sum(2))


def figures(
    sarcomas: Sarcomas, fold: Array, answers: Sequence[Sequence[dict[str, Array]]]
) -> dict[tuple[str, str, str], Array]:
    """Each figure by task, target and metric: the value, then that of every resample of the patients.

    Args:
        sarcomas: what was judged.
        fold: of every place.
        answers: of `judged`, for each seed and fold.
    """
    of_metric = {"auc": _aucs, "spearman": _correlations, "recall_at_1": _retrieval, "reciprocal_rank": _retrieval}
    drawn: dict[tuple[str, str, str], Array] = {}
    for task, target, metric in QUESTIONS:
        by_seed = [[one[f"{task}-{target}"] for one in of_seed] for of_seed in answers]
        values = [of_metric[metric](sarcomas, fold, (task, target, metric), of_folds) for of_folds in by_seed]
        drawn[task, target, metric] = np.mean(values, axis=0)
    return drawn


def _aucs(sarcomas: Sarcomas, fold: Array, question: tuple[str, str, str], scores: Sequence[Array]) -> Array:
    """Mean over folds."""
    protocols = [tumour_or_not(sarcomas, question[1], fold == k)[1] for k in range(len(scores))]
    parts = zip(protocols, scores, strict=True)
    results = [SplitScores("", protocol.splits[0].test, of_fold, 0.0, 0) for protocol, of_fold in parts]
    return resampled(auc, protocols[0].labels.values, results, protocols[0].weights(NUM_BOOTSTRAP))


def _correlations(sarcomas: Sarcomas, fold: Array, question: tuple[str, str, str], scores: Sequence[Array]) -> Array:
    """Mean over the nodules' folds, then over the encoders, one a fold of the sarcomas."""
    protocol, of_encoders = rating(sarcomas, question[0])[1], []
    ends = np.cumsum([len(split.test) for split in protocol.splits])[:-1]
    for of_encoder in scores:
        parts = zip(protocol.splits, np.split(of_encoder, ends), strict=True)
        results = [SplitScores(split.name, split.test, part, 0.0, 0) for split, part in parts]
        spearman, weights = METRICS["continuous"]["Spearman"], protocol.weights(NUM_BOOTSTRAP)
        of_encoders.append(resampled(spearman, protocol.labels.values, results, weights))
    return np.asarray(np.mean(of_encoders, axis=0))


def _retrieval(sarcomas: Sarcomas, fold: Array, question: tuple[str, str, str], ranks: Sequence[Array]) -> Array:
    """Mean over galleries, then over patients; a resample draws who asks, not who stands in the galleries."""
    names, first_row = np.unique(sarcomas.patients, return_index=True)
    by_fold = np.argsort(fold[first_row], kind="stable")  # the patients of fold 0, sorted, then those of fold 1, ...
    own = np.concatenate(ranks)
    values = ((own == 1) if question[2] == "recall_at_1" else 1 / own).mean(1)
    weights = patient_weights(names, NUM_BOOTSTRAP, 0)[:, by_fold]
    return np.asarray(weights @ values / weights.sum(1))
