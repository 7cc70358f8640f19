"""Scores of models: checks and calls the functions that users give, and finds the frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


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


class Scored(NamedTuple):
    """The size of a model, as the fraction that is left of the original's, and its score."""

    size: float
    score: float


def frontier(models: Iterable[Scored]) -> list[Scored]:
    """The models than which no other one is better in size and score, smallest first.

    Models whose score is NaN are left out.

    >>> frontier([Scored(1.0, 0.9), Scored(0.5, 0.8), Scored(0.7, 0.8)])
    [Scored(size=0.5, score=0.8), Scored(size=1.0, score=0.9)]
    """
    found: list[Scored] = []
    known = [model for model in models if not math.isnan(model.score)]
    for model in sorted(known, key=lambda model: (model.size, -model.score)):
        if not found or model.score > found[-1].score:
            found.append(model)
    return found
