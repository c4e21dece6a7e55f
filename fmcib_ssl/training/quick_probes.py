"""Quick probes of frozen features within one labelled set: every lesion is judged by lesions of other patients.

Quick enough to run during training, and only for comparing a run with itself over time; the figures to report, with
intervals and baselines, are those of `scripts/evaluate.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Array = npt.NDArray[Any]

#: Sharpness of the vote, as Wu et al. and most who came after them have it.
KNN_TEMPERATURE = 0.07
#: Strengths of the ridge penalty among which leave-one-out error on the training folds chooses.
ALPHAS = tuple(float(alpha) for alpha in np.logspace(-1, 5, 7))


def knn_scores(features: Array, classes: Array, groups: Array, num_neighbors: int = 20) -> Array:
    """Vote of each lesion's nearest neighbours, by cosine, among lesions of other patients.

    Args:
        features: `(n, dim)`.
        classes: 0 to C - 1, `(n,)`.
        groups: the patient of every lesion, `(n,)`.
        num_neighbors: that vote; fewer where there are not as many.

    Returns:
        `(n, C)`: shares of the vote, weighted by `exp(cosine / 0.07)`.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, sec. 3.4.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosine = (unit @ unit.T).astype(np.float64)
    cosine[groups[:, None] == groups[None]] = -np.inf
    k = min(num_neighbors, len(features) - 1)
    nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    near = np.take_along_axis(cosine, nearest, axis=1)
    weights = np.exp((near - near.max(axis=1, keepdims=True)) / KNN_TEMPERATURE)
    votes = np.zeros((len(features), classes.max() + 1))
    np.add.at(votes, (np.arange(len(features))[:, None], classes[nearest]), weights)
    shares: Array = votes / votes.sum(axis=1, keepdims=True)
    return shares


def linear_scores(features: Array, classes: Array, groups: Array, num_folds: int = 5, seed: int = 0) -> Array:
    """Scores by a ridge classifier fitted on the other folds; folds are grouped by patient.

    Args:
        features: `(n, dim)`; standardised by the training folds.
        classes: 0 to C - 1, `(n,)`, each with at least `num_folds` patients.
        groups: the patient of every lesion, `(n,)`.
        num_folds: of the cross-validation.
        seed: of the folds.

    Returns:
        `(n, C)`, higher for a likelier class.
    """
    num_classes = classes.max() + 1
    scores = np.zeros((len(features), num_classes))
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    for fit, judge in folds.split(features, classes, groups):
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(ALPHAS)).fit(features[fit], classes[fit])
        decision = model.decision_function(features[judge])
        scores[judge] = decision if num_classes > 2 else np.column_stack([-decision, decision])
    return scores


def macro_auc(classes: Array, scores: Array) -> float:
    """Area under the ROC curve of each class against the rest, averaged; of two classes, the usual one."""
    num_classes = scores.shape[1]
    judged = [1] if num_classes == 2 else range(num_classes)
    return float(np.mean([roc_auc_score(classes == c, scores[:, c]) for c in judged]))
