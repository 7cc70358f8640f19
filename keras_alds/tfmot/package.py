"""Imports TF-MOT on first use."""

from __future__ import annotations

import importlib
from typing import Any


def tfmot_package() -> Any:
    """`tensorflow_model_optimization`.

    Raises:
        ImportError: If TF-MOT is not installed.
    """
    try:
        return importlib.import_module("tensorflow_model_optimization")
    except ImportError as error:
        raise ImportError(
            'TF-MOT is needed here and is not installed. Remedy: pip install "keras_alds[tfmot]"'
        ) from error
