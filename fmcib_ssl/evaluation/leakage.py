"""Data leakage, which would make results optimistic: named checks, which run before anything is scored.

`patients`: a patient on two sides. `duplicates`: the same image on two sides. `padding`: how far a patch is padded
predicts the label by itself. Those refuse. `repeated_layers` only warns: where an edge was repeated to fill a patch.
What the layers predict by themselves stands in the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fmcib_ssl.evaluation.labels import Split, shared_patients
from fmcib_ssl.evaluation.metrics import METRICS
from fmcib_ssl.evaluation.probes import LINEAR_PROBE, PROBES, Inputs, Protocol, estimate, score
from fmcib_ssl.types import Array, Preprocessing

#: Root mean squared distance, in standard deviations of each feature, below which two rows are one image.
_SAME_IMAGE = 0.02
#: Features of fewer columns may agree by chance.
_MIN_DIM = 16
#: An interval wholly above this is taken for a leak: chance is 0.5 for an AUC, 0 for a rank correlation.
_MARGIN = {"AUC": 0.6, "C-index": 0.6, "Spearman": 0.2}
_NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        found: whether it fired.
        refuses: whether the run ends unless it is allowed.
        message: for the user.
        value: how well the finding predicts the label by itself, where that was measured.
        low: lower end of the 95 % interval.
        high: its upper end.
        metric: such as "AUC", of `value`.
    """

    check: str
    found: bool
    refuses: bool
    message: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    metric: str | None = None


def check_patients(splits: Sequence[Split], patients: Array) -> Finding:
    """Whether a patient is on more than one side of a split."""
    shared = sorted({str(name) for split in splits for name in shared_patients(split, patients)})
    if not shared:
        return Finding("patients", False, True, "no patient is on more than one side of the split")
    tested = sum(int(np.isin(patients[split.test], shared).sum()) for split in splits)
    text = f"{len(shared)} patients are on more than one side of the split, such as {', '.join(shared[:3])}"
    return Finding("patients", True, True, f"{text}; {tested} test lesions belong to them")


def check_duplicates(name: str, x: Array, splits: Sequence[Split], lesion_ids: Array) -> Finding:
    """Whether two lesions on different sides of a split have the same features."""
    if x.shape[1] < _MIN_DIM:
        return Finding("duplicates", False, True, f"{name}: {x.shape[1]} columns are too few to tell images apart")
    pairs = _same_images(x)
    across = np.zeros(len(pairs), dtype=bool)
    for split in splits:
        side = np.zeros(len(x), dtype=np.int64)
        for number, rows in enumerate((split.train, split.test, split.val), start=1):
            side[[] if rows is None else rows] = number
        a, b = side[pairs].T
        across |= (a != b) & (a > 0) & (b > 0)
    if not across.any():
        return Finding("duplicates", False, True, f"{name}: no image is on more than one side of the split")
    first, second = lesion_ids[pairs[across][0]]
    text = f"{name}: {across.sum()} pairs of lesions on different sides are the same image, such as {first}, {second}"
    if len(pairs) > len(x):
        text += "; that many may also mean an encoder that gives everything the same features"
    return Finding("duplicates", True, True, text)


def _same_images(x: Array, tolerance: float = _SAME_IMAGE, chunk: int = 1024, max_pairs: int = 100_000) -> Array:
    """Pairs of rows nearer than `tolerance` in standardised root mean squared distance, `(pairs, 2)`."""
    spread = x.std(axis=0)
    z = ((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)[:, spread > 0]
    if not z.shape[1]:
        z = np.zeros((len(x), 1), dtype=np.float32)
    squares = np.square(z).sum(1)
    pairs: list[Array] = []
    for start in range(0, len(z), chunk):
        block = z[start : start + chunk]
        distance = (squares[start : start + chunk, None] + squares - 2 * block @ z.T) / z.shape[1]
        rows, others = np.nonzero(distance < tolerance**2)
        pairs.append(np.stack([rows + start, others], 1)[rows + start < others])
        if sum(map(len, pairs)) > max_pairs:
            break
    return np.concatenate(pairs)[:max_pairs]


def _border_layers(voxels: Array, padding: float) -> tuple[Array, Array]:
    """How many layers at each of the six faces are nothing but padding, and how many repeat the one further in.

    Args:
        voxels: `(n, z, y, x)`.
        padding: the value outside the scan; the lowest there is.

    Returns:
        Two `(n, 6)`, in the order first z, last z, first y, ...
    """
    padded, repeated = [], []
    for axis in (1, 2, 3):
        layers = np.moveaxis(voxels, axis, 1).reshape(len(voxels), voxels.shape[axis], -1)
        empty = np.asarray(np.all(layers <= padding + 1e-6, axis=2))
        same = np.asarray(np.all(layers[:, 1:] == layers[:, :-1], axis=2))
        for step in (1, -1):
            padded.append(np.cumprod(empty[:, ::step], axis=1).sum(axis=1))
            repeated.append(np.cumprod(same[:, ::step], axis=1).sum(axis=1))
    outside = np.stack(padded, axis=1)
    return outside, np.maximum(np.stack(repeated, axis=1) - np.maximum(outside - 1, 0), 0)


def check_patch_borders(voxels: Array, preprocessing: Preprocessing, protocol: Protocol) -> list[Finding]:
    """Whether padding, or the repeated edges of a crop, predict the label without looking at the lesion.

    Args:
        voxels: normalised patches, flattened, `(n, z * y * x)`.
        preprocessing: gives the patches' shape and the normalised value of padding.
        protocol: labels, patients and splits to measure on.
    """
    padding = (preprocessing.padding_hu + preprocessing.hu_offset) / preprocessing.hu_scale
    padded, repeated = _border_layers(voxels.reshape(len(voxels), *preprocessing.patch_size_zyx), padding)
    finding = _measured("padding", "layers of padding at the patch's faces", padded, protocol, refuses=True)
    if finding.found:
        cure = "Patches that repeat the scan's nearest voxel have none: train with data.padding=edge, and embed again"
        finding = replace(finding, message=f"{finding.message}. {cure}")
    return [finding, _measured("repeated_layers", "layers repeated to fill the patch", repeated, protocol)]


def _measured(check: str, what: str, x: Array, protocol: Protocol, *, refuses: bool = False) -> Finding:
    """What a linear probe learns from a few columns alone."""
    if not np.ptp(x, axis=0).any():
        return Finding(check, False, refuses, f"{what}: the same for every lesion")
    labels = protocol.labels
    name, metric = next(iter(METRICS[labels.kind].items()))
    try:
        results = score(PROBES[LINEAR_PROBE[labels.kind]], Inputs(check, x.astype(np.float64)), protocol)
        measured = estimate(metric, labels.values, results, protocol.weights(_NUM_RESAMPLES))
    except ValueError as error:
        return Finding(check, False, refuses, f"{what}: could not be measured: {error}")
    found = measured.low > _MARGIN[name]
    verb = "predict" if found else "hardly predict"
    text = f"{what} {verb} {labels.name} by themselves: {name} {measured:.3f}"
    return Finding(check, found, refuses, text, measured.value, measured.low, measured.high, name)
