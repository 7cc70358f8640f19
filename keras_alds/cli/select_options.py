"""The arguments of `select` that commands share: how much to remove, how, and from what."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from keras_alds.methods import METHODS
from keras_alds.options import OPTION_NAMES, add_flags, flags


def add_choosing(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Adds the options of `select`, but for those that mean more to a command."""
    group = parser.add_argument_group("what to choose")
    names = [name for name in OPTION_NAMES if name not in without]
    add_flags(group, names, {"method": {"choices": list(METHODS)}})


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
    """The options of `select` by name."""
    return flags(arguments, OPTION_NAMES)
