"""A term of the loss that keeps a model in training like its teacher.

The model's `train_step` and `compute_loss` are wrapped as attributes of the object, for the time of
one `fit`. The wrappers belong to no layer: nothing of them is tracked or saved.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.calls import Replacement, replaced_calls, watched
from keras_alds._backend.layers import Layer, Model
from keras_alds._backend.refining import relative_error
from keras_alds._backend.tensors import comparable

_WRAPPED = ("train_step", "compute_loss", "make_train_function")

#: The distance of a student's output from a teacher's.
Distance = Callable[[Any, Any], Any]


def softmax_divergence(student: Any, teacher: Any, temperature: float) -> Any:
    """The Kullback–Leibler divergence of scores before softmax, times the squared temperature."""
    ours = tf.nn.log_softmax(student / temperature)
    wanted = tf.nn.log_softmax(teacher / temperature)
    each = tf.reduce_sum(tf.exp(wanted) * (wanted - ours), axis=-1)
    return temperature**2 * tf.reduce_mean(each)


def sigmoid_divergence(student: Any, teacher: Any, temperature: float) -> Any:
    """As `softmax_divergence`, of scores before sigmoid."""

    def two(scores: Any) -> Any:
        return tf.stack([scores, tf.zeros_like(scores)], axis=-1)

    return softmax_divergence(two(student), two(teacher), temperature)


class Distiller:
    """Computes in the graph of a training step how far a model is from its teacher.

    Args:
        part: The model, the one that is trained or one inside it.
        teacher: What it is to be like. It is run on the same inputs in inference mode.
        distances: For each output the distance to take, None for outputs that do not count.
        features: Layers of both whose outputs are compared, by a name for each pair.
        weight: What to multiply the term by.
    """

    def __init__(
        self,
        part: Model,
        teacher: Model,
        distances: Sequence[Distance | None],
        features: Mapping[str, tuple[Layer, Layer]],
        weight: float,
    ) -> None:
        self.part, self._teacher, self._distances, self._weight = part, teacher, distances, weight
        self._sides = [{pair[side]: name for name, pair in features.items()} for side in range(2)]
        self._step = _Step()

    def watching(self) -> dict[Layer, Replacement]:
        """What watches the calls of the model and its layers, in one training step."""
        self._step.calls, self._step.features, self._step.added = [], [], False

        def watch_part(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            self._step.calls.append((args, kwargs, outputs))
            return outputs

        return {**watched(self._sides[0], _into(self._step.features)), self.part: watch_part}

    def term(self) -> Any:
        """The term of the loss, from what was watched since the last one in this step."""
        calls, self._step.calls = self._step.calls, []
        if self._step.added and not calls:
            return tf.constant(0.0)  # two losses of the same calls: the first one has it
        self._step.added = True
        losses: list[Any] = []
        wanted_features: list[tuple[Any, Any]] = []
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        for args, kwargs, outputs in calls:
            flat = comparable(outputs)
            if graph is not None and any(y.graph is not graph for y in flat):
                continue  # in a loop or a `tf.function` inside of the step
            kwargs = {k: v for k, v in kwargs.items() if v is not None and k != "training"}
            with replaced_calls(watched(self._sides[1], _into(wanted_features))):
                wanted = comparable(
                    _backend.backend_of(self.part).infer(self._teacher, args, kwargs)
                )
            losses += [
                distance(tf.cast(y, tf.float32), tf.stop_gradient(tf.cast(target, tf.float32)))
                for y, target, distance in zip(flat, wanted, self._distances, strict=True)
                if distance is not None
            ]
        if not losses:
            raise ValueError(
                f"Expected the `train_step` or `compute_loss` of {type(self.part).__name__} to "
                f"call the model '{self.part.name}', for `distill` to compare with its teacher. "
                "Received: no call"
            )
        outputs_of_a_call = sum(distance is not None for distance in self._distances)
        loss = tf.add_n(losses) * (outputs_of_a_call / len(losses))  # the mean of the calls
        return self._weight * (loss + self._feature_term(wanted_features))

    def _feature_term(self, wanted: list[tuple[Any, Any]]) -> Any:
        """The mean relative error of the features, 0 if there are none."""
        names = self._sides
        ours = _by_number(names[0], self._step.features)
        theirs = _by_number(names[1], wanted)
        self._step.features.clear()  # in place: the layers' calls add to it
        errors = [
            relative_error(ours[key], tf.stop_gradient(theirs[key]))
            for key in ours.keys() & theirs.keys()
        ]
        return tf.add_n(errors) / len(errors) if errors else tf.constant(0.0)

    def check(self) -> None:
        """Raises a ValueError if a training step has ended without the term."""
        if not self._step.added:
            raise ValueError(_no_compute_loss(self.part))


class _Step(threading.local):
    """What one training step has seen; replicas run in threads of their own."""

    calls: list[tuple[Any, Any, Any]]
    features: list[tuple[Any, Any]]
    added: bool


def _into(found: list[tuple[Any, Any]]) -> Callable[[Any, Any, Any], Any]:
    def watch(layer: Any, _: Any, outputs: Any) -> Any:
        found.append((layer, outputs))
        return outputs

    return watch


def _by_number(names: Mapping[Any, str], found: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The floating-point tensors of this graph, by the name of their layer and their number."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    counts: dict[str, int] = {}
    numbered = {}
    for layer, outputs in found:
        for tensor in comparable(outputs):
            if tensor.dtype.is_floating and (graph is None or tensor.graph is graph):
                number = counts[names[layer]] = counts.get(names[layer], 0) + 1
                numbered[names[layer], number] = tensor
    return numbered


def check_train_step(model: Model) -> None:
    """Raises a ValueError if a model's own `train_step` does not call `compute_loss`."""
    if not _names_compute_loss(type(model), "train_step", set()):
        raise ValueError(_no_compute_loss(model))


def _no_compute_loss(model: Model) -> str:
    return (
        f"Expected the `train_step` of {type(model).__name__} to get its loss from "
        "`self.compute_loss`, to which `distill` adds its own. Received: a `train_step` that does "
        "not call it"
    )


def _names_compute_loss(cls: type, name: str, seen: set[Any]) -> bool:
    """Whether the code of a method, or of methods that it names, calls `compute_loss`."""
    function = inspect.getattr_static(cls, name, None)
    function = inspect.unwrap(getattr(function, "python_function", function))
    if not hasattr(function, "__code__") or function in seen:
        return False
    seen.add(function)
    names: set[str] = set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        names |= set(code.co_names)
        waiting += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    if {"super", "train_step"} <= names or any(n.lstrip("_") == "compute_loss" for n in names):
        return True
    return any(_names_compute_loss(cls, other, seen) for other in names)


class _Hook:
    """The wrappers around a model's methods, and what they add to its loss."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.distillers: list[Distiller] = []
        self._run, self._loss = model.train_step, model.compute_loss
        self._active = threading.local()
        self._has_loss = (
            type(model).compute_loss is not _backend.backend_of(model).keras.Model.compute_loss
            or getattr(model, "loss", None) is not None
        )
        own = {"train_step": self.train_step, "compute_loss": self.compute_loss}
        # The next `fit` calls it, if this one was interrupted and has not cleaned up.
        model.__dict__.update(own, make_train_function=self.made_again)

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        watching = [distiller.watching() for distiller in self.distillers]
        self._active.now = True
        try:
            with replaced_calls(*watching):
                logs = self._run(*args, **kwargs)
        finally:
            self._active.now = False
        for distiller in self.distillers:
            distiller.check()
        return logs

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self._active, "now", False):
            return self._loss(*args, **kwargs)  # in `test_step`
        # Keras 3 would find no loss; that of tf_keras is None without labels.
        has_loss = self._has_loss or self.model.losses
        loss = self._loss(*args, **kwargs) if has_loss else None  # it may call the model
        total = tf.add_n([distiller.term() for distiller in self.distillers])
        total /= tf.distribute.get_strategy().num_replicas_in_sync
        return total if loss is None else loss + tf.cast(total, loss.dtype)

    def made_again(self, force: bool = False) -> Any:
        self.remove()
        return self.model.make_train_function(force=True)

    def remove(self) -> None:
        for name in _WRAPPED:
            self.model.__dict__.pop(name, None)
        self.model.train_function = None


def install(model: Model, distiller: Distiller) -> None:
    """Adds a term to the loss of a model, in the `fit` that is running.

    Another term for the same part is replaced.
    """
    hook = _hook_of(model) or _Hook(model)
    hook.distillers = [d for d in hook.distillers if d.part is not distiller.part] + [distiller]
    type(model).make_train_function(model, force=True)


def remove(model: Model) -> None:
    """Takes all terms that were added to the loss of a model away."""
    if (hook := _hook_of(model)) is not None:
        hook.remove()


def _hook_of(model: Model) -> _Hook | None:
    found = getattr(vars(model).get("train_step"), "__self__", None)
    return found if isinstance(found, _Hook) else None


def divergence_of(
    divergence: Callable[..., Any], scores: Callable[[Any], Any], temperature: float
) -> Distance:
    """The divergence of outputs, by what makes scores of them."""
    return lambda *outputs: divergence(*map(scores, outputs), temperature)
