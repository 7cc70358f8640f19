"""Passes over examples: recurrent layers as graphs, and what a pass must leave as it was.

Without a graph, the steps of a recurrent layer run one by one in Python, a hundred times slower
than in `predict`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend import tensors
from keras_alds._backend.calls import Replacement, replacements_of
from keras_alds._backend.functions import run_as_code
from keras_alds._backend.layers import like
from keras_alds._backend.tensors import keeping_errors


class InGraph:
    """Replaces a call of a layer by the same call as a graph.

    A graph is traced for every kind of arguments, also where `tf.function`s run eagerly. A call
    that cannot be traced runs as it is.

    Args:
        layer: The layer. Calls of the layers in it may be replaced too; these calls are traced.
    """

    def __init__(self, layer: Any) -> None:
        self._inside = _backend.layers_of(layer)[1:]
        self._functions: dict[Any, Any] = {}
        self._errors: list[BaseException] = []  # what watchers raise while a graph runs

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return call(*args, **kwargs)
        leaves = tf.nest.flatten((args, kwargs))
        places = [n for n, leaf in enumerate(leaves) if _has_values(leaf)]
        values = [leaves[n] for n in places]
        kind = tf.nest.map_structure(
            lambda leaf: ... if _has_values(leaf) else leaf, (args, kwargs)
        )
        key = replacements_of(self._inside), repr(kind)
        if key not in self._functions:

            def traced(*symbols: Any) -> Any:
                full = list(leaves)
                for n, symbol in zip(places, symbols, strict=True):
                    full[n] = symbol
                some, named = tf.nest.pack_sequence_as((args, kwargs), full)
                return call(*some, **named)

            self._functions[key] = tf.function(traced, autograph=False, reduce_retracing=True)
        try:
            with keeping_errors(self._errors):
                graph = self._functions[key].get_concrete_function(*values)
        except Exception:  # code that needs values; any other error comes again
            return call(*args, **kwargs)
        try:
            return graph(*values)
        except tf.errors.OpError as error:
            if not self._errors:
                raise
            raise self._errors[0] from error
        finally:
            self._errors.clear()


def _has_values(leaf: Any) -> bool:
    return tf.is_tensor(leaf) or isinstance(leaf, np.ndarray)


class Traced:
    """A function of a nested structure of tensors, run as a graph.

    It is traced where `tf.function`s run eagerly, too.

    Args:
        function: The function.
        or_as_code: Whether to run it as it is if it cannot be traced. Defaults to False.
    """

    def __init__(self, function: Callable[[Any], Any], *, or_as_code: bool = False) -> None:
        self._function = function
        self._or_as_code = or_as_code
        self._failed = False
        self._graphs: dict[str, Any] = {}

    def __call__(self, inputs: Any) -> Any:
        flat = tf.nest.flatten(inputs, expand_composites=True)
        if not self._or_as_code:
            return self._graph_of(inputs, flat)(*flat)
        if not self._failed:
            try:
                return self._graph_of(inputs, flat)(*flat)
            except Exception:  # as code, any other error comes again, and says more
                self._failed = True
        return self._function(inputs)

    def _graph_of(self, inputs: Any, flat: list[Any]) -> Any:
        kinds = [(str(leaf.dtype), len(leaf.shape)) for leaf in flat]
        key = repr((tf.nest.map_structure(lambda leaf: ..., inputs), kinds))
        if key not in self._graphs:

            def traced(*leaves: Any) -> Any:
                return self._function(
                    tf.nest.pack_sequence_as(inputs, leaves, expand_composites=True)
                )

            self._graphs[key] = tf.function(traced, autograph=False, reduce_retracing=True)
        return self._graphs[key].get_concrete_function(*flat)


def compiled_loops(model: Any) -> dict[Any, Replacement]:
    """Replacements that run the recurrent layers of a model as graphs."""
    recurrent = _backend.backend_of(model).keras.layers.RNN
    return {
        layer: InGraph(layer) for layer in _backend.layers_of(model) if isinstance(layer, recurrent)
    }


def all_steps_of(layer: Any) -> Callable[..., Any]:
    """The call of a recurrent layer, but it returns the outputs of all steps and the last states.

    Masked steps repeat the output before them, and the states of a stateful layer do not change.
    """
    flags = dict.fromkeys(("return_sequences", "return_state"), True)
    flags |= dict.fromkeys(("zero_output_for_mask", "stateful", "_stateful"), False)
    # Of a second layer with the same cell: other threads may be using this one.
    other = like(layer, **{name: flag for name, flag in flags.items() if name in vars(layer)})
    return functools.partial(type(layer).call, other)


def states_of(model: Any) -> list[Any]:
    """The variables in which the stateful layers of a model, or that it is, keep their states."""
    stateful = [layer for layer in _backend.layers_of(model) if getattr(layer, "stateful", False)]
    states = tf.nest.flatten([getattr(layer, "states", None) for layer in stateful])
    return [state for state in states if state is not None]


@contextlib.contextmanager
def same_noise(model: Any) -> Iterator[None]:
    """Lets a model and its copies draw the same random numbers, each in such a context."""
    backend = _backend.backend_of(model)
    with backend.seeded(model), restored(seeds := backend.seeds(model)):
        for number, seed in enumerate(seeds):
            backend.reset_seed(seed, number)
        yield


@contextlib.contextmanager
def restored(states: Sequence[Any]) -> Iterator[None]:
    """Gives variables their values back afterwards."""
    before = [tf.identity(tf.convert_to_tensor(state)) for state in states]
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            known = tensors.has_values(value)
            if not known or not np.array_equal(tf.convert_to_tensor(state), value):
                state.assign(value)


def unchanged(model: Any) -> contextlib.AbstractContextManager[None]:
    """Gives what a model keeps besides weights, such as moments and seeds, its values back.

    Some layers change it in inference, too.
    """
    variables = model.non_trainable_variables
    return restored([v for v in variables if len(getattr(v, "shape", (0, 0))) <= 1])


@contextlib.contextmanager
def passing(model: Any) -> Iterator[None]:
    """Surrounds a pass over examples: states and losses of layers are as before afterwards.

    Random layers draw the same numbers in the next pass, so that passes can be compared.

    Raises:
        ValueError: If TensorFlow cannot compute the model on a batch.
    """
    backend = _backend.backend_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_as_code(backend.layers_of(model)))
        stack.enter_context(backend.seeded(model))
        stack.enter_context(restored([*states_of(model), *backend.seeds(model)]))
        try:
            yield
        except tf.errors.InvalidArgumentError as error:
            text = re.sub("\x1b\\[[0-9;]*m", "", str(error))  # Keras 3 prints in colours
            if "IteratorGetNext" in text:
                raise  # the user's data set fails, not the model
            reason = " ".join(line.strip() for line in text.splitlines()[:3] if line.strip())
            raise ValueError(
                f"Expected the model '{model.name}' to run on any batch of examples. Received: "
                f"{type(error).__name__}: {reason[:400]}. If the examples of a batch belong "
                "together, as the nodes of a graph do, the inputs need a fixed batch size: "
                "`Input(…, batch_size=n)`."
            ) from error
        finally:
            backend.clear_losses(model)
