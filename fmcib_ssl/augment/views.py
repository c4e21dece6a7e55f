"""What a view is: a function of a patch and a seed, made for a whole batch at once on whatever device that is on.

A transform draws what is random in one step and changes images in another, so any view can be made again from its
parameters and looked into. What is drawn for a view follows from its seed alone, whatever else is in the batch; on a
CPU and a GPU the views are the same to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fmcib_ssl.augment.streams import derived_seeds, uniforms

Size = tuple[int, int, int]

#: Parameters of one transform for a batch: a NamedTuple of CPU tensors with one row a view. The first of them,
#: `active`, says which views the transform changes.
P = TypeVar("P", bound=tuple[Tensor, ...])

#: Voxels that are worked on at a time: on a GPU so many that it is busy, and still a small part of its memory (some ten
#: float32 numbers a voxel); on a CPU so many that calling torch costs little beside the work.
CHUNK_VOXELS = {"cpu": 2**20, "other": 2**26}

#: A view of more voxels than this has a CPU to itself: it stays in a core's own cache, and little is gained by calling
#: torch less often.
ALONE_ON_CPU_VOXELS = 2**15


class Part(NamedTuple):
    """Some images of a batch and what is done with them.

    Attributes:
        rows: which images, in ascending order.
        change: float32 images, and which of the rows they are, to new images; may write into what it gets.
    """

    rows: list[int]
    change: Callable[[Tensor, slice], Tensor]


class BatchedTransform(ABC, Generic[P]):
    """A random transform of a batch of images in HU.

    Args:
        prob: probability that an image is changed.

    Raises:
        ValueError: `prob` is not in [0, 1].
    """

    def __init__(self, prob: float) -> None:
        self.prob = in_range("prob", prob, 0, 1)

    @abstractmethod
    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> P:
        """Draw everything that is random for `n` images.

        Args:
            seeds: one an image, on the CPU; its parameters follow from its own seed alone.
            size_zyx: voxels of the images that will be transformed.
        """

    @abstractmethod
    def parts(self, params: P, size_zyx: Size, device: torch.device) -> Sequence[Part]:
        """Say what is to be done with which images, no image in two parts.

        Args:
            params: as drawn, on the CPU.
            size_zyx: voxels of the images.
            device: where the images are.
        """

    def size_after(self, size_zyx: Size) -> Size:
        """Voxels of what leaves the transform. Another size needs parts with all images in them."""
        return size_zyx

    def apply(self, images: Float[Tensor, "n 1 z y x"], params: P) -> Float[Tensor, "n 1 z_out y_out x_out"]:
        """Transform images in HU as the parameters say; the images are left as they are."""
        return _applied(images, [(self, params)])

    def __call__(self, images: Tensor, seeds: Int64[Tensor, " n"]) -> Float[Tensor, "n 1 z_out y_out x_out"]:
        """Draw and apply."""
        return self.apply(images, self.draw(seeds.cpu(), size_of(images)))

    def _draw(self, seeds: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Which images are changed, `(n,)`, and further numbers within (0, 1), `(n, num)`."""
        drawn = uniforms(seeds, num + 1)
        return drawn[:, 0] < self.prob, drawn[:, 1:]


class VoxelTransform(BatchedTransform[P]):
    """A transform that sees the voxels of whole images: a subclass says what is drawn, and what is done with it."""

    def parts(self, params: P, size_zyx: Size, device: torch.device) -> Sequence[Part]:
        """The images that are active."""
        own, rows = active_rows(params, device)
        return [Part(rows, lambda images, which: self.change(images, chosen(own, which)))]

    @abstractmethod
    def change(self, images: Float[Tensor, "m 1 z y x"], own: P) -> Float[Tensor, "m 1 z y x"]:
        """Change images in HU as their parameters say.

        Args:
            images: those that are changed; may be written to.
            own: their parameters, on the same device.
        """


class BatchedViews:
    """Makes views of batches of patches: random transforms in HU, one after the other.

    Args:
        transforms: by name, applied in their order. The name decides, with the seed, what a transform draws: to leave
            one out does not change the others.

    Raises:
        ValueError: `transforms` is empty.
    """

    def __init__(self, transforms: Mapping[str, BatchedTransform[Any]]) -> None:
        if not transforms:
            raise ValueError("no transforms: the views of a patch would all be the same; give at least one.")
        self.transforms = dict(transforms)
        self.patch_by_patch = any(getattr(transform, "patch_by_patch", False) for transform in transforms.values())

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> dict[str, Any]:
        """Parameters of `n` views by the transform's name, on the CPU; `apply` makes the views again from them.

        Args:
            seeds: one a view, of up to 64 bits.
            size_zyx: voxels of the patches.
        """
        seeds = seeds.cpu()
        params = {}
        for name, transform in self.transforms.items():
            params[name] = transform.draw(derived_seeds(seeds, name), size_zyx)
            size_zyx = transform.size_after(size_zyx)
        return params

    def apply(self, patches: Tensor, params: Mapping[str, Any]) -> Float[Tensor, "n 1 z y x"]:
        """Make the views that `params` describe, float32 HU on the device of the patches.

        Args:
            patches: HU `(n, 1, z, y, x)`, of any number type; left as they are.
            params: as drawn for them.
        """
        return _applied(patches, [(transform, params[name]) for name, transform in self.transforms.items()])

    def __call__(self, patches: Tensor, seeds: Int64[Tensor, " n"]) -> Float[Tensor, "n 1 z y x"]:
        """Make one view of each patch, float32 HU.

        Args:
            patches: HU `(n, 1, z, y, x)`, of any number type; left as they are.
            seeds: one a patch, of up to 64 bits; decides everything that is drawn for its view.
        """
        return self.apply(patches, self.draw(seeds, size_of(patches)))


@torch.no_grad()
def _applied(patches: Tensor, drawn: Sequence[tuple[BatchedTransform[Any], Any]]) -> Tensor:
    """Apply transforms with their parameters one after the other, to as many patches at a time as is good."""
    device, size = patches.device, size_of(patches)
    parts, voxels = [], size[0] * size[1] * size[2]
    with torch.autocast(device.type, enabled=False), _full_precision():
        for transform, params in drawn:
            parts.append(transform.parts(params, size, device))
            size = transform.size_after(size)
            voxels = max(voxels, size[0] * size[1] * size[2])
        at_a_time = max(1, CHUNK_VOXELS.get(device.type, CHUNK_VOXELS["other"]) // voxels)
        if device.type == "cpu" and voxels > ALONE_ON_CPU_VOXELS:
            at_a_time = 1
        views = torch.empty((len(patches), 1, *size), device=device)
        for first in range(0, len(patches), at_a_time):
            images = patches[first : first + at_a_time].to(torch.float32, copy=True)
            for its_parts in parts:
                images = _changed(images, its_parts, first)
            if images.shape[1:] != views.shape[1:]:  # a list of MONAI's does not say before
                views = views.new_empty((len(patches), *images.shape[1:]))
            views[first : first + at_a_time] = images
    return views


def _changed(images: Tensor, parts: Sequence[Part], first: int) -> Tensor:
    """Change those of the images `first`, `first + 1`, ... of a batch that are in one of the parts."""
    changed = []
    for rows, change in parts:
        low, high = (bisect_left(rows, row) for row in (first, first + len(images)))
        if high - low == len(images):
            return change(images, slice(low, high))
        if high > low:
            # Built here and sent, not built there: that would wait for all that the device still has to do.
            index = torch.tensor(rows[low:high]).sub_(first).to(images.device, non_blocking=True)
            changed.append((index, change(images[index], slice(low, high))))
    for index, some in changed:
        if some.shape[1:] != images.shape[1:]:
            images = images.new_empty((len(images), *some.shape[1:]))
        images.index_copy_(0, index, some)
    return images


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiplies matrices in float32 whatever the run has chosen: HU have more digits than TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def chosen(params: P, rows: Tensor | slice | list[int], device: torch.device | None = None) -> P:
    """Parameters of some of the images, on a device."""
    tensors: Any = params
    rows_only = (tensor[rows] for tensor in tensors)
    return type(params)(*(t if device is None else t.to(device, non_blocking=True) for t in rows_only))


def active_rows(params: P, device: torch.device) -> tuple[P, list[int]]:
    """Parameters of the images that a transform changes, on a device, and which images those are."""
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
