"""Time to event: a penalised Cox model, and how two halves by risk live.

The Cox model is written here, since what is published does not fit: lifelines needs pandas below 3, scikit-survival is
under the GPL and bound to one release of scikit-learn, and both take minutes for hundreds of features. It is tested
against both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.stats import CensoredData, ecdf, logrank

Array = npt.NDArray[Any]


def cox_path(x: Array, labels: Array, penalties: Sequence[float]) -> Array:
    """Coefficients of the Cox model for each penalty, `(penalties, dim)`.

    What is minimised is `penalty / 2 * |b|^2` less the logarithm of the partial likelihood, ties by Breslow's method.

    Args:
        x: `(n, dim)`, standardised by the caller.
        labels: `(n, 2)`: time, and 1 where the event was seen.
        penalties: above 0.

    Raises:
        ValueError: no event was seen.

    Source: Cox, Regression Models and Life-Tables, 1972; Breslow, Covariance Analysis of Censored Survival Data, 1974.
    """
    if not labels[:, 1].any():
        raise ValueError("no event was seen: a Cox model has nothing to learn from")
    # Of more features than rows only the span of the rows has coefficients, for any penalty above 0: fit in its basis.
    basis = np.linalg.svd(x, full_matrices=False)[2] if x.shape[1] > len(x) else np.eye(x.shape[1])
    order = np.argsort(-labels[:, 0], kind="stable")
    time, event, rows = labels[order, 0], labels[order, 1], x[order] @ basis.T
    # In descending time, those at risk with row i are all up to the last row of its time.
    first, last = np.searchsorted(-time, -time, "left"), np.searchsorted(-time, -time, "right") - 1

    def loss(b: Array, penalty: float) -> tuple[float, Array]:
        risk = rows @ b
        hazard = np.exp(risk - risk.max())
        at_risk = np.cumsum(hazard)[last]
        log_likelihood = event @ (risk - risk.max() - np.log(at_risk))
        cumulative = np.cumsum((event / at_risk)[::-1])[::-1][first]
        slope = rows.T @ (event - hazard * cumulative)
        return float(penalty / 2 * b @ b - log_likelihood), penalty * b - slope

    found = np.zeros((len(penalties), rows.shape[1]))
    start = np.zeros(rows.shape[1])
    for k in np.argsort(penalties)[::-1]:  # from the strongest, each begins where the last one ended
        fit = minimize(
            loss, start, (penalties[k],), "L-BFGS-B", jac=True, options={"maxiter": 2000, "ftol": 1e-11, "gtol": 1e-6}
        )
        found[k] = start = fit.x
    coefficients: Array = found @ basis
    return coefficients


def risk_halves(labels: Array, is_high: Array) -> dict[str, Any]:
    """Kaplan-Meier curves of those at high and at low risk, and the log-rank test between them; plain values.

    The test takes rows for independent: give one row a patient.

    Args:
        labels: `(n, 2)`: time, and 1 where the event was seen.
        is_high: `(n,)`, which rows are of the half at high risk.

    Returns:
        `log_rank_p`, None where a half is empty; and `halves`, each with `name`, `num`, `num_events`, `times` and
        `survival`, which holds from its time on; the curve begins at 0 with 1.
    """
    halves, samples = [], []
    for name, rows in (("low risk", labels[~is_high]), ("high risk", labels[is_high])):
        seen = rows[:, 1].astype(bool)
        curve = {"name": name, "num": len(rows), "num_events": int(seen.sum()), "times": [0.0], "survival": [1.0]}
        if len(rows):
            samples.append(CensoredData(uncensored=rows[seen, 0], right=rows[~seen, 0]))
            function = ecdf(samples[-1]).sf
            curve["times"] += function.quantiles.tolist()
            curve["survival"] += function.probabilities.tolist()
        halves.append(curve)
    p = float(logrank(*samples).pvalue) if len(samples) == 2 else np.nan
    return {"log_rank_p": p if np.isfinite(p) else None, "halves": halves}
