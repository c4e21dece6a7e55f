"""Changes of intensity in HU: contrast, calibration, noise, and what is cut out or taken away round the lesion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from fmcib_ssl.augment.views import (
    BatchedTransform,
    Params,
    Size,
    derived_seeds,
    in_range,
    interval,
    normals,
    within,
)


class RandomHistogramShift(BatchedTransform):
    """A piecewise linear, rising map of a view's range of intensities onto itself, as MONAI's `RandHistogramShift`.

    Args:
        prob: probability that a view is changed.
        num_control_points: ends of the pieces; 3 or more.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, prob: float, num_control_points: int = 10) -> None:
        super().__init__(prob)
        if num_control_points < 3:
            raise ValueError(f"num_control_points is {num_control_points}; it must be 3 or more.")
        self.num_control_points = num_control_points

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw each point between the one before, which has moved, and the next one, which has not."""
        num = self.num_control_points
        active, drawn = self._draw(seeds, num)
        even = torch.linspace(0, 1, num, dtype=torch.float64)
        mapped = even.repeat(len(seeds), 1)
        for point in range(1, num - 1):
            mapped[:, point] = mapped[:, point - 1].lerp(mapped[:, point + 1], drawn[:, point])
        return {"active": active, "mapped": mapped.float()}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Map each view's range piece by piece."""
        low, high = images.amin((1, 2, 3, 4)), images.amax((1, 2, 3, 4))
        pieces = own["mapped"].shape[1] - 1
        span = high - low
        even = torch.linspace(0, 1, pieces + 1, device=images.device)
        before = low[:, None] + even * span[:, None]
        after = low[:, None] + own["mapped"] * span[:, None]
        # y = slope * x + offset in each piece; the highest intensity itself begins one more, equal to the last.
        slope = after.diff(dim=1) / before.diff(dim=1)
        flat = (span == 0)[:, None]  # a single intensity stays
        slope = torch.where(flat, 1.0, slope)
        offset = torch.where(flat, 0.0, after[:, :-1] - slope * before[:, :-1])
        slope, offset = (torch.cat([table, table[:, -1:]], dim=1).flatten() for table in (slope, offset))
        per_hu = torch.where(span == 0, 0.0, pieces / span)
        shape = (-1, 1, 1, 1, 1)
        # In float32 a row's number and its index in the row are exact together up to 2^24 table entries.
        row = torch.arange(len(images), device=images.device) * (pieces + 1)
        piece = torch.sub(images, low.view(shape)).mul_(per_hu.view(shape)).to(torch.int32)
        if len(images) > 1:
            piece += row.to(torch.int32).view(shape)
        piece = piece.flatten()
        mapped = slope.index_select(0, piece).view(images.shape)
        return mapped.mul_(images).add_(offset.index_select(0, piece).view(images.shape))


class RandomGamma(BatchedTransform):
    """Contrast: a power of the intensity within a view's range, as MONAI's `AdjustContrast`.

    Args:
        prob: probability that a view is changed.
        gamma: smallest and largest exponent.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, prob: float, gamma: Sequence[float] = (0.8, 1.25)) -> None:
        super().__init__(prob)
        self.gamma = interval("gamma", gamma, 0.05, 20)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw the exponent."""
        active, drawn = self._draw(seeds, 1)
        return {"active": active, "gamma": within(drawn[:, 0], self.gamma)}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Raise to the power."""
        low, high = images.amin((1, 2, 3, 4), keepdim=True), images.amax((1, 2, 3, 4), keepdim=True)
        span = high - low
        images.sub_(low).div_(span + 1e-7).pow_(own["gamma"].view(-1, 1, 1, 1, 1))
        return images.mul_(span).add_(low)


class RandomScaleShift(BatchedTransform):
    """Another calibration of the scanner: `(hu - pivot_hu) * scale + pivot_hu + shift_hu`.

    Args:
        prob: probability that a view is changed.
        scale: smallest and largest factor.
        shift_hu: smallest and largest shift, HU.
        pivot_hu: what scaling leaves as it is, HU; -1000 is air.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        prob: float,
        scale: Sequence[float] = (0.95, 1.05),
        shift_hu: Sequence[float] = (-20.0, 20.0),
        pivot_hu: float = -1000.0,
    ) -> None:
        super().__init__(prob)
        self.scale = interval("scale", scale, 0)
        self.shift_hu = interval("shift_hu", shift_hu, -4096, 4096)
        self.pivot_hu = pivot_hu

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw factor and shift."""
        active, drawn = self._draw(seeds, 2)
        scale, shift_hu = within(drawn[:, 0], self.scale), within(drawn[:, 1], self.shift_hu)
        return {"active": active, "scale": scale, "shift_hu": shift_hu}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Scale and shift."""
        offset = self.pivot_hu * (1 - own["scale"]) + own["shift_hu"]
        return images.mul_(own["scale"].view(-1, 1, 1, 1, 1)).add_(offset.view(-1, 1, 1, 1, 1))


class RandomNoise(BatchedTransform):
    """White Gaussian noise, the same on every device.

    Args:
        prob: probability that a view is changed.
        std_hu: smallest and largest standard deviation, HU.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, prob: float, std_hu: Sequence[float] = (5.0, 40.0)) -> None:
        super().__init__(prob)
        self.std_hu = interval("std_hu", std_hu, 0)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw the standard deviation, and the seed of the voxels' noise."""
        active, drawn = self._draw(seeds, 1)
        std_hu = within(drawn[:, 0], self.std_hu)
        return {"active": active, "std_hu": std_hu, "seed": derived_seeds(seeds, "voxels")}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Add the noise that the seeds give."""
        noise = normals(own["seed"], images[0].numel()).mul_(own["std_hu"][:, None])
        return images.add_(noise.view(images.shape))


class RandomCutout(BatchedTransform):
    """Boxes of one intensity, at random places within the view.

    Args:
        prob: probability that a view is changed.
        num_holes: smallest and largest number of boxes.
        edge: smallest and largest edge of a box over the view's; each edge is drawn by itself.
        fill_hu: intensity of the boxes; None is the view's mean.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        prob: float,
        num_holes: Sequence[int] = (1, 3),
        edge: Sequence[float] = (0.1, 0.3),
        fill_hu: float | None = None,
    ) -> None:
        super().__init__(prob)
        self.num_holes = interval("num_holes", num_holes, 1)
        self.edge = interval("edge", edge, 0, 1)
        self.fill_hu = fill_hu

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw how many boxes there are, and their places and edges."""
        low, high = (int(n) for n in self.num_holes)
        active, drawn = self._draw(seeds, 1 + 6 * high)
        num = low + (drawn[:, :1] * (high - low + 1)).long()
        position, edge = drawn[:, 1:].view(-1, high, 2, 3).unbind(2)
        edges = torch.tensor(size_zyx)
        size = (within(edge, self.edge) * edges).round().clamp_min(1).long()
        start = (position * (edges - size + 1)).long()
        return {"active": active, "start": start, "size": size * (torch.arange(high) < num)[..., None]}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Fill the boxes."""
        if self.fill_hu is None:
            fill = images.mean((1, 2, 3, 4), keepdim=True)
        else:
            fill = images.new_full((1, 1, 1, 1, 1), self.fill_hu)
        z, y, x = (
            self._inside(own["start"][..., axis, None], own["size"][..., axis, None], size).float()
            for axis, size in enumerate(images.shape[2:])
        )
        # How many holes a voxel lies in: for each the product of three lines.
        planes = (z[..., :, None] * y[..., None, :]).flatten(2)
        covered = torch.bmm(planes.mT, x).clamp_max_(1).view_as(images)
        return images.lerp_(fill, covered)

    @staticmethod
    def _inside(start: Tensor, length: Tensor, size: int) -> Bool[Tensor, "m holes size"]:
        line = torch.arange(size, device=start.device)
        return (line >= start) & (line < start + length)


class RandomContextRemoval(BatchedTransform):
    """Replaces what is further from the view's centre than a random radius by noise about one random intensity.

    Two views of a lesion share its vessels, its pleura and its ribs, and those suffice to tell it from every other
    lesion: the loss falls, and nothing is learned of the lesion. Where one of the views has only a ball round the
    point, the lesion is all that they share. For patches that are centred on lesions.

    Args:
        prob: probability that a view is changed.
        radius: smallest and largest radius of the ball that stays, voxels.
        softness: width over which the patch fades, voxels.
        lung_prob: probability of an intensity of lung; else it is one of soft tissue.
        lung_hu: smallest and largest intensity of lung.
        tissue_hu: smallest and largest intensity of soft tissue.
        noise_std_hu: of the white noise on the replaced part.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        prob: float,
        *,
        radius: Sequence[float] = (5.0, 11.0),
        softness: float = 0.7,
        lung_prob: float = 0.75,
        lung_hu: Sequence[float] = (-950.0, -650.0),
        tissue_hu: Sequence[float] = (-150.0, 60.0),
        noise_std_hu: float = 30.0,
    ) -> None:
        super().__init__(prob)
        self.radius = interval("radius", radius, 0)
        self.softness = in_range("softness", softness, 1e-3, 1e3)
        self.lung_prob = in_range("lung_prob", lung_prob, 0, 1)
        self.lung_hu = interval("lung_hu", lung_hu, -1024, 3071)
        self.tissue_hu = interval("tissue_hu", tissue_hu, -1024, 3071)
        self.noise_std_hu = in_range("noise_std_hu", noise_std_hu, 0, 1000)

    def draw(self, seeds: Int64[Tensor, " n"], size_zyx: Size) -> Params:
        """Draw the radius, the intensity, and the seed of the noise."""
        active, drawn = self._draw(seeds, 3)
        is_lung = drawn[:, 1] < self.lung_prob
        fill_hu = torch.where(is_lung, within(drawn[:, 2], self.lung_hu), within(drawn[:, 2], self.tissue_hu))
        radius, seed = within(drawn[:, 0], self.radius), derived_seeds(seeds, "voxels")
        return {"active": active, "radius": radius, "fill_hu": fill_hu, "seed": seed}

    def change(self, images: Tensor, own: Params) -> Tensor:
        """Blend into noise what is further from the centre than the radius."""
        z, y, x = ((torch.arange(size, device=images.device) - size // 2).float().square() for size in images.shape[2:])
        distance = (z[:, None, None] + y[:, None] + x).sqrt()
        radius, fill_hu = (values.view(-1, 1, 1, 1, 1) for values in (own["radius"], own["fill_hu"]))
        inside = torch.sigmoid((radius - distance) / self.softness)
        noise = normals(own["seed"], images[0].numel()).view(images.shape)
        return torch.lerp(noise.mul_(self.noise_std_hu).add_(fill_hu), images, inside)
