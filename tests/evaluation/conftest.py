"""Fixtures of the tests of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fmcib_ssl.evaluation import figures, report_maps


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into their axes."""
    saved: list[Figure] = []
    save = figures.save_figure

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> Path:
        saved.append(figure)
        return save(figure, *args, **kwargs)

    for module in (figures, report_maps):
        monkeypatch.setattr(module, "save_figure", keep)
    return saved
