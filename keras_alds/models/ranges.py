"""Balances the channels between encoder and decoder without changing the outputs.

There is no nonlinearity between the two factors. So the middle channel of each rank can be scaled
by any s > 0: its encoder weights times s, its decoder weights divided by s. In int8, all middle
channels share one scale, which the largest channel determines; much smaller channels use few of
the 255 steps. If the ratio exceeds a few thousand, the file fails to run; see
docs/how-to/targets.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds._backend.calls import replaced_calls, watched
from keras_alds._backend.loops import compiled_loops, passing
from keras_alds.core.slicing import Array
from keras_alds.kinds.base import channels_last, factorized_kind, is_factorized, stock_kind
from keras_alds.models.inventory import walk
from keras_alds.models.observe import when_known
from keras_alds.models.turns import alone

# XNNPACK rejects s_in·s_w/s_out >= 256; in the encoder that ratio is |E|·|x| / (127·|h|). Ranks
# with very small activations are scaled to at most an eighth of the limit.
_LARGEST_GAIN = 127 * 256 / 8


@dataclasses.dataclass(frozen=True)
class Pair:
    """An encoder and a decoder without a nonlinearity between them.

    Attributes:
        layer: The factorized layer, or the stock layer that is the encoder.
        encoder: The encoder's weights; the middle channels are its last axis, or for a stock
            depthwise convolution its last two.
        decoder: The decoder's weights; the middle channels are its second-to-last axis.
        bias: The encoder's bias, or None.
    """

    layer: Any
    encoder: Any
    decoder: Any
    bias: Any


def equalize(model: Any, batches: Iterable[Any] | None = None) -> Callable[[], None]:
    """Equalizes the middle channels of all encoder–decoder pairs of a model, **in place**.

    Pairs are factorized layers and, in Functional and Sequential models, the stock layers that
    `expand` makes: a linear convolution or dense layer whose output goes only to one 1×1
    convolution or dense layer. If the first has no bias, the second may have a larger window, as
    in the fold schemes 1 to 3. Outputs stay the same up to float rounding.

    Args:
        model: A built Keras 3 or tf_keras model.
        batches: Inputs of the model, on which all middle channels get the same largest absolute
            value. None: every rank's encoder and decoder weights get the same norm.

    Returns:
        A function that restores exactly the old values.
    """
    pairs = find_pairs(model)
    seen = _ranges(model, pairs, batches) if batches is not None else {}
    backend = _backend.backend_of(model)
    before: list[tuple[Any, Array]] = []

    def undo() -> None:
        for variable, value in reversed(before):  # a decoder may be the next pair's encoder
            variable.assign(value)

    try:
        for pair in pairs:
            encoder, decoder = backend.value(pair.encoder), backend.value(pair.decoder)
            middle = decoder.shape[-2]
            left = encoder.reshape(-1, middle).astype(np.float64)
            right = np.moveaxis(decoder, -2, 0).reshape(middle, -1).astype(np.float64)
            bias = None if pair.bias is None else backend.value(pair.bias)
            if pair.layer in seen:
                scale = scales_for_ranges(left, right, *seen[pair.layer])
            else:
                scale = scales_for_norms(left, right)
            changed = [
                (pair.encoder, encoder, (left * scale).reshape(encoder.shape)),
                (pair.decoder, decoder, decoder / scale[:, np.newaxis]),
            ]
            if bias is not None:
                changed.append((pair.bias, bias, bias * scale))
            dtypes = [old.dtype for _, old, _ in changed]
            values = [new.astype(dtype) for (*_, new), dtype in zip(changed, dtypes, strict=True)]
            if not all(np.isfinite(value).all() for value in values):
                continue  # weights that are not finite: the conversion raises an error
            for (variable, old, _), value in zip(changed, values, strict=True):
                before.append((variable, old))
                variable.assign(value)
    except BaseException:
        undo()
        raise
    return undo


@contextlib.contextmanager
def equalized(model: Any, batches: Iterable[Any] | None = None) -> Iterator[None]:
    """Applies `equalize` inside the context, then restores exactly the old values."""
    with alone(model):
        undo = equalize(model, batches)
        try:
            yield
        finally:
            undo()


def scales_for_ranges(left: Array, right: Array, ranges: Array, peak: float) -> Array:
    """Scales that give all middle channels the same range.

    Args:
        left: Encoder weights `[inputs, ranks]`.
        right: Decoder weights `[ranks, outputs]`.
        ranges: Largest absolute value of every middle channel on the examples.
        peak: Largest absolute value of the encoder's inputs on the examples.

    Returns:
        Positive finite scales `[ranks]`: multiply encoder columns, divide decoder rows.

    Example:
        >>> scale = scales_for_ranges(np.eye(2), np.eye(2), np.array([1.0, 100.0]), 100.0)
        >>> (scale * [1.0, 100.0]).round(6)
        array([10., 10.])
    """
    gain, out = _peaks(left), _peaks(right.T)
    # Limit the scale of ranks with very small activations.
    ranges = np.maximum(ranges, gain * peak / _LARGEST_GAIN)
    live = (ranges > 0) & (out > 0)
    # With all ranges R, encoder weights are e·R/r and decoder weights d·r/R: equal on both sides.
    level = 1.0
    if live.any() and (gain[live] > 0).any():
        alive = live & (gain > 0)
        level = np.exp(np.mean(np.log(out[alive] * ranges[alive] ** 2 / gain[alive])) / 2)
    scale = np.ones_like(ranges)
    np.divide(level, ranges, out=scale, where=ranges > 0)
    # A rank without activation is scaled so that its decoder row does not set the maximum.
    idle = (ranges == 0) & (out > 0)
    others = (out[live] / scale[live]).min() if live.any() else 1.0
    scale[idle] = out[idle] / others
    return _sane(scale)


def scales_for_norms(left: Array, right: Array) -> Array:
    """Scales that give every rank's encoder and decoder weights the same norm.

    Args:
        left: Encoder weights `[inputs, ranks]`.
        right: Decoder weights `[ranks, outputs]`.

    Returns:
        Positive finite scales `[ranks]`.

    Example:
        >>> scales_for_norms(np.array([[2.0, 0.0]]), np.array([[8.0], [1.0]]))
        array([2., 1.])
    """
    norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    both = (norms[0] > 0) & (norms[1] > 0)
    scale = np.ones(len(both))
    scale[both] = np.sqrt(norms[1][both] / norms[0][both])
    return _sane(scale)


def _peaks(matrix: Array) -> Array:
    return np.abs(matrix).max(axis=0) if matrix.size else np.zeros(matrix.shape[1])


def _sane(scale: Array) -> Array:
    return np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)


# -- Finding the pairs -----------------------------------------------------------------------------


def find_pairs(model: Any) -> list[Pair]:
    """The encoder–decoder pairs of a model: factorized layers, and pairs of stock layers."""
    layers = [layer for _, layer in walk(model)]
    pairs = [
        Pair(layer, layer.encoder, layer.decoder, None)
        for layer in layers
        if is_factorized(layer) and factorized_kind(layer).equalized and layer.built
    ]
    pairs += _stock_pairs(_backend.backend_of(model), symbolic_models(model))
    # Weights in two pairs, or shared with another layer, do not change.
    held = held_once(model)
    return [pair for pair in pairs if {id(pair.encoder), id(pair.decoder)} <= held]


def symbolic_models(model: Any) -> list[Any]:
    """The Functional and Sequential models in a model, with itself."""
    backend = _backend.backend_of(model)
    return [
        layer
        for layer in [model, *(layer for _, layer in walk(model))]
        if backend.is_model(layer) and backend.is_symbolic(layer) and getattr(layer, "inputs", None)
    ]


def held_once(model: Any) -> set[int]:
    """The ids of the weights that only one layer holds."""
    own = _backend.backend_of(model).own_variables
    held = Counter(id(variable) for _, layer in walk(model) for variable in own(layer))
    return {variable for variable, count in held.items() if count == 1}


def _stock_pairs(backend: _backend.Backend, models: list[Any]) -> list[Pair]:
    """Linear stock layers whose output goes only to one layer that can be their decoder."""
    graph = Graph(backend, models)
    pairs = []
    for encoder, calls in graph.calls.items():
        if not stock_kind(encoder).is_encoder(encoder):
            continue
        decoder = graph.reader(calls[0])
        if (
            decoder is not None
            and stock_kind(decoder).is_decoder(decoder, encoder.use_bias)
            and decoder is not encoder
            and all(graph.reader(call) is decoder for call in calls)
            and all(graph.writer(call) is encoder for call in graph.calls[decoder])
        ):
            first, second = (stock_kind(layer).variable(layer) for layer in (encoder, decoder))
            pairs.append(Pair(encoder, first, second, encoder.bias if encoder.use_bias else None))
    return pairs


class Graph:
    """Which layers of symbolic models write tensors, and which read them.

    Reshapes that keep the channels are skipped.

    Attributes:
        calls: The calls of every layer.
    """

    def __init__(self, backend: _backend.Backend, models: list[Any]) -> None:
        self._layers = backend.keras.layers
        self._readers: dict[int, list[_backend.GraphCall]] = {}
        self._writers: dict[int, _backend.GraphCall] = {}
        self._ends: set[int] = set()
        self.calls: dict[Any, list[_backend.GraphCall]] = {}
        for model in models:
            self._ends |= {id(tensor) for tensor in nest.flatten(backend.graph_ends(model)[1])}
            for call in backend.graph(model):
                self._add(call)

    def _add(self, call: _backend.GraphCall) -> None:
        if isinstance(call.layer, self._layers.Layer):  # no operation
            self.calls.setdefault(call.layer, []).append(call)
        self._writers.update((id(tensor), call) for tensor in call.outputs)
        for tensor in {id(tensor) for tensor in nest.flatten((call.args, call.kwargs))}:
            self._readers.setdefault(tensor, []).append(call)

    def reader(self, call: _backend.GraphCall) -> Any:
        """The only layer that reads a call's output, possibly after reshapes, or None."""
        tensor = call.outputs[0]
        while len(call.outputs) == 1 and id(tensor) not in self._ends:
            found = self._readers.get(id(tensor), [])
            if len(found) != 1:
                return None
            (call,) = found
            if type(call.layer) is not self._layers.Reshape:
                return call.layer if call.layer in self.calls else None
            if call.outputs[0].shape[-1] != tensor.shape[-1]:
                return None
            tensor = call.outputs[0]
        return None

    def writer(self, call: _backend.GraphCall) -> Any:
        """The only layer whose output a call reads, or None."""
        tensors = self._read(call)
        while len(tensors) == 1:
            found = self._writers[tensors[0]]
            if type(found.layer) is not self._layers.Reshape:
                return found.layer
            tensors = self._read(found)
        return None

    def _read(self, call: _backend.GraphCall) -> list[int]:
        tensors = map(id, nest.flatten((call.args, call.kwargs)))
        return [tensor for tensor in tensors if tensor in self._writers]


# -- Ranges of the middle channels -----------------------------------------------------------------


def _ranges(
    model: Any, pairs: list[Pair], batches: Iterable[Any]
) -> dict[Any, tuple[Array, float]]:
    """Largest absolute middle values and input value, by the encoding layer."""
    counts = {pair.layer: int(pair.decoder.shape[-2]) for pair in pairs}
    middles: dict[Any, Array] = {}
    peaks: dict[Any, float] = {}

    def note_middle(layer: Any, middle: Array) -> None:
        rows = np.abs(middle).reshape(-1, counts[layer])
        largest = rows.max(axis=0, initial=0).astype(np.float64)
        middles[layer] = np.maximum(largest, middles.get(layer, 0.0))

    def note_input(layer: Any, inputs: Array) -> None:
        peaks[layer] = max(float(np.abs(inputs).max(initial=0)), peaks.get(layer, 0.0))
        if is_factorized(layer):
            note_middle(layer, factorized_kind(layer).encoded(layer, inputs))

    def watch(layer: Any, inputs: Any, outputs: Any) -> Any:
        outputs = when_known(inputs, outputs, functools.partial(note_input, layer))
        if is_factorized(layer):
            return outputs
        return when_known(outputs, outputs, lambda y: note_middle(layer, channels_last(layer, y)))

    replacements = compiled_loops(model), watched(counts, watch)
    with passing(model):
        for batch in batches:
            with replaced_calls(*replacements):
                model(batch, training=False)
    return {
        layer: (middle, peaks[layer])
        for layer, middle in middles.items()
        if np.isfinite(middle).all() and np.isfinite(peaks[layer])
    }
