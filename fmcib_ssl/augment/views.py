"""What a view is: a function of a patch and a seed, made for a whole batch at once on whatever device that is on.

A transform draws what is random in one step and changes images in another, so any view can be made again from its
parameters and looked into. What is drawn for a view follows from its seed alone, whatever else is in the batch; on a
CPU and a GPU the views are the same to rounding.

A generator with a state would give other numbers on a GPU than on a CPU, and other ones again in another batch. Here a
number is a hash of (seed, counter) in wrapping 32-bit arithmetic, which every device does alike: `uniforms`, `normals`.

Source: counter-based generators as in Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; the mixing
function is `lowbias32` of Wellons 2018, applied twice, with one half of a key before each; the key is the seed after
three rounds of a Feistel network.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Size = tuple[int, int, int]

#: What one transform has drawn for a batch: tensors by name, one row a view, on the CPU. `active` is among them, and
#: says which views the transform changes.
Params = dict[str, Tensor]

#: Voxels that are worked on at a time: on a GPU so many that it is busy, and still a small part of its memory (some ten
#: float32 numbers a voxel); on a CPU so many that calling torch costs little beside the work.
_CHUNK_VOXELS = {"cpu": 2**20, "other": 2**26}

#: A view of more voxels than this has a CPU to itself: it stays in a core's own cache, and little is gained by calling
#: torch less often.
_ALONE_ON_CPU_VOXELS = 2**15


class BatchedTransform(ABC):
    """A random transform of a batch of images in HU: a subclass says what is drawn, and what is done with it.

    Args:
        prob: probability that an image is changed.

    Raises:
        ValueError: `prob` is not in [0, 1].
    """

    def __init__(self, prob: float) -> None:
        self.prob = in_range("prob", prob, 0, 1)

    @abstractmethod
    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw everything that is random for `n` images.

        Args:
            seeds: one an image, on the CPU; its parameters follow from its own seed alone.
            size_zyx: voxels of the images that will be transformed.
        """

    def prepare(self, own: Params, size_zyx: Size, device: torch.device) -> Params:
        """What `change` needs of all active images of a batch, one row each; by default what was drawn, on `device`."""
        return {name: values.to(device, non_blocking=True) for name, values in own.items()}

    @abstractmethod
    def change(self, images: Float[Tensor, "m 1 z y x"], own: Params) -> Float[Tensor, "m 1 z y x"]:
        """Change images in HU.

        Args:
            images: float32, only those that are active; may be written to.
            own: their rows of what `prepare` gave.
        """

    def size_after(self, size_zyx: Size) -> Size:
        """Voxels of what leaves the transform. One that changes the size has to be active for all images."""
        return size_zyx

    def apply(self, images: Float[Tensor, "n 1 z y x"], params: Params) -> Float[Tensor, "n 1 z_out y_out x_out"]:
        """Transform images in HU as the parameters say; the images are left as they are."""
        return _applied(images, [(self, params)])

    def __call__(self, images: Tensor, seeds: Int64[Tensor, " n"]) -> Float[Tensor, "n 1 z_out y_out x_out"]:
        """Draw and apply."""
        return self.apply(images, self.draw(seeds.cpu(), size_of(images)))

    def _draw(self, seeds: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Which images are changed, `(n,)`, and further numbers within (0, 1), `(n, num)`."""
        drawn = uniforms(seeds, num + 1)
        return drawn[:, 0] < self.prob, drawn[:, 1:]


class BatchedViews:
    """Makes views of batches of patches: random transforms in HU, one after the other.

    Args:
        transforms: by name, applied in their order. The name decides, with the seed, what a transform draws: to leave
            one out does not change the others.

    Raises:
        ValueError: `transforms` is empty.
    """

    def __init__(self, transforms: Mapping[str, BatchedTransform]) -> None:
        if not transforms:
            raise ValueError("no transforms: the views of a patch would all be the same; give at least one.")
        self.transforms = dict(transforms)
        self.patch_by_patch = any(getattr(transform, "patch_by_patch", False) for transform in transforms.values())

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> dict[str, Params]:
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

    def apply(self, patches: Tensor, params: Mapping[str, Params]) -> Float[Tensor, "n 1 z y x"]:
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
def _applied(patches: Tensor, drawn: Sequence[tuple[BatchedTransform, Params]]) -> Tensor:
    """Apply transforms with their parameters one after the other, to as many patches at a time as is good."""
    device, size = patches.device, size_of(patches)
    steps, voxels = [], math.prod(size)
    with torch.autocast(device.type, enabled=False), _full_precision():
        for transform, params in drawn:
            active = params["active"].nonzero()[:, 0]
            if len(active):
                own = transform.prepare({name: values[active] for name, values in params.items()}, size, device)
                steps.append((transform, active.tolist(), own))
            size = transform.size_after(size)
            voxels = max(voxels, math.prod(size))
        at_a_time = max(1, _CHUNK_VOXELS.get(device.type, _CHUNK_VOXELS["other"]) // voxels)
        if device.type == "cpu" and voxels > _ALONE_ON_CPU_VOXELS:
            at_a_time = 1
        views = torch.empty((len(patches), 1, *size), device=device)
        for first in range(0, len(patches), at_a_time):
            images = patches[first : first + at_a_time].to(torch.float32, copy=True)
            for transform, rows, own in steps:
                low, high = (bisect_left(rows, row) for row in (first, first + len(images)))
                part = {name: values[low:high] for name, values in own.items()}
                if high - low == len(images):
                    images = transform.change(images, part)
                elif high > low:
                    # Built here and sent, not built there: that would wait for all that the device still has to do.
                    index = torch.tensor(rows[low:high]).sub_(first).to(device, non_blocking=True)
                    images.index_copy_(0, index, transform.change(images[index], part))
            if images.shape[1:] != views.shape[1:]:  # a list of MONAI's does not say before
                views = views.new_empty((len(patches), *images.shape[1:]))
            views[first : first + at_a_time] = images
    return views


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiplies matrices in float32 whatever the run has chosen: HU have more digits than TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant


def _mix(x: Tensor) -> Tensor:
    """Scramble int32 numbers in place; one to one. The masks make the shifts logical."""
    for shift, factor in ((16, _signed(0x7FEB352D)), (15, _signed(0x846CA68B)), (16, 1)):
        high = x >> shift
        high &= 2 ** (32 - shift) - 1
        x ^= high
        if factor != 1:
            x *= factor
    return x


def _hash(seeds: Int64[Tensor, " n"], first: int, num: int) -> Tensor:
    """int32 `(n, num)`: the numbers `first` to `first + num - 1` of each seed's sequence."""
    # A view, not a cast: what a cast makes of numbers that do not fit differs between devices.
    low, high = seeds.contiguous().view(torch.int32).view(-1, 2).unbind(1)
    # Three rounds make two words for each seed in which similar seeds have nothing in common, and no two seeds have the
    # same two. Without them the second number of seed 0 would be the first of seed 1.
    weyl = _signed(0x9E3779B9)
    high = high ^ _mix(low + weyl)
    low = low ^ _mix(high + weyl)
    high = high ^ _mix(low + weyl)
    x = _mix(torch.arange(first, first + num, dtype=torch.int32, device=seeds.device) ^ low[:, None])
    x += high[:, None]
    return _mix(x)


def derived_seeds(seeds: Int64[Tensor, " n"], name: str) -> Int64[Tensor, " n"]:
    """Seeds for one purpose, independent of those for another name."""
    words = _hash(seeds, _signed(zlib.crc32(name.encode())) // 2 * 2, 2).long()
    return (words[:, 0] << 32) | (words[:, 1] & 0xFFFFFFFF)


def uniforms(seeds: Int64[Tensor, " n"], num: int) -> Float[Tensor, "n num"]:
    """Numbers within (0, 1), float64, `num` for each seed."""
    return (_hash(seeds, 0, num).double() + (2**31 + 0.5)) / 2**32


def normals(seeds: Int64[Tensor, " n"], num: int) -> Float[Tensor, "n num"]:
    """Standard normal numbers, float32, `num` for each seed, on the seeds' device.

    Box and Muller's transform of 24-bit uniform numbers, so none lies beyond 6 standard deviations.
    """
    half = (num + 1) // 2
    words = _hash(seeds, 0, 2 * half)
    words = (words >> 8).bitwise_and_(0xFFFFFF).float()
    radius = words[:, :half].add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = words[:, half:].mul_(2 * math.pi * 2.0**-24)
    normal = torch.empty_like(words)
    torch.cos(angle, out=normal[:, :half])
    torch.sin(angle, out=normal[:, half:])
    normal[:, :half] *= radius
    normal[:, half:] *= radius
    return normal[:, :num]
