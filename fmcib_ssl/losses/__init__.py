"""Contrastive losses: four matrices of embeddings in, one scalar out. `docs/losses.md` has the formulas."""

from fmcib_ssl.losses.contrast import Negatives
from fmcib_ssl.losses.infonce import InfoNCELoss
from fmcib_ssl.losses.ntxent_mined import NTXentNegativeMinedLoss

__all__ = ["InfoNCELoss", "NTXentNegativeMinedLoss", "Negatives"]
