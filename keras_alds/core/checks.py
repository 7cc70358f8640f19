"""Argument checks shared by many functions."""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def positive_int(value: Any, name: str) -> int:
    """Returns an argument as an int of at least 1.

    Args:
        value: The given value. A bool does not count as an integer.
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
        value: The given value. A bool does not count as an integer.
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


def is_fraction(value: Any) -> bool:
    """Whether a value is a number strictly between 0 and 1."""
    return isinstance(value, numbers.Real) and 0 < float(value) < 1


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """The end of a message about an unknown name: the nearest known one, if any is near.

    Args:
        name: What the user wrote, of any type. Upper and lower case do not differ.
        known: The known names; what is not a string is left out.

    Returns:
        A sentence, after the stop that ends the one before it, or an empty string.

    Example:
        >>> did_you_mean("SVD", ["alds", "svd"])
        ". Did you mean 'svd'?"
    """
    names = {other.lower(): other for other in known if isinstance(other, str)}
    near = difflib.get_close_matches(name.lower(), names, n=1) if isinstance(name, str) else []
    return f". Did you mean {names[near[0]]!r}?" if near else ""


def _as_int(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
