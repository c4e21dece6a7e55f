"""Where the schedules were defined before; run folders name them so."""

from fmcib_ssl.training.optimizers import constant, warmup_cosine

__all__ = ["constant", "warmup_cosine"]
