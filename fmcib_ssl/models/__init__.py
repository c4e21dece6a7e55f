"""Encoders, heads, encoders as files, and the methods that pretrain: from batches of views to a loss."""

import importlib
from typing import TYPE_CHECKING, Any

from fmcib_ssl.models.encoders import (
    CenterPooledResNet,
    ProjectionHead,
    feature_dim,
    monai_resnet,
    small_resnet,
    video_resnet,
)
from fmcib_ssl.models.export import EncoderFileError, encoder_metadata, export_encoder, load_encoder

if TYPE_CHECKING:
    from fmcib_ssl.models.denoising import DenoisingAutoencoder
    from fmcib_ssl.models.mined_contrast import MinedContrast
    from fmcib_ssl.models.pretraining import Parts, Pretraining
    from fmcib_ssl.models.queues import NNCLR, SwAV
    from fmcib_ssl.models.two_views import BYOL, SimCLR, VICReg

__all__ = [
    "BYOL",
    "NNCLR",
    "CenterPooledResNet",
    "DenoisingAutoencoder",
    "EncoderFileError",
    "MinedContrast",
    "Parts",
    "Pretraining",
    "ProjectionHead",
    "SimCLR",
    "SwAV",
    "VICReg",
    "encoder_metadata",
    "export_encoder",
    "feature_dim",
    "load_encoder",
    "monai_resnet",
    "small_resnet",
    "video_resnet",
]

#: The methods are Lightning modules; who only loads an encoder does not wait for Lightning.
_METHODS = {
    "BYOL": "two_views",
    "DenoisingAutoencoder": "denoising",
    "MinedContrast": "mined_contrast",
    "NNCLR": "queues",
    "Parts": "pretraining",
    "Pretraining": "pretraining",
    "SimCLR": "two_views",
    "SwAV": "queues",
    "VICReg": "two_views",
}


def __getattr__(name: str) -> Any:
    if name in _METHODS:
        return getattr(importlib.import_module(f"{__name__}.{_METHODS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
