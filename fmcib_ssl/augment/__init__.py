"""Views of patches, made in the data loader's workers."""

from fmcib_ssl.augment.published import MonaiViews, PublishedViews, RandResizedCrop

__all__ = ["MonaiViews", "PublishedViews", "RandResizedCrop"]
