"""How the divergence of a model's outputs grows with the error of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_alds.core.slicing import Array
from keras_alds.core.spectra import Float64

# Below and above the measured errors, divergences grow with these powers of the error at least and
# at most.
_SLOPES = (0.5, 3.0)
# Divergences below this are rounding.
_LEAST = 1e-9


@dataclass(frozen=True)
class Curve:
    """The divergence of a model's outputs at some errors of a layer, the others being exact.

    Between the errors it is interpolated on logarithmic axes. It never falls as the error grows.

    Attributes:
        errors: Relative squared errors of the layer's outputs, ascending and positive.
        divergences: The divergence at each of them.

    Example:
        >>> Curve((0.01, 0.1), (0.02, 0.2))(np.array([0.0, 0.05])).round(3).tolist()
        [0.0, 0.1]
    """

    errors: tuple[float, ...]
    divergences: tuple[float, ...]

    @classmethod
    def of(cls, errors: Sequence[float], divergences: Sequence[float]) -> Curve | None:
        """The curve through measured points, or None without an error above zero."""
        found: dict[float, float] = {}
        for error, divergence in sorted(zip(errors, divergences, strict=True)):
            if error > 0 and np.isfinite(divergence):
                found[error] = max(divergence, _LEAST, found.get(error, 0.0))
        if not found:
            return None
        rising = np.maximum.accumulate(list(found.values()))
        return cls(tuple(found), tuple(rising.tolist()))

    def __call__(self, errors: Array) -> Float64:
        """The divergences at some errors."""
        x, y = np.log(self.errors), np.log(self.divergences)
        slopes = np.clip(np.diff(y) / np.diff(x), *_SLOPES) if len(x) > 1 else np.ones(1)
        positive = np.log(np.maximum(errors, 1e-300))
        result = np.interp(positive, x, y)
        result += np.minimum(positive - x[0], 0) * slopes[0]
        result += np.maximum(positive - x[-1], 0) * slopes[-1]
        return np.where(np.asarray(errors) > 0, np.exp(result), 0.0)
