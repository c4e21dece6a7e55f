"""Rooms take from each other what their `__init__` offers, and every name that is offered is there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fmcib_ssl"
ROOMS = ("data", "augment", "models", "training", "evaluation")


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_offered_is_there(room: str) -> None:
    module = importlib.import_module(f"fmcib_ssl.{room}")
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)


def test_nothing_else_is_taken() -> None:
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fmcib_ssl."):
                room, _, inner = node.module.removeprefix("fmcib_ssl.").partition(".")
                assert room not in ROOMS or room == own or not inner, f"{file}:{node.lineno} takes from {node.module}"
