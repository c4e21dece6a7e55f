"""Views of patches: batch by batch on any device, or one by one with MONAI's transforms."""

from fmcib_ssl.augment.batched import BatchedPublishedViews, BatchedViews
from fmcib_ssl.augment.geometry import RandomGeometry
from fmcib_ssl.augment.intensity import (
    RandomCutout,
    RandomGamma,
    RandomHistogramShift,
    RandomNoise,
    RandomScaleShift,
    VoxelTransform,
)
from fmcib_ssl.augment.published import MonaiViews, PublishedViews, RandResizedCrop
from fmcib_ssl.augment.resolution import RandomGaussianSmooth, RandomLowResolution, RandomSliceThickness
from fmcib_ssl.augment.surroundings import RandomSurroundings
from fmcib_ssl.augment.transform import BatchedTransform

__all__ = [
    "BatchedPublishedViews",
    "BatchedTransform",
    "BatchedViews",
    "MonaiViews",
    "PublishedViews",
    "RandResizedCrop",
    "RandomCutout",
    "RandomGamma",
    "RandomGaussianSmooth",
    "RandomGeometry",
    "RandomHistogramShift",
    "RandomLowResolution",
    "RandomNoise",
    "RandomScaleShift",
    "RandomSliceThickness",
    "RandomSurroundings",
    "VoxelTransform",
]
