"""A probe of patients with several lesions: which of them count is learned with the label.

A lesion's weight is the softmax, over the patient's lesions, of a linear function of its features; the mean with these
weights goes through a linear model, and both are fitted together.

Source: Ilse et al., Attention-based Deep Multiple Instance Learning, ICML 2018, eq. 7 and 8. Theirs has a hidden layer
with tanh under the softmax; a linear function is what some hundred patients can teach, and as its fit begins with equal
weights, which are the mean, it is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from fmcib_ssl.types import Array


def attention_scores(x: Array, y: Array, x_test: Array, num_classes: int, settings: Sequence[float]) -> Iterator[Array]:
    """Scores by attention over lesions, as of `Probe.path`; features of one row a patient are bags of one lesion.

    What is minimised is the sum of cross entropies, of squared errors / 2, or the Cox model's negative partial
    log-likelihood (Breslow), with `penalty / 2` times the squared norm of all weights: with one lesion a patient it is
    logistic regression with `C = 1 / penalty`, ridge regression, or the Cox model.

    Args:
        x: `(patients, lesions, dim)`, NaN where a patient has fewer lesions, or `(patients, dim)`.
        y: class numbers, values, or for survival time and event.
        x_test: as `x`.
        num_classes: 0 unless labels are classes.
        settings: penalties.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[np.isfinite(rows).all(axis=1)]
    # Of more features than rows only the rows' span has weights: fit in its basis.
    basis = np.linalg.svd(rows, full_matrices=False)[2].T if rows.shape[1] > len(rows) else np.eye(rows.shape[1])
    bags, test = (torch.from_numpy((part if part.ndim == 3 else part[:, None]) @ basis) for part in (x, x_test))
    dim, num_outputs = bags.shape[2], num_classes if num_classes > 2 else 1
    target, center = torch.from_numpy(y), float(y.mean()) if not num_classes and y.ndim == 1 else 0.0

    def outputs(of: Tensor, flat: Tensor) -> Tensor:
        attention, weights, bias = torch.split(flat, [dim, dim * num_outputs, num_outputs])
        scores: Tensor = attend(of, attention) @ weights.view(dim, num_outputs) + bias + center
        return scores

    def loss(values: Array, penalty: float) -> tuple[float, Array]:
        flat = torch.tensor(values, requires_grad=True)
        total = _loss(outputs(bags, flat), target, num_classes) + penalty / 2 * flat[:-num_outputs].square().sum()
        (slope,) = torch.autograd.grad(total, flat)
        return total.item(), slope.numpy()

    found, start = {}, np.zeros(dim * (1 + num_outputs) + num_outputs)
    for penalty in sorted(settings, reverse=True):  # from the strongest, each begins where the last one ended
        start = minimize(loss, start, (penalty,), "L-BFGS-B", jac=True, options={"maxiter": 300, "ftol": 1e-10}).x
        found[penalty] = outputs(test, torch.from_numpy(start))
    for penalty in settings:
        scores = found[penalty]
        if num_classes:
            scores = scores.softmax(1) if num_classes > 2 else scores.sigmoid()
        yield scores.numpy() if num_outputs > 1 else scores[:, 0].numpy()


def attend(bags: Tensor, attention: Tensor) -> Tensor:
    """Mean of a patient's lesions, `(patients, dim)`, weighed by the softmax of `lesion @ attention`."""
    is_lesion = bags.isfinite().all(dim=2)
    lesions = bags.nan_to_num()
    weights = (lesions @ attention).masked_fill(~is_lesion, -torch.inf).softmax(dim=1)
    return (weights[..., None] * lesions).sum(dim=1)


def _loss(outputs: Tensor, y: Tensor, num_classes: int) -> Tensor:
    if num_classes > 2:
        return functional.cross_entropy(outputs, y.long(), reduction="sum")
    scores = outputs[:, 0]
    if num_classes:
        return functional.binary_cross_entropy_with_logits(scores, y.double(), reduction="sum")
    if y.ndim == 1:
        return (scores - y).square().sum() / 2
    at_risk = torch.where(y[None, :, 0] >= y[:, None, 0], scores[None], -torch.inf).logsumexp(dim=1)
    return (y[:, 1] * (at_risk - scores)).sum()
