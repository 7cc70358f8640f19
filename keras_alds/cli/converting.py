"""The conversion to LiteRT files, as several commands do it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

#: The number formats of `keras_alds.litert.convert`; the default is float32.
FORMATS = ("float16", "dynamic", "int8")


def is_litert(path: Path) -> bool:
    """Whether a path names a LiteRT file."""
    return path.suffix.lower() == ".tflite"


def add_quantize(parser: Any) -> None:
    """Adds the argument for the number format."""
    parser.add_argument(
        "--quantize",
        choices=FORMATS,
        help="number format of the LiteRT file; int8 needs examples (default: float32)",
    )


def check_conversion(quantize: str | None, source: str | None, flag: str) -> None:
    """Checks, before the work, that there can be a conversion.

    Args:
        quantize: The number format.
        source: The examples that the user named.
        flag: The argument for them.

    Raises:
        ValueError: If int8 lacks examples.
        ImportError: If LiteRT is not installed.
    """
    from keras_alds.litert import _package

    _package.interpreter()
    if quantize == "int8" and source is None:
        raise ValueError(
            f"Expected {flag} with --quantize int8: a few hundred unlabelled examples set the "
            "ranges of the activations. Received: no examples"
        )


def check_representative(quantize: str | None, source: str | None) -> None:
    """Checks that examples which only int8 files need were not named for others.

    Raises:
        ValueError: If they were.
    """
    if source is not None and quantize != "int8":
        raise ValueError(
            f"Expected --quantize int8 with --representative {source}: other files need no "
            f"examples. Received: {'no --quantize' if quantize is None else quantize}"
        )


def convert(model: Any, path: Path, arguments: argparse.Namespace, data: Any, **more: Any) -> int:
    """Writes a LiteRT file; returns its bytes."""
    from keras_alds.litert import conversion

    quantize = arguments.quantize
    examples = data if quantize == "int8" else None
    return len(
        conversion.convert(model, path, quantize=quantize, representative_data=examples, **more)
    )
