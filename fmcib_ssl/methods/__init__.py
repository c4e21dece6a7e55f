"""The Lightning modules: how batches of views become a loss."""

from fmcib_ssl.methods.mined_contrast import MinedContrast

__all__ = ["MinedContrast"]
