"""Checks of arguments that many functions share."""

from __future__ import annotations

import operator
from typing import Any


def positive_int(value: Any, name: str) -> int:
    """Returns an argument as an int of at least 1.

    Args:
        value: What was given. A bool is no integer here.
        name: The argument's name, for the error.

    Raises:
        ValueError: If it is no positive integer.

    Example:
        >>> positive_int(3, "rank")
        3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"Expected `{name}` to be a positive integer. Received: {name}={value!r}")
    return number
