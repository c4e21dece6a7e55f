"""Views of patches: random transforms of whole batches, on any device; MONAI's are applied patch by patch."""

from fmcib_ssl.augment.geometry import RandomGeometry
from fmcib_ssl.augment.intensity import (
    RandomContextRemoval,
    RandomCutout,
    RandomGamma,
    RandomHistogramShift,
    RandomNoise,
    RandomScaleShift,
)
from fmcib_ssl.augment.recipes import BatchedPublishedViews, MonaiViews, PublishedViews, RandResizedCrop
from fmcib_ssl.augment.resolution import RandomGaussianSmooth, RandomLowResolution, RandomSliceThickness
from fmcib_ssl.augment.streams import uniforms
from fmcib_ssl.augment.views import BatchedTransform, BatchedViews, VoxelTransform

__all__ = [
    "BatchedPublishedViews",
    "BatchedTransform",
    "BatchedViews",
    "MonaiViews",
    "PublishedViews",
    "RandResizedCrop",
    "RandomContextRemoval",
    "RandomCutout",
    "RandomGamma",
    "RandomGaussianSmooth",
    "RandomGeometry",
    "RandomHistogramShift",
    "RandomLowResolution",
    "RandomNoise",
    "RandomScaleShift",
    "RandomSliceThickness",
    "VoxelTransform",
    "uniforms",
]
