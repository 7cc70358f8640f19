"""What training hands to nobody: the `fit` that is running."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class RunningFit(NamedTuple):
    """The `fit` of a model that is running.

    Attributes:
        x: Its data, or None.
        callbacks: The callbacks that run in it.
    """

    x: Any
    callbacks: list[Any]


def calling_fit(model: Any, callback: Any) -> RunningFit:
    """Looks for the `fit` that is calling a callback; Keras hands it neither data nor callbacks.

    Args:
        model: The model that is being trained.
        callback: A callback of that training.

    Returns:
        What was found; None and no callbacks outside of `fit`.
    """
    x: Any = None
    callbacks: list[Any] = []
    frame = sys._getframe()
    while frame.f_back is not None and (x is None or not callbacks):
        frame = frame.f_back
        owner = frame.f_locals.get("self")
        if x is None and frame.f_code.co_name == "fit" and owner is model:
            x = frame.f_locals.get("x")
        held = getattr(owner, "callbacks", None)
        if not callbacks and isinstance(held, list) and any(item is callback for item in held):
            callbacks = held
    return RunningFit(x, callbacks)
