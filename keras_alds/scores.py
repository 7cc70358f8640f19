"""Scores of models: checks and calls the functions that users give, and imports what plots them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def check_function(value: Any, name: str, example: str) -> None:
    """Raises a ValueError unless an argument is a function of a model.

    Args:
        value: The given value.
        name: The argument's name, for the error.
        example: A function, for the error.
    """
    if not callable(value):
        raise ValueError(
            f"Expected `{name}` to be a function of a model, such as {example}. "
            f"Received: {name} of type {type(value).__name__}"
        )


def check_evaluate(evaluate: Any) -> None:
    """Raises a ValueError unless `evaluate` is a function."""
    example = "`lambda model: model.evaluate(x, y, return_dict=True)['accuracy']`"
    check_function(evaluate, "evaluate", example)


def scored(evaluate: Callable[[Any], float], model: Any) -> float:
    """The score of a model.

    Raises:
        ValueError: If `evaluate` does not return one number.
    """
    score = evaluate(model)
    try:
        return float(score)
    except (TypeError, ValueError):
        raise ValueError(
            "Expected `evaluate(model)` to return one number, the score. "
            f"Received: {score!r}. If these are the loss and metrics of `model.evaluate`, "
            "return one of them."
        ) from None


def check_plots() -> Any:
    """Returns `matplotlib.figure`, or raises an ImportError that says how to install it."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "matplotlib is needed for the plot and is not installed. "
            'Remedy: pip install "keras_alds[plots]"'
        ) from error


def axes_or_new(ax: Any, height: float = 4.4) -> Any:
    """The given axes, or those of a new figure, `height` inches high."""
    if ax is not None:
        return ax
    return check_plots().Figure(figsize=(7.2, height), layout="constrained").subplots()
