"""Argument checks shared by many functions."""

from __future__ import annotations

import operator
from typing import Any


def positive_int(value: Any, name: str) -> int:
    """Returns an argument as an int of at least 1.

    Args:
        value: What was given. A bool is no integer here.
        name: The argument's name, for the error.

    Raises:
        ValueError: If it is not a positive integer.

    Example:
        >>> positive_int(3, "rank")
        3
    """
    number = _as_int(value)
    if number is None or number < 1:
        raise ValueError(f"Expected `{name}` to be a positive integer. Received: {name}={value!r}")
    return number


def int_at_least(value: Any, name: str, least: int) -> int:
    """Returns an argument as an int of at least `least`.

    Args:
        value: What was given. A bool is no integer here.
        name: The argument's name, for the error.
        least: The smallest allowed value.

    Raises:
        ValueError: If it is not such an integer.

    Example:
        >>> int_at_least(0, "warmup", 0)
        0
    """
    number = _as_int(value)
    if number is None or number < least:
        raise ValueError(
            f"Expected `{name}` to be an integer >= {least}. Received: {name}={value!r}"
        )
    return number


def _as_int(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
