"""A denoising autoencoder: no comparison of views at all, only voxels; what contrast has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fmcib_ssl.losses import at_least_float32
from fmcib_ssl.models.encoders import learned_features
from fmcib_ssl.models.pretraining import Parts, Step
from fmcib_ssl.models.two_views import TwoViews

#: The decoder starts from a grid of at most as many voxels along an edge.
_COARSEST_EDGE = 4


class _Decoder(nn.Module):
    """From an encoder's features to a patch: a coarse grid, doubled until it covers the patch, then cropped to it.

    Args:
        num_features: of the encoder.
        patch_size_zyx: voxels along z, y, x.
        width: channels of the coarse grid, halved with every doubling, down to 8.
    """

    def __init__(self, num_features: int, patch_size_zyx: Sequence[int], width: int) -> None:
        super().__init__()
        doublings = max(0, math.ceil(math.log2(max(patch_size_zyx) / _COARSEST_EDGE)))
        start = [math.ceil(edge / 2**doublings) for edge in patch_size_zyx]
        self.patch_size_zyx = tuple(patch_size_zyx)
        layers: list[nn.Module] = [nn.Linear(num_features, width * math.prod(start)), nn.Unflatten(1, (width, *start))]
        for _ in range(doublings):
            narrower = max(8, width // 2)
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv3d(width, narrower, 3, padding=1, bias=False),
                nn.BatchNorm3d(narrower),
                nn.ReLU(),
            ]
            width = narrower
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 1, 3, padding=1))

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch 1 z y x"]:
        """Rebuild patches."""
        z, y, x = self.patch_size_zyx
        return cast(Tensor, self.layers(features))[..., :z, :y, :x]


class DenoisingAutoencoder(TwoViews):
    """The encoder sees a view with noise and holes; a small decoder has to give the view back from the features.

    The loss is the mean squared error over all voxels, in the encoder's range of intensities (1 is 3072 HU by default).
    Noise and holes are a function of (seed, epoch, batch, rank). `embeddings` are the encoder's features.

    Args:
        parts: without head and loss.
        patch_size_zyx: voxels of the views along z, y, x.
        seed: of noise and holes, non-negative.
        noise_std: of the Gaussian noise, in the encoder's range; 0.05 are 154 HU.
        hole_share: part of the volume that is set to 0, which is air.
        hole_edge: of the cubic holes, voxels.
        decoder_width: channels of the decoder's first layer.

    Raises:
        ValueError: a share that is not from 0 to below 1, or a negative deviation.

    Source: Vincent et al. 2008, Extracting and composing robust features with denoising autoencoders; holes as in
    Pathak et al. 2016, Context encoders.
    """

    compares_lesions = False

    def __init__(
        self,
        parts: Parts,
        *,
        patch_size_zyx: Sequence[int],
        seed: int = 0,
        noise_std: float = 0.05,
        hole_share: float = 0.3,
        hole_edge: int = 4,
        decoder_width: int = 64,
    ) -> None:
        super().__init__(parts)
        if not 0 <= hole_share < 1 or noise_std < 0 or hole_edge < 1:
            raise ValueError(
                f"hole_share={hole_share}, noise_std={noise_std}, hole_edge={hole_edge}: the share must be from 0 to "
                "below 1, the deviation not negative, the edge at least 1."
            )
        self.decoder = _Decoder(parts.num_features, patch_size_zyx, decoder_width)
        self.seed, self.noise_std, self.hole_share, self.hole_edge = seed, noise_std, hole_share, hole_edge

    def forward(self, views: Tensor) -> Tensor:
        """Rebuild views, `(batch, 1, z, y, x)`."""
        return cast(Tensor, self.decoder(learned_features(self.encoder, views)))

    def corrupt(self, views: Float[Tensor, "batch 1 z y x"], seed: int) -> Float[Tensor, "batch 1 z y x"]:
        """Add noise, then cut holes; what is drawn follows from `seed` and the kind of device."""
        generator = torch.Generator(views.device).manual_seed(seed)
        noise = torch.randn(views.shape, generator=generator, device=views.device) * self.noise_std
        grid = [math.ceil(edge / self.hole_edge) for edge in views.shape[2:]]
        is_whole = torch.rand((len(views), 1, *grid), generator=generator, device=views.device) >= self.hole_share
        z, y, x = views.shape[2:]
        mask = F.interpolate(is_whole.float(), scale_factor=self.hole_edge)[..., :z, :y, :x]
        return (views + noise) * mask

    def compare(self, view0: Tensor, view1: Tensor, batch_idx: int) -> Step:
        """Mean squared error of what is rebuilt from each corrupted view."""
        views = torch.cat([view0, view1])
        key = (self.current_epoch, batch_idx, self.global_rank)
        seed = int(np.random.SeedSequence(self.seed, spawn_key=key).generate_state(1)[0])
        features = learned_features(self.encoder, self.corrupt(views, seed))
        rebuilt = self.decoder(features)
        with self.full_precision():
            loss = F.mse_loss(at_least_float32(rebuilt), at_least_float32(views))
            figures = {"explained": 1 - loss.detach() / views.float().var()}  # 0: no better than the mean intensity
        z0, z1 = features.chunk(2)
        return Step(loss, (z0, z1), figures)
