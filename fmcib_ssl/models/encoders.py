"""Encoders, `(batch, 1, z, y, x)` to `(batch, features)`, randomly initialised, nothing downloaded; and their head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import monai.networks.nets.resnet as monai_nets
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import video

from fmcib_ssl.models.point_features import num_point_features, point_derivatives, point_features
from fmcib_ssl.types import Preprocessing

_MONAI_DEPTHS = (10, 18, 34, 50, 101)
_VIDEO_NAMES = ("r3d_18", "mc3_18", "r2plus1d_18")
#: Windows (lowest, highest HU): lung with ground glass, soft tissue, calcium.
_WINDOWS_HU = ((-1000.0, 400.0), (-160.0, 240.0), (0.0, 1500.0))
#: HU a voxel that the stem is given as 1: most edges of nodules are within -2 to 2.
_DERIVATIVE_SCALE = 60.0


def monai_resnet(
    depth: int,
    *,
    widen_factor: float = 1.0,
    conv1_t_size: int = 7,
    conv1_t_stride: int = 1,
    no_max_pool: bool = False,
) -> nn.Module:
    """MONAI's 3D ResNet without its classifier; arguments and weight names are MONAI's.

    The trunk of the published CT foundation model is `monai_resnet(50, widen_factor=2, conv1_t_stride=2)`: 4096
    features, 184 million weights.

    Args:
        depth: 10, 18, 34, 50 or 101.
        widen_factor: multiplies the channels of every layer.
        conv1_t_size: kernel of the first convolution, voxels.
        conv1_t_stride: stride of the first convolution.
        no_max_pool: leave out the pooling after the first convolution.

    Raises:
        ValueError: another depth.
    """
    if depth not in _MONAI_DEPTHS:
        raise ValueError(f"depth={depth}: MONAI ResNets here have depth {', '.join(map(str, _MONAI_DEPTHS))}.")
    build = getattr(monai_nets, f"resnet{depth}")
    encoder: nn.Module = build(
        pretrained=False,
        n_input_channels=1,
        feed_forward=False,
        widen_factor=widen_factor,
        conv1_t_size=conv1_t_size,
        conv1_t_stride=conv1_t_stride,
        no_max_pool=no_max_pool,
    )
    return encoder


def small_resnet(
    widths: Sequence[int] = (16, 32, 64, 128),
    *,
    conv1_t_size: int = 3,
    conv1_t_stride: int = 2,
    no_max_pool: bool = False,
) -> nn.Module:
    """A narrow ResNet-10 that trains on a CPU: 0.9 million weights, 128 features.

    Args:
        widths: channels of the four stages, one residual block each.
        conv1_t_size: kernel of the first convolution, voxels.
        conv1_t_stride: stride of the first convolution.
        no_max_pool: leave out the pooling after the first convolution; finer texture, several times slower.

    Raises:
        ValueError: not four widths.
    """
    if len(widths) != 4:
        raise ValueError(f"widths={list(widths)}: the network has four stages and needs a width for each.")
    encoder: nn.Module = monai_nets.ResNet(
        "basic",
        layers=[1, 1, 1, 1],
        block_inplanes=list(widths),
        n_input_channels=1,
        conv1_t_size=conv1_t_size,
        conv1_t_stride=conv1_t_stride,
        no_max_pool=no_max_pool,
        feed_forward=False,
        bias_downsample=False,
    )
    # Weights in this layout make a CPU's convolutions choose it, and run faster.
    return encoder.to(memory_format=torch.channels_last_3d)


def video_resnet(name: str) -> nn.Module:
    """One of torchvision's video ResNets, with a stem for one channel and without its classifier: 512 features.

    Time is `z`: the stem halves `y` and `x` and keeps `z`.

    Args:
        name: `r3d_18`, `mc3_18` or `r2plus1d_18`.

    Raises:
        ValueError: another name.

    Source: Tran et al. 2018, A closer look at spatiotemporal convolutions for action recognition.
    """
    if name not in _VIDEO_NAMES:
        raise ValueError(f"name={name!r}: torchvision's video ResNets are {', '.join(_VIDEO_NAMES)}.")
    encoder: Any = getattr(video, name)(weights=None)
    rgb = encoder.stem[0]
    gray = nn.Conv3d(1, rgb.out_channels, rgb.kernel_size, stride=rgb.stride, padding=rgb.padding, bias=False)
    nn.init.kaiming_normal_(gray.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws the others
    encoder.stem[0] = gray
    encoder.fc = nn.Identity()
    return cast(nn.Module, encoder)


class CenterPooledResNet(nn.Module):
    """A small ResNet whose features are statistics of all its stages, most of them taken round the patch's centre.

    A patch is centred on the lesion, and most of it is not lesion: a mean over the whole patch says more about vessels
    and chest wall than about a nodule of 6 mm. So every channel of every stage is averaged with Gaussian weights of
    several widths round the voxel `size // 2`, which holds the lesion's point, and over the whole patch; its maximum is
    taken too. The first stages' features keep density, which a network's last stage loses.

    The patch is first cut into windows of intensity, one channel each, so that 100 HU of soft tissue are no smaller
    a difference to the network than 500 HU of bone.

    Features: for each stage of width `w`, `w` maxima, then `(len(sigmas) + 1) * w` means; then the point features.

    Args:
        widths: channels of the stem and of each residual block after it; each halves the grid.
        sigmas: widths of the Gaussian weights, voxels.
        windows_hu: lowest and highest HU of each window; values beyond are clamped.
        derivatives: give the stem also the derivatives towards the point, across, and the Laplacian
            (`point_derivatives`).
        point_features: append local moments and histograms that need no training (`point_features`);
            heads are not shown these (`learned_features`), so that the loss is not lowered with what is there already.
        hu_offset: the preprocessing's, which is undone to get HU.
        hu_scale: the preprocessing's.

    Raises:
        ValueError: no width, a width that is not positive, or a window or sigma of no extent.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        *,
        sigmas: Sequence[float] = (2.0, 5.0),
        windows_hu: Sequence[Sequence[float]] = _WINDOWS_HU,
        derivatives: bool = False,
        point_features: bool = False,
        hu_offset: float = Preprocessing.hu_offset,
        hu_scale: float = Preprocessing.hu_scale,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths={list(widths)}: need the channels of at least one stage, all positive.")
        if any(sigma <= 0 for sigma in sigmas):
            raise ValueError(f"sigmas={list(sigmas)}: widths of Gaussian weights are positive, in voxels.")
        if not windows_hu or any(len(window) != 2 or window[0] >= window[1] for window in windows_hu):
            raise ValueError(f"windows_hu={[list(w) for w in windows_hu]}: each is (lowest, highest) in HU.")
        self.sigmas = tuple(sigmas)
        self.windows_hu = tuple((float(low), float(high)) for low, high in windows_hu)
        self.hu_offset, self.hu_scale = hu_offset, hu_scale
        self.derivatives = derivatives
        self.num_fixed_features = num_point_features() if point_features else 0
        self.stem = nn.Sequential(
            nn.Conv3d(len(self.windows_hu) + 3 * derivatives, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm3d(widths[0]),
            nn.ReLU(),
        )
        self.blocks = nn.ModuleList(_Block(before, after) for before, after in pairwise(widths))
        # Weights in this layout make a CPU's convolutions choose it, and run a quarter faster.
        self.to(memory_format=torch.channels_last_3d)

    def forward(
        self, patches: Float[Tensor, "batch 1 z y x"], *, learned_only: bool = False
    ) -> Float[Tensor, "batch features"]:
        """Features of preprocessed patches whose lesion is in the voxel `size // 2`; point features unless refused."""
        size_zyx = patches.shape[2:]
        hu = patches * self.hu_scale - self.hu_offset
        channels = [self._windows(hu)]
        with_point_features = self.num_fixed_features > 0 and not learned_only
        derivatives = point_derivatives(hu) if self.derivatives or with_point_features else {}
        if self.derivatives:
            names = ("radial", "tangential", "laplacian")
            channels += [derivatives[name].to(hu.dtype) / _DERIVATIVE_SCALE for name in names]
        grid = self.stem(torch.cat(channels, dim=1))
        features = [*self._pooled(grid, size_zyx, 2)]
        for number, block in enumerate(self.blocks, start=2):
            grid = block(grid)
            features += self._pooled(grid, size_zyx, 2**number)
        if with_point_features:
            features.append(point_features(hu, derivatives).to(hu.dtype))
        return torch.cat(features, dim=1)

    def _windows(self, hu: Tensor) -> Tensor:
        """Each window from -2 to 2: the spread that convolutions are initialised for."""
        windows = [(hu.clamp(low, high) - (low + high) / 2) * (4 / (high - low)) for low, high in self.windows_hu]
        return torch.cat(windows, dim=1)

    def _pooled(self, grid: Tensor, size_zyx: Sequence[int], stride: int) -> tuple[Tensor, Tensor]:
        """Maxima and weighted means of a stage, whose cell `i` is centred on voxel `i * stride` along each axis."""
        squares = [
            (torch.arange(cells, device=grid.device, dtype=torch.float32) * stride - size // 2).square()
            for cells, size in zip(grid.shape[2:], size_zyx, strict=True)
        ]
        squared = (squares[0][:, None, None] + squares[1][:, None] + squares[2]).flatten()
        # A softmax and not a plain quotient: a sigma far below the stride would give 0 / 0.
        weights = [torch.softmax(-squared / (2 * sigma**2), dim=0) for sigma in self.sigmas]
        weights.append(torch.full_like(squared, 1 / len(squared)))
        flat = grid.flatten(2)
        means = flat @ torch.stack(weights, dim=1).to(flat.dtype)
        return flat.amax(dim=2), means.flatten(1)


class _Block(nn.Module):
    """A residual block that halves the grid."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(after)
        self.conv2 = nn.Conv3d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(after)
        self.shortcut = nn.Sequential(nn.Conv3d(before, after, 1, stride=2, bias=False), nn.BatchNorm3d(after))

    def forward(self, grid: Tensor) -> Tensor:
        """Halve the grid."""
        change = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(grid)))))
        return F.relu(cast(Tensor, self.shortcut(grid)) + change)


class ProjectionHead(nn.Module):
    """SimCLR's projection head: linear layers with ReLU between them, each followed by batch norm.

    The published CT foundation model has `ProjectionHead(4096, 2048, batch_norm=False)`.

    Args:
        in_dim: the encoder's features.
        hidden_dim: units of the layers between; None means `in_dim`.
        out_dim: of the embedding.
        num_layers: linear layers; 2 in SimCLR, 3 in SimCLR v2.
        batch_norm: after every linear layer, the last too, which then have no bias.

    Raises:
        ValueError: `num_layers` is below 1.

    Source: Chen et al. 2020, A simple framework for contrastive learning of visual representations, and its code.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int | None = None,
        out_dim: int = 128,
        *,
        num_layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; a projection head has at least 1 linear layer.")
        dims = [in_dim, *[hidden_dim or in_dim] * (num_layers - 1), out_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(dims):
            layers += [nn.ReLU()] if layers else []
            layers += [nn.Linear(before, after, bias=not batch_norm)]
            layers += [nn.BatchNorm1d(after)] if batch_norm else []
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Float[Tensor, "batch in_dim"]) -> Float[Tensor, "batch out_dim"]:
        """Project features to embeddings, not normalised."""
        return cast(Tensor, self.layers(features))


def learned_features(encoder: nn.Module, patches: Tensor) -> Tensor:
    """The features that training can change: `(batch, features - num_fixed_features)`, those before the fixed ones.

    Args:
        encoder: any; one that appends fixed features has `num_fixed_features` above 0 and takes `learned_only`.
        patches: what the encoder takes.
    """
    fixed = getattr(encoder, "num_fixed_features", 0)
    return cast(Tensor, encoder(patches, learned_only=True) if fixed else encoder(patches))


def feature_dim(encoder: nn.Module, patch_size_zyx: Sequence[int]) -> int:
    """Number of features an encoder gives for a patch, found by running it on two empty ones.

    Leaves weights, running statistics, modes and torch's CPU generator as they were.

    Args:
        encoder: on any device.
        patch_size_zyx: voxels along z, y, x.

    Raises:
        ValueError: the encoder fails on such a patch, or what it gives is not `(batch, features)`.
    """
    name = type(encoder).__name__
    size = tuple(patch_size_zyx)
    first = next(encoder.parameters(), torch.empty(0))
    patches = torch.zeros((2, 1, *size), device=first.device, dtype=first.dtype)
    try:
        with evaluation_mode(encoder), torch.no_grad(), torch.random.fork_rng(devices=[]):
            features = encoder(patches)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} fails on a patch of {size} voxels (z, y, x); is the patch too small for it, or does it take "
            f"more than one channel? {error}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"{name} gives {shape} for a batch of 2; an encoder gives (batch, features): pool and flatten at its end."
        )
    return features.shape[1]


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every submodule is in its previous mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
