"""Gradients and steps that bring a model nearer to another one, in the graphs of TensorFlow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.calls import Replacement, replaced_calls, watched
from keras_alds._backend.loops import Traced
from keras_alds._backend.tensors import comparable

# Adam's, as published. Its epsilon is Keras's.
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7
# Gradients of relative errors are smaller than the least float16.
_FIRST_SCALE = 2.0**15
# Probabilities are not trusted below this; it is a number in float16, too.
_LEAST_PROBABILITY = 1e-7

#: Makes of an output what errors are measured on: scores of probabilities.
Scores = Callable[[Any], Any]


def as_is(output: Any) -> Any:
    """An output that is compared as it is, such as scores before softmax."""
    return output


def centred_logarithms(output: Any) -> Any:
    """Scores whose softmax are the given probabilities; they are 0 on average."""
    scores = tf.math.log(tf.maximum(output, _LEAST_PROBABILITY))
    return scores - tf.reduce_mean(scores, axis=-1, keepdims=True)


def log_odds(output: Any) -> Any:
    """Scores whose sigmoids are the given probabilities."""
    return sum(
        sign * tf.math.log(tf.maximum(part, _LEAST_PROBABILITY))
        for sign, part in ((1, output), (-1, 1 - output))
    )


def outputs_of(model: Any, inputs: Any) -> list[Any]:
    """The outputs of a model in inference mode, as tensors that can be compared."""
    return comparable(model(inputs, training=False))


class Refiner:
    """Takes steps of Adam that bring the outputs of a model and of its blocks to another model's.

    Args:
        small: The model that is trained.
        original: The model that it is to be like.
        variables: The variables of `small` to train.
        masks: What to multiply single variables by after every step, by their `id`.
        blocks: The layers of both models whose outputs are compared, by a name for each pair.
        factorized: The factorized layers of `small`. Their factors get gradients in the way that
            is fastest in training.
        scores: For each output what makes it comparable, None for outputs that do not count.
    """

    def __init__(
        self,
        small: Any,
        original: Any,
        variables: Sequence[Any],
        *,
        masks: Mapping[int, Any],
        blocks: Mapping[str, tuple[Any, Any]],
        factorized: Sequence[Any],
        scores: Sequence[Scores | None],
    ) -> None:
        self._models = small, original
        self._variables = list(variables)
        self._masks = masks
        self._watched = [{pair[side]: name for name, pair in blocks.items()} for side in range(2)]
        self._trained = {
            layer: _in_training
            for layer in factorized
            if "training" in inspect.signature(layer.call).parameters
        }
        self._scores = scores
        half = any(
            getattr(x, "compute_dtype", None) == "float16" for x in _backend.layers_of(small)
        )
        with tf.init_scope(), _backend.backend_of(small).creation_scope(small):
            self._scale = tf.Variable(_FIRST_SCALE if half else 1.0, trainable=False)
            self._taken = tf.Variable(0.0, trainable=False)
            self._slots = [
                [tf.Variable(tf.zeros(v.shape), trainable=False) for _ in range(3)]
                for v in self._variables
            ]
        self._gradients = Traced(self._add_gradients)
        self._steps = Traced(self._step)

    def add(self, batch: Any, weight: float) -> float:
        """Adds the gradient for some examples to that of the next step.

        Args:
            batch: The examples.
            weight: Their part of all examples of the step.

        Returns:
            The loss.

        Raises:
            ValueError: If no variable has a gradient.
        """
        return float(self._gradients((batch, tf.constant(weight, tf.float32))))

    def step(self, rate: float) -> None:
        """Takes a step of Adam with a learning rate. None is taken if a gradient is not finite."""
        self._steps(tf.constant(rate, tf.float32))

    def values(self) -> list[Any]:
        """Copies of the variables."""
        return [tf.identity(tf.convert_to_tensor(v)) for v in self._variables]

    def assign(self, values: Sequence[Any]) -> None:
        """Gives the variables these values."""
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)

    def _forward(self, side: int, inputs: Any) -> tuple[list[Any], dict[tuple[str, int], Any]]:
        """The outputs of one of the models, and those of its blocks by name and number."""
        graph = tf.compat.v1.get_default_graph()
        names = self._watched[side]
        blocks: dict[tuple[str, int], Any] = {}
        counts: dict[str, int] = {}

        def watch(layer: Any, _: Any, outputs: Any) -> Any:
            for tensor in tf.nest.flatten(outputs, expand_composites=True):
                # Those of a loop, such as that of `TimeDistributed`, are known inside it only.
                if tensor.dtype.is_floating and getattr(tensor, "graph", None) is graph:
                    number = counts[names[layer]] = counts.get(names[layer], 0) + 1
                    blocks[names[layer], number] = tensor
            return outputs

        trained: Mapping[Any, Replacement] = {} if side else self._trained
        with replaced_calls(trained, watched(names, watch)):
            outputs = outputs_of(self._models[side], inputs)
        return outputs, blocks

    def _add_gradients(self, arguments: Any) -> Any:
        inputs, weight = arguments
        wanted, targets = self._forward(1, inputs)
        sources = [_source(variable) for variable in self._variables]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            outputs, blocks = self._forward(0, inputs)
            loss = self._loss(outputs, wanted, blocks, targets)
            scaled = loss * self._scale
        gradients = tape.gradient(scaled, sources)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"Expected the outputs of the model '{self._models[0].name}' to have gradients by "
                "its factors. Received: none, as for outputs of `argmax` or `round`"
            )
        for gradient, (total, *_) in zip(gradients, self._slots, strict=True):
            if gradient is not None:
                total.assign_add(tf.cast(tf.convert_to_tensor(gradient), tf.float32) * weight)
        return loss

    def _loss(
        self,
        outputs: Sequence[Any],
        wanted: Sequence[Any],
        blocks: Mapping[tuple[str, int], Any],
        targets: Mapping[tuple[str, int], Any],
    ) -> Any:
        losses = [
            relative_error(scores(tf.cast(y, tf.float32)), scores(tf.cast(target, tf.float32)))
            for y, target, scores in zip(outputs, wanted, self._scores, strict=True)
            if scores is not None
        ]
        loss = tf.add_n(losses)
        both = [
            (blocks[key], targets[key])
            for key in blocks.keys() & targets.keys()
            if blocks[key].shape.rank == targets[key].shape.rank
            and blocks[key].shape.is_compatible_with(targets[key].shape)
        ]
        if both:
            loss += tf.add_n([relative_error(*pair) for pair in both]) / len(both)
        return loss

    def _step(self, rate: Any) -> None:
        totals = [total for total, *_ in self._slots]
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(total)) for total in totals])
        taken = self._taken.assign_add(tf.cast(finite, tf.float32))
        done = tf.maximum(taken, 1.0)
        for variable, (total, mean, square) in zip(self._variables, self._slots, strict=True):
            gradient = tf.where(finite, total / self._scale, tf.zeros_like(total))
            new_mean = _BETA_1 * mean + (1 - _BETA_1) * gradient
            new_square = _BETA_2 * square + (1 - _BETA_2) * tf.square(gradient)
            change = new_mean / (1 - _BETA_1**done)
            change /= tf.sqrt(new_square / (1 - _BETA_2**done)) + _EPSILON
            old = tf.convert_to_tensor(variable)
            new = old - tf.cast(rate * change, old.dtype)
            if id(variable) in self._masks:
                new *= tf.cast(tf.convert_to_tensor(self._masks[id(variable)]), new.dtype)
            if getattr(variable, "constraint", None) is not None:
                new = tf.convert_to_tensor(variable.constraint(new))
            variable.assign(tf.where(finite, new, old))
            mean.assign(tf.where(finite, new_mean, mean))
            square.assign(tf.where(finite, new_square, square))
            total.assign(tf.zeros_like(total))
        self._scale.assign(tf.where(finite, self._scale, self._scale / 2))


def _source(variable: Any) -> Any:
    """What a tape watches of a variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def _in_training(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a factorized layer as in training, which changes its speed and no values."""
    return call(*args, **{**kwargs, "training": True})


def relative_error(value: Any, target: Any) -> Any:
    """The squared error of a value relative to the squared target."""
    value, target = tf.cast(value, tf.float32), tf.cast(target, tf.float32)
    error = tf.reduce_sum(tf.math.squared_difference(value, target))
    return tf.math.divide_no_nan(error, tf.reduce_sum(tf.square(target)))
