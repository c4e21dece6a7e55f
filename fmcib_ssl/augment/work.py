"""Runs the steps of transforms on a batch of images, and joins linear steps that follow each other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmcib_ssl.augment.axis_maps import AxisMaps

#: First voxel and the one after the last, along z, y, x.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Linear:
    """A step that maps some images along their axes; may be put off and joined with the next.

    Attributes:
        rows: which images, in ascending order.
        maps: one map for each of them. Only a step on all images may change their size.
        boxes: for each of them the part of the image that is read; None for all of it.
    """

    rows: Sequence[int]
    maps: AxisMaps
    boxes: Sequence[Box] | None = None

    def part(self, first: int, end: int) -> Linear:
        """This step for the images `first` to `end - 1`, counted from `first`."""
        low, high = bisect_left(self.rows, first), bisect_left(self.rows, end)
        return Linear(
            [row - first for row in self.rows[low:high]],
            self.maps.each(lambda matrix: None if matrix is None else matrix[low:high]),
            None if self.boxes is None else self.boxes[low:high],
        )


@dataclass(frozen=True)
class Pointwise:
    """A step that has to see the voxels of some images.

    Attributes:
        rows: which images, in ascending order.
        change: float32 images, and which of the step's rows they are, to new images; may write into what it gets.
        offset: number of the step's rows before the first.
    """

    rows: Sequence[int]
    change: Callable[[Tensor, slice], Tensor]
    offset: int = 0

    def part(self, first: int, end: int) -> Pointwise:
        """This step for the images `first` to `end - 1`, counted from `first`."""
        low, high = bisect_left(self.rows, first), bisect_left(self.rows, end)
        return Pointwise([row - first for row in self.rows[low:high]], self.change, self.offset + low)


Step = Linear | Pointwise


class Work:
    """Images on their way, and for each the linear map that is still to be applied.

    Args:
        images: `(n, 1, z, y, x)` of any number type; never written to.
    """

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self._owned = False
        self._pending: AxisMaps | None = None  # one map for each image; the identity for those that do not wait
        self._read: Box | None = None  # what the pending maps read of the images
        self._waiting: set[int] = set()

    def run(self, steps: Iterable[Step]) -> None:
        """Take steps in order."""
        for step in steps:
            if not len(step.rows):
                continue
            if isinstance(step, Linear):
                self._put_off(step)
            else:
                self._catch_up(self._waiting.intersection(step.rows))
                self._own()
                rows = slice(step.offset, step.offset + len(step.rows))
                self._write(step.rows, step.change(self._these(step.rows), rows))

    def finished(self) -> Tensor:
        """The images with all that was put off; float32, of their own memory."""
        self._catch_up(set(self._waiting))
        self._own()
        return self._images

    def _own(self) -> None:
        if not self._owned:
            self._images = self._images.to(torch.float32, copy=True)
            self._owned = True

    def _put_off(self, step: Linear) -> None:
        whole = len(step.rows) == len(self._images)
        maps = step.maps if whole else self._for_all(step)
        joined = None if self._pending is None else maps.after(self._pending)
        if joined is None:
            self._catch_up(set(self._waiting))
            self._read = _union(step.boxes) if whole and step.boxes else None
        self._pending = joined or maps
        self._waiting.update(step.rows)

    def _for_all(self, step: Linear) -> AxisMaps:
        """The map of some images as one of all, the others left alone."""
        rows = self._on_device(step.rows)

        def padded(matrix: Tensor | None) -> Tensor | None:
            return None if matrix is None else _identities(matrix, len(self._images)).index_copy_(0, rows, matrix)

        return step.maps.each(padded)

    def _catch_up(self, due: set[int]) -> None:
        """Apply what was put off for some of the images, or for all if it changes their size."""
        pending = self._pending
        if pending is None or not due:
            return
        resized = any(matrix is not None and matrix.shape[1] != matrix.shape[2] for matrix in pending.zyx)
        if resized or len(due) == len(self._images):
            images = self._images
            if self._read is not None:
                z, y, x = (slice(*ends) for ends in self._read)
                images = images[:, :, z, y, x]
                pending = pending.reading_only(self._read)
            self._images = pending(images.float())
            self._owned, self._pending = True, None
            self._waiting.clear()
            return
        self._own()
        self._read = None  # what is done now has no box any more
        rows = sorted(due)
        on_device = self._on_device(rows)
        of_these = pending.each(lambda matrix: None if matrix is None else matrix[on_device])
        self._write(rows, of_these(self._these(rows)))
        self._waiting -= due
        self._pending = pending.each(
            lambda matrix: None if matrix is None else matrix.index_copy(0, on_device, _identities(matrix, len(rows)))
        )

    def _on_device(self, rows: Sequence[int]) -> Tensor:
        # Built here and sent, not built there: that would wait for all that the device still has to do.
        return torch.tensor(rows).to(self._images.device, non_blocking=True)

    def _these(self, rows: Sequence[int]) -> Tensor:
        if len(rows) == len(self._images):
            return self._images
        return self._images[self._on_device(rows)]

    def _write(self, rows: Sequence[int], images: Tensor) -> None:
        if len(rows) == len(self._images):
            self._images = images
        else:
            self._images.index_copy_(0, self._on_device(rows), images)


def _identities(like: Tensor, num: int) -> Tensor:
    return torch.eye(like.shape[1], like.shape[2], device=like.device).repeat(num, 1, 1)


def _union(boxes: Sequence[Box]) -> Box:
    if len(boxes) == 1:
        return boxes[0]
    z, y, x = ((min(box[axis][0] for box in boxes), max(box[axis][1] for box in boxes)) for axis in range(3))
    return z, y, x
