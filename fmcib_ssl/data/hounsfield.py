"""Are the values of a scan Hounsfield units? Decided by where its air and its soft tissue lie.

A chest CT has two peaks, air and lung near -1000 to -850 and soft tissue and fat between -120 and 80; a crop of lung
has the first alone, a crop of liver the second. Refused is what no CT of a patient can be, and what stored values,
other units or other modalities look like; small crops, implants and scans without air pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fmcib_ssl.data.tables import ScanError

#: A scan in HU holds air or at least fat somewhere; one that stays above this is not in HU.
HIGHEST_MINIMUM_HU = -50
#: Values of one number below this are what scanners write outside their field of view.
PADDING_BELOW_HU = -1100
#: Where the peaks of air (with lung) and soft tissue (with fat) are looked for.
AIR_HU = (-1100, -600)
SOFT_TISSUE_HU = (-200, 300)
#: Where they are in every CT in order; a peak elsewhere is worth a look.
USUAL_AIR_HU = (-1050, -650)
USUAL_SOFT_TISSUE_HU = (-150, 150)
#: A range that holds less than this part of a scan has no peak.
MIN_PEAK = 0.1
#: Above the range of int16 are a few voxels of metal; a scan with more than this part of them is not in HU.
MAX_CLIPPED = 0.01
#: Voxels that are looked at.
_NUM_SAMPLES = 2_000_000
_BIN_HU = 10


@dataclass(frozen=True)
class HuSummary:
    """The values of a scan.

    Attributes:
        hu_min: lowest.
        hu_max: highest, before clipping.
        air_peak_hu: commonest value of air and lung, to 10 HU; None if they are less than 10 % of the scan.
        soft_tissue_peak_hu: the same of soft tissue and fat.
        padding: part of the scan that is padding below -1100.
        num_clipped: voxels above 32767, which are read as 32767.
    """

    hu_min: float
    hu_max: float
    air_peak_hu: float | None
    soft_tissue_peak_hu: float | None
    padding: float
    num_clipped: int

    def unusual(self) -> str:
        """What is worth a look, or nothing."""
        notes = []
        for name, peak, (low, high) in (
            ("air", self.air_peak_hu, USUAL_AIR_HU),
            ("soft tissue", self.soft_tissue_peak_hu, USUAL_SOFT_TISSUE_HU),
        ):
            if peak is not None and not low <= peak <= high:
                notes.append(f"{name} at {peak:g} HU, usual is {low} to {high}")
        if self.air_peak_hu is None and self.soft_tissue_peak_hu is None:
            notes.append("neither air nor soft tissue")
        if self.num_clipped:
            notes.append(f"{self.num_clipped} voxels above 32767 HU are read as 32767")
        return "; ".join(notes)


def as_hu(
    values: npt.NDArray[Any], path: Path | str
) -> tuple[npt.NDArray[np.int16] | npt.NDArray[np.float32], HuSummary]:
    """The values of a file as int16 or float32 within the range of int16, if they can be HU, and a summary of them.

    Raises:
        ScanError: NaN or Inf, a constant image, or values that are not HU.
    """
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ScanError(path, f"holds {np.count_nonzero(~np.isfinite(values))} voxels that are NaN or Inf")
    if lowest == highest:
        raise ScanError(path, f"is constant: every voxel is {lowest}")
    limits = np.iinfo(np.int16)
    num_clipped = int(np.count_nonzero(values > limits.max)) if highest > limits.max else 0
    # An odd step, so that no axis is sampled in its rhythm.
    sample = values.reshape(-1)[:: max(1, values.size // _NUM_SAMPLES) | 1].astype(np.float32)
    tissue = _without_padding(sample)
    problem = _problem(tissue, float(lowest), float(highest))
    if num_clipped > MAX_CLIPPED * values.size:
        problem = f"{num_clipped / values.size:.0%} of it lies above {limits.max}"
    if problem:
        raise ScanError(
            path,
            f"has values from {lowest:g} to {highest:g}, which is not CT in HU (air -1000, fat -100, water 0): "
            f"{problem}",
        )
    summary = HuSummary(
        float(lowest), float(highest), _peak(tissue, AIR_HU), _peak(tissue, SOFT_TISSUE_HU),
        1 - tissue.size / sample.size, num_clipped,
    )  # fmt: skip
    if num_clipped or lowest < limits.min:
        values = np.clip(values, limits.min, limits.max)
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int16, copy=False), summary
    return values.astype(np.float32, copy=False), summary


def _without_padding(sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A sample of voxels without those of a number far below air that many of them share."""
    below = sample[sample < PADDING_BELOW_HU]
    if not below.size:
        return sample
    numbers, counts = np.unique(below, return_counts=True)
    return sample[~np.isin(sample, numbers[counts >= max(0.2 * below.size, 1e-3 * sample.size)])]


def _problem(tissue: npt.NDArray[np.float32], lowest: float, highest: float) -> str | None:
    """Why values cannot be HU, and what they may be; None if they can."""

    def part(low: float, high: float) -> float:
        return float(np.count_nonzero((tissue >= low) & (tissue < high)) / tissue.size)

    if lowest > HIGHEST_MINIMUM_HU or highest < lowest + 100 or not tissue.size:
        return "its rescale slope and intercept were not applied, or are not right"
    inf = float("inf")
    far_below, below = part(-inf, -1500), part(-inf, PADDING_BELOW_HU)
    if far_below > 0.05 or (below > 0.05 and part(*SOFT_TISSUE_HU) < 0.01):
        return f"{below:.0%} of it lies below air; is the intercept applied twice, or the unit a tenth of a HU?"
    if part(-600, inf) < 0.002 and np.median(tissue) < -920:
        return "nothing in it is denser than lung; is the intercept applied twice?"
    # Bone goes on above and below; air that is inverted, or soft tissue without its intercept, does not.
    dense = part(700, 1150)
    if dense > 0.05 and part(*AIR_HU) < 0.02 and part(200, 700) < dense / 2 and part(1150, inf) < dense / 4:
        return f"{dense:.0%} of it is as dense as bone and none is air; is it inverted, or without its intercept?"
    if part(-inf, HIGHEST_MINIMUM_HU) < 0.002 and part(300, inf) > 0.1:
        return (
            f"nothing in it is air or fat, and {part(300, inf):.0%} is denser than soft tissue; apply the rescale "
            "slope and intercept, or is it no CT?"
        )
    return None


def _peak(tissue: npt.NDArray[np.float32], within: tuple[int, int]) -> float | None:
    """The commonest value within a range, to 10 HU."""
    counts, edges = np.histogram(tissue, np.arange(within[0], within[1] + 1, _BIN_HU))
    if counts.sum() < MIN_PEAK * tissue.size:
        return None
    smooth = np.convolve(counts, np.ones(5), mode="same")
    return float(edges[int(smooth.argmax())] + _BIN_HU / 2)
