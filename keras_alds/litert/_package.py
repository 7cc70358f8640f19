"""The optional package ai-edge-litert, imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType


def interpreter() -> ModuleType:
    """`ai_edge_litert.interpreter`.

    Raises:
        ImportError: If LiteRT is not installed.
    """
    return _module("interpreter")


def schema() -> ModuleType:
    """`ai_edge_litert.schema_py_generated`, the file format.

    Raises:
        ImportError: If LiteRT is not installed.
    """
    return _module("schema_py_generated")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"ai_edge_litert.{name}")
    except ImportError as error:
        raise ImportError(
            'LiteRT is needed here and is not installed. Remedy: pip install "keras_alds[litert]"'
        ) from error
