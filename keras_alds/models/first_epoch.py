"""Warns if the first epoch after a compression did not train the factors as it should."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds.core.slicing import Array


class FirstEpoch:
    """The values of the factors before the first epoch after a compression.

    Args:
        model: The model that is trained.
        factors: The trainable variables in the place of its kernels.
    """

    def __init__(self, model: Any, factors: Sequence[Any]) -> None:
        self._model, self._factors = model, factors
        self._before = self._values()

    def _values(self) -> list[Array]:
        value = _backend.backend_of(self._model).value
        return [value(factor) for factor in self._factors]

    def warn(self, logs: Mapping[str, Any], *, stacklevel: int) -> None:
        """Warns if no factor has changed, all were clipped, or only the loss is NaN.

        Args:
            logs: The epoch's.
            stacklevel: The frame that warnings name; 1 is the caller of this function.
        """
        now = self._values()
        pairs = list(zip(now, self._before, strict=True))
        loss = logs.get("loss")
        is_nan = isinstance(loss, numbers.Real) and np.isnan(float(loss))
        if is_nan and all(np.isfinite(x).all() for x in now):
            text = (
                "The loss is NaN since the compression, and the factors are finite. Expected code "
                "that reads the variables of the model anew in every step. Received: a loss or "
                "`train_step` that probably still uses the old kernel of a factorized layer."
            )
        elif all(np.array_equal(*pair) for pair in pairs):
            optimizer = type(getattr(self._model, "optimizer", None)).__name__
            text = (
                "No factor has changed in the first epoch after the compression. Expected a "
                "learning rate other than zero, a `train_step` that reads `trainable_variables` in "
                "every step, and an optimizer that updates all of them in every epoch. Received: "
                f"the optimizer {optimizer}"
            )
        elif all(_is_clipped(*pair) for pair in pairs):
            text = (
                "All factors were clipped in the first epoch after the compression, and their "
                "products are less than half as large. Expected `exclude` to name the layers whose "
                "weights your code clips: the same bounds on two factors let their product be far "
                "smaller. "
                f"Received: factors within ±{max(np.abs(x).max() for x in now):.3g}"
            )
        else:
            return
        warnings.warn(text, stacklevel=stacklevel + 1)


def _is_clipped(factor: Array, before: Array) -> bool:
    """Whether many entries of a factor lie exactly at a bound, and it is much smaller than before.

    Training alone gives hardly two entries the same magnitude.
    """
    sizes = np.abs(factor)
    at_bound = np.sum(sizes == sizes.max()) if sizes.any() else 0
    many = at_bound > max(2, 0.05 * sizes.size)
    return bool(many and np.linalg.norm(factor) < 0.7 * np.linalg.norm(before))
