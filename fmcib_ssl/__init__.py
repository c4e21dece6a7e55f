"""Self-supervised pretraining of 3D encoders for cancer imaging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]

if TYPE_CHECKING:
    from fmcib_ssl.models import load_encoder


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `import fmcib_ssl` must not pay for it (`train.py --help` does that).
    if name == "load_encoder":
        from fmcib_ssl.models import load_encoder  # noqa: PLC0415

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
