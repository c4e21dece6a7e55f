"""What would make a result too good: named checks, which run before anything is scored.

`patients`: a patient on two sides. `duplicates`: the same image on two sides. `padding`: how far a patch is padded
predicts the label by itself. Those refuse. `repeated_layers` and `extent` only warn: where an edge was repeated to fill
a patch, and columns that say how large a crop was; what they predict by themselves stands in the results.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.evaluation.folds import Part, shared_patients
from fmcib_ssl.evaluation.frozen_probes import LINEAR_PROBE, PROBES, Inputs
from fmcib_ssl.evaluation.metrics import METRICS
from fmcib_ssl.evaluation.scoring import Setup, estimate, score
from fmcib_ssl.types import Preprocessing

Array = npt.NDArray[Any]

#: Checks that refuse, by the name that `allow_leakage` takes.
REFUSING = ("patients", "duplicates", "padding")
#: Root mean squared distance, in standard deviations of each feature, below which two rows are one image.
SAME_IMAGE = 0.02
#: Features of fewer columns may agree by chance.
MIN_DIM = 16
#: An interval wholly above this is taken for a leak: chance is 0.5 for an AUC, 0 for a rank correlation.
MARGIN = {"AUC": 0.6, "C-index": 0.6, "Spearman": 0.2}
#: Columns that say how large a crop was.
EXTENT_COLUMN = re.compile(r"n[xyz]|num_slices|(crop_|patch_)?(size|extent|shape)(_mm)?_[xyz](_mm)?", re.IGNORECASE)

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
        low: of its interval.
        high: of its interval.
        metric: what `value` is.
    """

    check: str
    found: bool
    refuses: bool
    message: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    metric: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def refused(findings: Sequence[Finding], allowed: Collection[str]) -> list[Finding]:
    """Those that end the run."""
    return [finding for finding in findings if finding.found and finding.refuses and finding.check not in allowed]


def check_patients(parts: Sequence[Part], patients: Array) -> Finding:
    """Whether a patient stands on two sides of a split."""
    shared = sorted({str(name) for part in parts for name in shared_patients(part, patients)})
    tested = sum(int(np.isin(patients[part.test], shared).sum()) for part in parts)
    text = "no patient stands on two sides"
    if shared:
        text = (
            f"{len(shared)} patients stand on two sides, such as {', '.join(shared[:3])}; {tested} test lesions are of "
            "such patients"
        )
    return Finding("patients", bool(shared), True, text)


def check_duplicates(name: str, x: Array, parts: Sequence[Part], lesion_ids: Array) -> Finding:
    """Whether two lesions with the same features stand on two sides."""
    if x.shape[1] < MIN_DIM:
        return Finding("duplicates", False, True, f"{name}: {x.shape[1]} columns are too few to tell images apart")
    pairs = same_images(x)
    across = np.zeros(len(pairs), dtype=bool)
    for part in parts:
        side = np.zeros(len(x), dtype=np.int64)
        side[part.train], side[part.test] = 1, 2
        if part.val is not None:
            side[part.val] = 3
        a, b = side[pairs[:, 0]], side[pairs[:, 1]]
        across |= (a != b) & (a > 0) & (b > 0)
    if not across.any():
        return Finding("duplicates", False, True, f"{name}: no image stands on two sides")
    first, second = lesion_ids[pairs[across][0]]
    text = f"{name}: {int(across.sum())} pairs of lesions on two sides are the same image, such as {first} and {second}"
    if len(pairs) > len(x):
        text += "; that many may also mean an encoder that gives everything the same features"
    return Finding("duplicates", True, True, text)


def same_images(x: Array, tolerance: float = SAME_IMAGE, chunk: int = 1024, most: int = 100_000) -> Array:
    """Pairs of rows nearer than `tolerance` in standardised root mean squared distance, `(pairs, 2)`."""
    spread = x.std(axis=0)
    z = ((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)[:, spread > 0]
    if not z.shape[1]:
        z = np.zeros((len(x), 1), dtype=np.float32)
    squares = np.square(z).sum(1)
    found: list[Array] = []
    for start in range(0, len(z), chunk):
        block = z[start : start + chunk]
        distance = (squares[start : start + chunk, None] + squares - 2 * block @ z.T) / z.shape[1]
        rows, others = np.nonzero(distance < tolerance**2)
        rows = rows + start
        found.append(np.stack([rows, others], 1)[rows < others])
        if sum(map(len, found)) > most:
            break
    return np.concatenate(found)[:most]


def border_layers(voxels: Array, padding: float) -> tuple[Array, Array]:
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


def check_patch_borders(voxels: Array, preprocessing: Preprocessing, setup: Setup) -> list[Finding]:
    """Whether padding, or the repeated edges of a crop, predict the label without looking at the lesion.

    Args:
        voxels: normalised patches, flattened, `(n, z * y * x)`.
        preprocessing: how they were cut and normalised.
        setup: the evaluation.
    """
    padding = (preprocessing.padding_hu + preprocessing.hu_offset) / preprocessing.hu_scale
    padded, repeated = border_layers(voxels.reshape(len(voxels), *preprocessing.patch_size_zyx), padding)
    found = _measured("padding", "layers of padding at the patch's faces", padded, setup, refuses=True)
    if found.found:
        cure = "Patches that repeat the scan's nearest voxel have none: train with data.padding=edge, and embed again"
        found = replace(found, message=f"{found.message}. {cure}")
    return [
        found,
        _measured("repeated_layers", "layers repeated to fill the patch", repeated, setup, refuses=False),
    ]


def check_extent_columns(lesions: pd.DataFrame, setup: Setup, columns: Sequence[str] | None = None) -> list[Finding]:
    """Whether columns with the extent of a crop predict the label; by default those that are named like one."""
    if columns is None:
        columns = [str(name) for name in lesions if EXTENT_COLUMN.fullmatch(str(name))]
    numbers = lesions[list(columns)].apply(pd.to_numeric, errors="coerce").dropna(axis=1)
    if not numbers.shape[1]:
        return []
    text = f"the columns {', '.join(map(str, numbers))} (not given to any probe)"
    return [_measured("extent", text, numbers.to_numpy(np.float64), setup, refuses=False)]


def _measured(check: str, what: str, x: Array, setup: Setup, *, refuses: bool) -> Finding:
    """What a linear probe learns from a few columns alone."""
    if not np.ptp(x, axis=0).any():
        return Finding(check, False, refuses, f"{what}: the same for every lesion")
    kind = setup.labels.kind
    name, metric = next(iter(METRICS[kind].items()))
    inputs = Inputs(check, x.astype(np.float64), linear_only=True)
    try:
        found = score(PROBES[LINEAR_PROBE[kind]], inputs, setup)
        told = estimate(metric, setup.labels.values, found, setup.weights(_NUM_RESAMPLES))
    except ValueError as error:
        return Finding(check, False, refuses, f"{what}: could not be measured: {error}")
    fired = told.low > MARGIN[name]
    verb = "predict" if fired else "hardly predict"
    text = (
        f"{what} {verb} {setup.labels.name} by themselves: {name} {told.value:.3f} ({told.low:.3f} to {told.high:.3f})"
    )
    return Finding(check, fired, refuses, text, told.value, told.low, told.high, name)
