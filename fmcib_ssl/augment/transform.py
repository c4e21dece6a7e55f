"""What a transform of a batch is: parameters drawn in one place, applied in another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fmcib_ssl.augment.streams import uniforms
from fmcib_ssl.augment.work import Step, Work

Size = tuple[int, int, int]

#: Parameters of one transform for a batch: a NamedTuple of CPU tensors with one row a view. The first of them,
#: `active`, says which views the transform changes.
P = TypeVar("P", bound=tuple[Tensor, ...])


class BatchedTransform(ABC, Generic[P]):
    """A random transform of a batch of views in HU.

    Args:
        prob: probability that a view is changed.

    Raises:
        ValueError: `prob` is no probability.
    """

    def __init__(self, prob: float) -> None:
        self.prob = in_range("prob", prob, 0, 1)

    @abstractmethod
    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> P:
        """Draw everything that is random for `n` views.

        Args:
            seeds: one a view, on the CPU; a view's parameters follow from its own seed alone.
            size_zyx: voxels of the images that will be transformed.
        """

    @abstractmethod
    def steps(self, params: P, size_zyx: Size, device: torch.device) -> Sequence[Step]:
        """Put into steps what `params` ask for.

        Args:
            params: as drawn, on the CPU.
            size_zyx: voxels of the images.
            device: where the images are.
        """

    def size_after(self, size_zyx: Size) -> Size:
        """Voxels of what leaves the transform."""
        return size_zyx

    def apply(self, images: Float[Tensor, "n 1 z y x"], params: P) -> Float[Tensor, "n 1 z_out y_out x_out"]:
        """Transform images in HU as the parameters say; the images are left as they are."""
        with torch.no_grad():
            work = Work(images)
            work.run(self.steps(params, size_of(images), images.device))
            return work.finished()

    def _draw(self, seeds: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Which views are changed, `(n,)`, and further numbers within (0, 1), `(n, num)`."""
        drawn = uniforms(seeds, num + 1)
        return drawn[:, 0] < self.prob, drawn[:, 1:]


def chosen(params: P, rows: Tensor | slice | list[int], device: torch.device | None = None) -> P:
    """Parameters of some of the views, on a device."""
    tensors: Any = params
    found = [tensor[rows] if device is None else tensor[rows].to(device, non_blocking=True) for tensor in tensors]
    return type(params)(*found)


def active_rows(params: P, device: torch.device) -> tuple[P, list[int]]:
    """Parameters of the views that a transform changes, on a device, and which views those are."""
    rows = params[0].nonzero()[:, 0]
    return chosen(params, rows, device), rows.tolist()


def size_of(images: Tensor) -> Size:
    """Voxels along z, y, x."""
    z, y, x = images.shape[-3:]
    return z, y, x


def within(drawn: Tensor, low_high: tuple[float, float]) -> Tensor:
    """Numbers within (0, 1), moved into an interval; float32."""
    low, high = low_high
    return (low + drawn * (high - low)).float()


def in_range(name: str, value: float, low: float, high: float) -> float:
    """Return a number that is within bounds.

    Raises:
        ValueError: it is not.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be within {low:g} to {high:g}.")
    return value


def interval(name: str, values: Sequence[float], low: float, high: float = float("inf")) -> tuple[float, float]:
    """Return an ordered pair that is within bounds.

    Raises:
        ValueError: it is not.
    """
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        bounds = f"{low:g} <= low <= high" + (f" <= {high:g}" if high < float("inf") else "")
        raise ValueError(f"{name} is {tuple(values)}; it must be (low, high) with {bounds}.")
    return values[0], values[1]
