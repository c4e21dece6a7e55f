"""Self-supervised pretraining of 3D encoders for cancer imaging."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "InfoNCELoss", "LesionPatches", "NTXentNegativeMinedLoss", "__version__", "embed", "load_encoder", "prepare",
]  # fmt: skip

# torch takes seconds to import; `import fmcib_ssl` must not pay for it (`train.py --help` does that).
# What type checkers read is `__init__.pyi`.
_MODULES = {
    "InfoNCELoss": "losses", "LesionPatches": "data", "NTXentNegativeMinedLoss": "losses", "embed": "api",
    "load_encoder": "models", "prepare": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":  # what it was built from: a tag of git
        return import_module("importlib.metadata").version("fmcib_ssl")
    if name in _MODULES:
        return getattr(import_module(f"fmcib_ssl.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
