"""What the rooms of the package hand each other.

`data` and `models` know nothing of each other; they agree on the names in this file.
Importing it costs little: torch is needed only by a type checker.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

#: An array of NumPy's; its shape stands where it is described.
Array = npt.NDArray[Any]

#: What lies outside a scan, and what a patch is padded with, in Hounsfield units: air.
PADDING_HU = -1024

#: What stands in a patch outside the scan: `padding_hu`, or the nearest voxel of the scan.
Padding = Literal["constant", "edge"]


#: The methods and, in the first version, their modules.
_METHODS = {
    "BYOL": "byol", "DenoisingAutoencoder": "denoising", "MinedContrast": "mined_contrast", "NNCLR": "nnclr",
    "SimCLR": "simclr", "SwAV": "swav", "VICReg": "vicreg",
}  # fmt: skip
#: Names of parts in files of earlier versions and in users' experiments, and what they are called today. Of several old
#: names of a part the one that shipped configs had comes first: the names of run folders are made from it.
RENAMED_TARGETS = {
    **{f"fmcib_ssl.methods.{name}": f"fmcib_ssl.models.{name}" for name in _METHODS},
    **{f"fmcib_ssl.methods.{module}.{name}": f"fmcib_ssl.models.{name}" for name, module in _METHODS.items()},
    "fmcib_ssl.augment.RandomSurroundings": "fmcib_ssl.augment.RandomContextRemoval",
    "fmcib_ssl.models.concentric.ConcentricResNet": "fmcib_ssl.models.encoders.CenterPooledResNet",
    "fmcib_ssl.models.heads.ProjectionHead": "fmcib_ssl.models.encoders.ProjectionHead",
    "fmcib_ssl.training.guards.NonFiniteGuard": "fmcib_ssl.training.non_finite.NonFiniteGuard",
    "fmcib_ssl.training.learning_signals.LearningSignals": "fmcib_ssl.training.collapse_monitor.CollapseMonitor",
    "fmcib_ssl.training.progress.Progress": "fmcib_ssl.training.throughput.Progress",
    "fmcib_ssl.training.schedules.constant": "fmcib_ssl.training.optimizers.constant",
    "fmcib_ssl.training.schedules.warmup_cosine": "fmcib_ssl.training.optimizers.warmup_cosine",
    "fmcib_ssl.training.tracking.MetricsFile": "fmcib_ssl.training.loggers.MetricsFile",
    "fmcib_ssl.training.tracking.TensorBoard": "fmcib_ssl.training.loggers.TensorBoard",
    "fmcib_ssl.training.tracking.WeightsAndBiases": "fmcib_ssl.training.loggers.WeightsAndBiases",
}


class UserError(Exception):
    """What a user can fix: the message says which file, row, value or option, what is allowed, and what to do.

    Commands print it without a traceback and end with exit code 1; every error of this package's own is one.
    """


class ScanError(UserError):
    """A scan that cannot be used: which file, why, and what to do if it is not simply to repair or leave it out.

    With `path` alone it is the message as a whole, as a worker of a `DataLoader` rebuilds it.
    """

    def __init__(self, path: object, reason: str = "", remedy: str = "") -> None:
        self.path = str(path)
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"{path}: {reason}" if reason else str(path))


class SampleKey(NamedTuple):
    """Names one draw: which lesion, in which epoch. Everything random about a sample follows from it."""

    epoch: int
    index: int  # type: ignore[assignment]  # the lesion's; tuple.index is of no use here


class PatchPair(TypedDict):
    """A lesion's patch and the negatives mined for it, in HU, before augmentation."""

    positive: Tensor  # int16 (1, z, y, x), canonical LPS, HU
    negative: Tensor  # the same shape; (K, 1, z, y, x) where K negatives, not one, are mined for each lesion
    lesion: int  # row number in the table of usable lesions
    negative_from_other_scan: bool  # the lesion's own scan had no legal place
    patient: NotRequired[int]  # equal for lesions of one patient, not negative


class ViewPairs(TypedDict):
    """Two views of every lesion of a batch, and two of the patch mined for it.

    As a batch the four tensors are `(batch, 1, z, y, x)`, as embeddings `(batch, dim)`. The two entries of
    `negative` may hold another number of rows than those of `positive`.
    """

    positive: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]
    lesion: NotRequired[Tensor]  # (batch,) row numbers, in batches of views
    patient: NotRequired[Tensor]  # (batch,) int64, equal for lesions of one patient
    negative_from_other_scan: NotRequired[Tensor]  # (batch,) bool


class ViewTransform(Protocol):
    """Makes a view of each patch of a batch, in HU too: a function of that patch and its seed, to rounding.

    One that has an attribute `patch_by_patch`, and it is true, is left to the workers where that can be chosen.
    """

    def __call__(self, patches: Tensor, seeds: Tensor) -> Tensor:
        """Turn int16 HU patches `(n, 1, z, y, x)` and int64 seeds `(n,)` into float32 HU views, on their device."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """How a patch is cut from a scan and turned into what the encoder sees; travels with the weights.

    Attributes:
        patch_size_zyx: voxels along z, y, x.
        spacing_mm: edge of the isotropic voxels.
        padding_hu: what stands outside the scan; also the lower bound of the intensities.
        hu_offset: added after clamping from below, HU.
        hu_scale: divisor after the offset, HU. With the defaults air is 0 and 2048 HU is 1.
        padding: "constant": outside the scan is `padding_hu`; "edge": the scan's nearest voxel, for files that were
            cropped round their lesions, where a constant would show how large the crop is.
        window_hu: lowest and highest HU that the encoder was trained on; values beyond are clamped. None: only what
            is below `padding_hu` is.
    """

    patch_size_zyx: tuple[int, int, int] = (50, 50, 50)
    spacing_mm: float = 1.0
    padding_hu: int = PADDING_HU
    hu_offset: float = 1024.0
    hu_scale: float = 3072.0
    padding: Padding = "constant"
    window_hu: tuple[float, float] | None = None

    @overload
    def normalize(self, patch_hu: Tensor) -> Tensor: ...

    @overload
    def normalize(self, patch_hu: npt.NDArray[Any]) -> npt.NDArray[np.float32]: ...

    def normalize(self, patch_hu: Tensor | npt.NDArray[Any]) -> Tensor | npt.NDArray[np.float32]:
        """HU to the encoder's range, float32: `(clamp(hu, *window) + hu_offset) / hu_scale`; of an array an array."""
        low, high = self.window_hu or (self.padding_hu, None)
        if isinstance(patch_hu, np.ndarray):
            clamped = np.clip(patch_hu.astype(np.float32), np.float32(low), high)
            return (clamped + np.float32(self.hu_offset)) / np.float32(self.hu_scale)
        return patch_hu.float().clamp(low, high).add_(self.hu_offset).div_(self.hu_scale)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without `padding` and `window_hu` where they are as before there was a choice."""
        before = {"padding": "constant", "window_hu": None}.items()
        return {key: value for key, value in asdict(self).items() if (key, value) not in before}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, also after a journey through JSON."""
        window = values.get("window_hu")
        tuples = {"patch_size_zyx": tuple(values["patch_size_zyx"]), "window_hu": window and tuple(window)}
        return cls(**{**values, **tuples})


def current_target(target: str) -> str:
    """Today's dotted name of a part that a file of an earlier version, or an experiment of the user's, names."""
    return RENAMED_TARGETS.get(target, target)


def first_target(target: str) -> str:
    """The dotted name that a part had in the first version."""
    return next((old for old, new in RENAMED_TARGETS.items() if new == target), target)


def with_current_targets(values: Any) -> Any:
    """Plain values, nested, with today's name in every `_target_`."""
    if isinstance(values, dict):
        return {
            key: current_target(value) if key == "_target_" and isinstance(value, str) else with_current_targets(value)
            for key, value in values.items()
        }
    return [with_current_targets(value) for value in values] if isinstance(values, list) else values
