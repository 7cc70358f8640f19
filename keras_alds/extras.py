"""Imports optional packages on first use."""

from __future__ import annotations

import importlib
from typing import Any


def imported(module: str, use: str, install: str) -> Any:
    """An optional module.

    Args:
        module: Its full name.
        use: What it is needed for, for the error.
        install: What `pip install` needs.

    Raises:
        ImportError: If it is not installed. The text says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is needed for {use} and is not installed. "
            f"Remedy: pip install {install}"
        ) from error


def matplotlib(part: str) -> Any:
    """A module of matplotlib, such as `"figure"`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return imported(f"matplotlib.{part}", "the plot", '"keras_alds[plots]"')
