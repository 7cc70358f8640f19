"""Matches layers by name, path, pattern or class, for `exclude` and `bounds`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """One entry of `bounds`: an item that names layers, and fractions of parameters to remove."""

    item: Any
    least: float
    greatest: float


def check_exclude(exclude: Any, argument: str = "exclude") -> tuple[Any, ...]:
    """Returns the items of `exclude` as a tuple.

    Args:
        exclude: A name, path, regular expression, compiled pattern or layer class, or several.
        argument: The name of the user's argument, for the error.

    Raises:
        ValueError: If an item has another type.
    """
    one = isinstance(exclude, (str, re.Pattern, type)) or not isinstance(exclude, Iterable)
    items = (exclude,) if one else tuple(exclude)
    for item in items:
        if isinstance(item, str):
            try:
                re.compile(item)
            except re.error as error:
                raise ValueError(
                    f"Expected a string in `{argument}` to be a layer's name or a regular "
                    f"expression. Received: {item!r} ({error})"
                ) from error
        elif not isinstance(item, (re.Pattern, type)):
            raise ValueError(
                f"Expected `{argument}` to hold layer names, regular expressions or layer "
                f"classes. Received: {item!r} of type {type(item).__name__}"
            )
    return items


def check_bounds(bounds: Any) -> tuple[Bound, ...]:
    """Returns the entries of `bounds`.

    Raises:
        ValueError: If it does not map layers to pairs of fractions.
    """
    if bounds is None:
        return ()
    if not isinstance(bounds, Mapping):
        raise ValueError(
            "Expected `bounds` to be a dict from layers to (least, greatest), fractions of their "
            f"parameters to remove. Received: bounds={bounds!r}"
        )
    check_exclude(list(bounds), "bounds")
    return tuple(_bound(item, pair) for item, pair in bounds.items())


def _bound(item: Any, pair: Any) -> Bound:
    try:
        least, greatest = pair
        least = 0.0 if least is None else float(least)
        greatest = 1.0 if greatest is None else float(greatest)
    except (TypeError, ValueError):
        least = greatest = math.nan
    if not 0 <= least <= greatest <= 1:
        raise ValueError(
            "Expected the bounds of a layer to be (least, greatest) with 0 <= least <= greatest "
            f"<= 1, where either may be None. Received: {item!r}: {pair!r}"
        )
    return Bound(item, least, greatest)


def matches(item: Any, path: str, layer: Any) -> bool:
    """Whether an item, which may also be a layer, names a layer with this path."""
    if item is layer:
        return True
    if isinstance(item, type):
        return isinstance(layer, item)
    names = (path, layer.name)
    if isinstance(item, re.Pattern):
        return any(item.search(name) for name in names)
    return isinstance(item, str) and any(item == n or re.fullmatch(item, n) for n in names)


def described(item: Any) -> str:
    """An item as the user wrote it, for messages."""
    if isinstance(item, type):
        return item.__name__
    return item.pattern if isinstance(item, re.Pattern) else repr(item)
