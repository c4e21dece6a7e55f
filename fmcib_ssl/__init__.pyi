from fmcib_ssl.api import embed as embed
from fmcib_ssl.api import prepare as prepare
from fmcib_ssl.data import LesionPatches as LesionPatches
from fmcib_ssl.losses import InfoNCELoss as InfoNCELoss
from fmcib_ssl.losses import NTXentNegativeMinedLoss as NTXentNegativeMinedLoss
from fmcib_ssl.models import load_encoder as load_encoder

__version__: str
__all__ = [
    "InfoNCELoss", "LesionPatches", "NTXentNegativeMinedLoss", "__version__", "embed", "load_encoder", "prepare",
]  # fmt: skip
