"""How far the outputs of a changed model are from those of the original one, on the same examples.

The divergence of probabilities, and of scores before softmax, is that of Kullback and Leibler from
the original's distribution, in nats per example. For everything else it is the squared error
relative to the variance of the original's outputs. Several outputs add up. `distance`, `error` and
`discrepancy` compare them in other ways.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax, logit, xlogy

from keras_alds import _backend
from keras_alds.core.slicing import Array

# Scores are told from other values, such as coordinates and embeddings, by the compiled loss; if
# there is none, by their number, which is larger for each pixel or token.
_FEWEST_SCORES, _FEWEST_SCORES_BY_POSITION = 8, 16
# Probabilities are not trusted below this.
_LEAST_PROBABILITY = 1e-7
# Two runs of a model differ by less, relative to the spread of an output.
_ROUNDED = 1e-2
# Logarithms of probabilities below this are those of classes that a mask rules out.
_LEAST_SCORE = -200.0


class OutputKind(enum.Enum):
    """What the numbers of an output are."""

    PROBABILITIES = "probabilities"  # along the last axis
    BINARY = "binary"  # every number is a probability
    SCORES = "scores"  # before softmax along the last axis
    VALUES = "values"
    LABELS = "labels"  # not floating-point
    RANDOM = "random"  # different each time


_WITHOUT_SCORES = OutputKind.VALUES, OutputKind.LABELS, OutputKind.RANDOM


class Reference:
    """The outputs of a model, to which those of a changed model are compared.

    Args:
        model: The model. Its compiled loss, if any, tells scores from other values.
        outputs: Its outputs, arrays `[examples, ...]`.
        random: Which outputs differ each time. They do not count, unless all are random. Defaults
            to none.

    Attributes:
        kinds: What each output is.
        is_random: Whether all outputs are random.
    """

    def __init__(
        self, model: Any, outputs: Sequence[Array], random: Sequence[bool] | None = None
    ) -> None:
        losses = _losses(model, len(outputs))
        kinds = list(map(kind_of_output, outputs, losses))
        random = random or [False] * len(kinds)
        self.is_random = all(random)
        if not self.is_random:
            pairs = zip(kinds, random, strict=True)
            kinds = [OutputKind.RANDOM if differs else kind for kind, differs in pairs]
        self.kinds = tuple(kinds)
        self._outputs = [
            _prepared(kind, output) for kind, output in zip(self.kinds, outputs, strict=True)
        ]
        self._scales = [
            _spread(output) if kind is OutputKind.VALUES else 1.0
            for kind, output in zip(self.kinds, self._outputs, strict=True)
        ]

    def divergence(self, outputs: Sequence[Array]) -> float:
        """The divergence of other outputs for the same examples; infinite if one is not finite.

        Args:
            outputs: Arrays of the shapes of the reference.

        Raises:
            ValueError: If the shapes differ.
        """
        return self._sum(self._prepared(outputs), _divergence)

    def distance(self, outputs: Sequence[Array]) -> float:
        """Like `divergence`, but bounded for scores and probabilities.

        There it is the total variation distance: the probability, from 0 to 1, that is given to
        other classes. A few examples of which a network is too sure do not outweigh the others.
        """
        return self._sum(self._prepared(outputs), _distance)

    def error(self, outputs: Sequence[Array]) -> float:
        """The squared error relative to the variance, for scores and probabilities that of logits.

        Unlike the divergence, it does not depend on how sure a network is of the examples.
        """
        return self._sum(self._prepared(outputs), _error)

    def discrepancy(self, outputs: Sequence[Array]) -> float:
        """The geometric mean of `distance` and a squared error, by which plans are compared.

        The error of scores, before softmax, is the one after the factor that makes it least. How
        sure they are counts in the distance, and without the factor the smaller scores of a network
        that is less sure would seem better.
        """
        prepared = self._prepared(outputs)
        parts = self._sum(prepared, _distance), self._scaled_errors(prepared)
        return math.sqrt(math.prod(parts)) if all(map(math.isfinite, parts)) else math.inf

    def _prepared(self, outputs: Sequence[Array]) -> list[Array]:
        prepared = []
        for kind, mine, other in zip(self.kinds, self._outputs, outputs, strict=True):
            if mine.shape != other.shape:
                raise ValueError(
                    "Expected outputs of the same shape from both models. "
                    f"Received: {mine.shape} and {other.shape}"
                )
            prepared.append(_prepared(kind, other))
        return prepared

    def _sum(self, prepared: Sequence[Array], measure: Callable[..., float]) -> float:
        parts = zip(self.kinds, self._outputs, prepared, self._scales, strict=True)
        return _finite(
            sum(measure(kind, mine, other) / scale for kind, mine, other, scale in parts)
        )

    def _scaled_errors(self, prepared: Sequence[Array]) -> float:
        total = 0.0
        parts = zip(self.kinds, self._outputs, prepared, self._scales, self._scores, strict=True)
        for kind, mine, other, scale, scores in parts:
            if scores is None:
                total += _divergence(kind, mine, other) / scale
            else:
                total += scores.scaled_error(_logits(kind, other))
        return _finite(total)

    def check_gradients(self, name: str) -> None:
        """Raises a ValueError if no output of the model of this name has gradients."""
        if all(kind in (OutputKind.LABELS, OutputKind.RANDOM) for kind in self.kinds):
            raise ValueError(
                f"Expected the model '{name}' to have an output of floating point, which has "
                "gradients. Received: outputs of "
                f"{', '.join(output.dtype.name for output in self._outputs)}"
            )

    @functools.cached_property
    def _scores(self) -> list[_Scores | None]:
        """What is known of the scores, also of those behind probabilities."""
        pairs = zip(self.kinds, self._outputs, strict=True)
        return [
            _Scores.of(_logits(kind, mine), centred=kind is not OutputKind.BINARY)
            if mine.size and kind not in _WITHOUT_SCORES
            else None
            for kind, mine in pairs
        ]


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Scores, without what is added to all of them, and their squares."""

    values: Array
    square: float
    spread: float
    centred: bool

    @classmethod
    def of(cls, scores: Array, *, centred: bool) -> _Scores:
        values = scores - scores.mean(axis=-1, keepdims=True) if centred else scores
        return cls(values, float(np.vdot(values, values)), _spread(values), centred)

    def scaled_error(self, other: Array) -> float:
        """The relative squared error of other scores after the factor that makes it least."""
        square = float(np.vdot(other, other))
        if self.centred:
            square -= other.shape[-1] * float(np.square(other.mean(axis=-1)).sum())
        product = max(float(np.vdot(self.values, other)), 0.0)
        left = self.square - (product * product / square if square > 0 else 0.0)
        return max(left, 0.0) / self.values.size / self.spread


def _finite(total: float) -> float:
    return float(total) if np.isfinite(total) else np.inf


def joined(batches: Iterable[Iterable[Array]]) -> list[Array]:
    """Each output for all batches; flat, where their sizes differ, as for texts."""
    found = []
    for parts in zip(*batches, strict=True):
        if len({part.shape[1:] for part in parts}) > 1:
            parts = tuple(part.reshape(-1, part.shape[-1]) for part in parts)
        found.append(np.concatenate(parts))
    return found


def differing(outputs: Iterable[Array], again: Iterable[Array]) -> list[bool]:
    """Which outputs of a model differ between two runs on the same examples, beyond rounding."""
    return [_differ(first, second) for first, second in zip(outputs, again, strict=True)]


def _differ(first: Array, second: Array) -> bool:
    if first.shape != second.shape or not first.size:
        return first.shape != second.shape
    changed = first != second
    if not _is_floating(first):
        return bool(changed.mean() > _ROUNDED)
    first, second = (np.asarray(output, np.float64) for output in (first, second))
    finite = changed & np.isfinite(first) & np.isfinite(second)
    change = np.square(first[finite] - second[finite]).sum() / first.size
    return bool(change > _ROUNDED**2 * _spread(first[np.isfinite(first)]))


def _is_floating(output: Array) -> bool:
    return output.dtype.kind == "f" or output.dtype.name == "bfloat16"


def kind_of_output(output: Array, loss: str | None = None) -> OutputKind:
    """Finds out what the numbers of an output are.

    Args:
        output: The output for some examples, `[examples, ...]`.
        loss: The name of the loss with which it is trained, if known.

    Example:
        >>> kind_of_output(np.array([[0.9, 0.1], [0.3, 0.7]])).value
        'probabilities'
    """
    if not _is_floating(output):
        return OutputKind.LABELS
    values = np.asarray(output, np.float64)
    classes = values.shape[-1] if values.ndim > 1 else 1
    if values.size and values.min() >= 0 and values.max() <= 1 + 1e-3:
        if classes > 1 and np.abs(values.sum(-1) - 1).max() < 1e-2:
            return OutputKind.PROBABILITIES
        if values.std() > 0 and (loss is None or "crossentropy" in loss):
            return OutputKind.BINARY
    if loss is not None:
        scores = "categorical" in loss and "crossentropy" in loss and classes > 1
        return OutputKind.SCORES if scores else OutputKind.VALUES
    fewest = _FEWEST_SCORES if values.ndim == 2 else _FEWEST_SCORES_BY_POSITION
    return OutputKind.SCORES if classes >= fewest and _compete(values) else OutputKind.VALUES


def _compete(values: Array) -> bool:
    """Whether the columns differ more from row to row than from each other, as scores do."""
    rows = values.reshape(-1, values.shape[-1])
    total = float(np.square(rows - rows.mean()).mean())
    return bool(rows.mean(axis=0).var() < 0.5 * total)


def _losses(model: Any, count: int) -> list[str | None]:
    """The names of the compiled losses by output; None where unknown."""
    given = getattr(model, "loss", None)
    if isinstance(given, dict):
        names = list(getattr(model, "output_names", None) or given)
        found = [given.get(name) for name in names]
    else:
        found = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(found) != count:
        return [None] * count
    return [_loss_name(loss) for loss in found]


def _loss_name(loss: Any) -> str | None:
    """The name of one of Keras's own losses, in lower case without underscores."""
    if loss is None:
        return None
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    known = isinstance(loss, str) or any(
        type(loss).__module__.startswith(prefix) or getattr(loss, "__module__", "") == prefix
        for prefix in _backend.KERASES
    )
    return name.lower().replace("_", "") if known else None


def _prepared(kind: OutputKind, output: Array) -> Array:
    """An output as its divergence takes it."""
    if kind in (OutputKind.LABELS, OutputKind.RANDOM):
        return np.asarray(output)
    values = np.asarray(output, np.float64)
    if kind is OutputKind.SCORES:
        return log_softmax(values, axis=-1)
    if kind is OutputKind.PROBABILITIES:
        values = np.maximum(values, _LEAST_PROBABILITY)
        return np.log(values / values.sum(axis=-1, keepdims=True))
    if kind is OutputKind.BINARY:
        return np.clip(values, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return values


def _divergence(kind: OutputKind, mine: Array, other: Array) -> float:
    if mine.size == 0 or kind is OutputKind.RANDOM:
        return 0.0
    if kind is OutputKind.LABELS:
        return float(np.mean(mine != other))
    if kind is OutputKind.VALUES:
        return float(np.square(mine - other).mean())
    if kind is OutputKind.BINARY:
        parts = (mine, other), (1 - mine, 1 - other)
        return float(sum(np.mean(xlogy(p, p / q)) for p, q in parts))
    return float(np.sum(np.exp(mine) * (mine - other), axis=-1).mean())


def _distance(kind: OutputKind, mine: Array, other: Array) -> float:
    if mine.size and kind in (OutputKind.SCORES, OutputKind.PROBABILITIES):
        return float(np.abs(np.exp(mine) - np.exp(other)).sum(axis=-1).mean() / 2)
    if mine.size and kind is OutputKind.BINARY:
        return float(np.abs(mine - other).mean())
    return _divergence(kind, mine, other)


def _error(kind: OutputKind, mine: Array, other: Array) -> float:
    if not mine.size or kind in _WITHOUT_SCORES:
        return _divergence(kind, mine, other)  # of values, it becomes relative later
    mine, other = _logits(kind, mine), _logits(kind, other)
    if kind is not OutputKind.BINARY:
        mine, other = (some - some.mean(axis=-1, keepdims=True) for some in (mine, other))
    return float(np.square(mine - other).mean()) / _spread(mine)


def _logits(kind: OutputKind, prepared: Array) -> Array:
    """The scores of a prepared output, but none of a class that a mask rules out."""
    return logit(prepared) if kind is OutputKind.BINARY else np.maximum(prepared, _LEAST_SCORE)


def _spread(values: Array) -> float:
    """The mean variance of an output's numbers; their mean square if they are constant."""
    square = float(np.square(values).mean()) if values.size else 0.0
    variance = float(values.var(axis=0).mean()) if values.size else 0.0
    return (variance if variance > 1e-12 * square else square) or 1.0
