"""Accumulates the second moments of layer inputs while a model runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_alds._backend import tensors
from keras_alds._backend.calls import Replacement, replaced_calls, watched
from keras_alds._backend.loops import passing
from keras_alds.core.calibration.accumulators import MomentAccumulator
from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.calibration.patches import CHUNK_ROWS
from keras_alds.core.parallel import threads
from keras_alds.core.slicing import Array, kernel_sizes
from keras_alds.kinds.base import observable, running
from keras_alds.models.inventory import LayerRecord

# The squares of smaller values can be summed in float32.
_LARGEST = 1e16
# Parts of one layer call that threads process in parallel. A constant, not the number of workers,
# so that results are the same on every machine.
PARTS = 4


class Observer:
    """Accumulates the second moments of the inputs of some layers of a running model.

    Args:
        records: Layers that can be factorized; those with unobservable inputs are ignored.
    """

    def __init__(self, records: Sequence[LayerRecord]) -> None:
        self._records = {r.layer: r for r in records if observable(r.layer)}
        # The sums over the examples to fit, and over the held-out ones.
        self._sums: tuple[dict[Any, MomentAccumulator], ...] = ({}, {})
        self._held_out = False

    @contextlib.contextmanager
    def watching(
        self, model: Any, *also: Mapping[Any, Replacement]
    ) -> Iterator[Callable[[Any, bool], Any]]:
        """Yields a function that runs `model` on a batch and observes the calls of the layers.

        Its second argument says whether the batch is held out. It returns the outputs. `also`
        replaces more calls in these runs.

        Only the calls in these runs are observed: neither those of other threads, nor those of
        code that makes the batches.
        """
        replacements = running(model), watched(self._records, self._see), *also

        def run(batch: Any, held_out: bool) -> Any:
            self._held_out = held_out
            with replaced_calls(*replacements):
                return model(batch, training=False)

        with threads() as self._pool, passing(model):
            yield run

    def _see(self, layer: Any, inputs: Any, outputs: Any) -> Any:
        return when_known(inputs, outputs, lambda x: self._add(layer, x))

    def _add(self, layer: Any, inputs: Array) -> None:
        record = self._records[layer]
        check_finite(inputs, record.path)
        c, kappa, _ = kernel_sizes(record.kernel_shape or ())
        sums = self._sums[self._held_out].setdefault(layer, MomentAccumulator(c, kappa))
        x = record.kind.batches(layer, inputs)
        if math.prod(x.shape[:-1]) < CHUNK_ROWS:
            for chunk in record.kind.patches(layer, x):
                sums.add(chunk)
            return
        parts = np.array_split(x, PARTS if c * kappa <= CHUNK_ROWS else 2)
        patches = [record.kind.patches(layer, part) for part in parts if part.size]
        sums.add_parts(patches, self._pool)

    def moments(self) -> dict[str, SecondMoment | None]:
        """The second moments by path, None for layers that were not called; clears the sums."""
        found: dict[str, SecondMoment | None] = {}
        for layer, record in self._records.items():
            fit, held_out = (sums.pop(layer, None) for sums in self._sums)
            moments = [sums.moment() for sums in (fit, held_out) if sums is not None]
            found[record.path] = moments[0] if moments else None
            if len(moments) == 2:
                found[record.path] = moments[0].with_held_out(moments[1])
        return found


def check_finite(inputs: Array, path: str) -> None:
    """Raises a ValueError if an input is NaN, infinite, or too large for a finite square."""
    largest = float(np.abs(inputs).max(initial=0.0))  # NaN if there is one
    if not largest < _LARGEST:
        raise ValueError(
            "Expected finite values with finite squares in the whole model. Received: "
            + (f"{largest:g}" if np.isfinite(largest) else "NaN or infinity")
            + f" in the input of layer '{path}'. Look at the layers before it and at the range of "
            "the data."
        )


def when_known(inputs: Any, outputs: Any, use: Callable[[Array], None]) -> Any:
    """Calls `use` with the values of `inputs`, now or when the traced graph runs.

    Returns:
        The outputs to pass on.
    """
    x = tensors.without_raggedness(inputs)
    if x.dtype not in (tensors.float32, tensors.float64):
        x = tensors.cast(x, tensors.float32)
    if tensors.has_values(x):
        use(x.numpy())
        return outputs
    # Inside a `tf.function` or loop of the model, such as that of `TimeDistributed`.
    return tensors.after_running(use, x, outputs)
