"""Encoders, heads, and encoders as files."""

from fmcib_ssl.models.concentric import ConcentricResNet
from fmcib_ssl.models.encoders import feature_dim, monai_resnet, small_resnet, video_resnet
from fmcib_ssl.models.export import EncoderFileError, encoder_metadata, export_encoder, load_encoder
from fmcib_ssl.models.heads import ProjectionHead

__all__ = [
    "ConcentricResNet",
    "EncoderFileError",
    "ProjectionHead",
    "encoder_metadata",
    "export_encoder",
    "feature_dim",
    "load_encoder",
    "monai_resnet",
    "small_resnet",
    "video_resnet",
]
