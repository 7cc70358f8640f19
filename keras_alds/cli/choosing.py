"""The arguments of `select` that commands share: how much to remove, how, and from what."""

from __future__ import annotations

import argparse
from typing import Any

from keras_alds.methods import METHODS
from keras_alds.options import OPTION_NAMES, add_flags, flags

# What depends on the command.
_OWN = ("quantize",)
OPTIONS = tuple(name for name in OPTION_NAMES if name not in _OWN)


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `select`, without those of `_OWN`."""
    group = parser.add_argument_group("what to choose")
    add_flags(group, OPTIONS, {"method": {"choices": list(METHODS)}})


def fraction(text: str) -> float | dict[str, float]:
    """The value of `--cr`: a number, or limits as in `params=0.5,macs=0.4`."""
    if "=" not in text:
        return float(text)
    pairs = (part.partition("=") for part in text.split(","))
    return {name.strip(): float(value) for name, _, value in pairs}


def add_cr(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """Adds the argument for how much to remove."""
    also = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--cr",
        type=fraction,
        default=default,
        help="fraction to remove, 0.5 for half; or several limits, as in "
        f"params=0.5,macs=0.4,memory=0{also}",
    )


def choosing(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_choosing` that differ from their defaults, by name.

    `--quantize` counts for the latency alone, and only int8 is measured.
    """
    values = flags(arguments, OPTIONS)
    measured = arguments.objective == "latency" and arguments.quantize == "int8"
    if measured:
        values["quantize"] = "int8"
    return values
