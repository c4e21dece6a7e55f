"""From a table of lesions to batches of views. Import from the modules: some need SimpleITK, some not even torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmcib_ssl.data.patches import LesionPatches

__all__ = ["LesionPatches"]


def __getattr__(name: str) -> Any:
    """Import `LesionPatches` when it is asked for: `data.geometry` and its like need no torch."""
    if name in __all__:
        from fmcib_ssl.data.patches import LesionPatches  # noqa: PLC0415

        return LesionPatches
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
