"""The Lightning modules: how batches of views become a loss."""

from fmcib_ssl.methods.byol import BYOL
from fmcib_ssl.methods.denoising import DenoisingAutoencoder
from fmcib_ssl.methods.mined_contrast import MinedContrast
from fmcib_ssl.methods.nnclr import NNCLR
from fmcib_ssl.methods.simclr import SimCLR
from fmcib_ssl.methods.swav import SwAV
from fmcib_ssl.methods.vicreg import VICReg

__all__ = ["BYOL", "NNCLR", "DenoisingAutoencoder", "MinedContrast", "SimCLR", "SwAV", "VICReg"]
