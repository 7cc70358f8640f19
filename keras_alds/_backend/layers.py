"""Layers: what they hold, and how one becomes another one in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf


class KerasModel(Protocol):
    """A `keras.Model` or a `tf_keras.Model`, as far as this package's functions are typed by it."""

    name: Any
    built: Any
    weights: Any
    inputs: Any

    def count_params(self) -> Any:
        """The number of parameters."""


Layer = Any  # a keras.layers.Layer or a tf_keras.layers.Layer
Model = Any
Optimizer = Any
Variable = Any
Undo = Callable[[], None]
Pairs = Iterable[tuple[Variable, Variable]]


def dtype_policy(layer: Layer) -> Any:
    """A layer's dtype policy."""
    return layer.dtype_policy


def projections(layer: Layer, names: Iterable[str]) -> dict[str, Layer | None]:
    """The projections of an attention layer, such as `query`; None for one that it has not."""
    return {name: getattr(layer, f"_{name}_dense", None) for name in names}


def pruning_mask(wrapper: Layer, weight: Variable) -> tuple[Any, Any]:
    """The threshold and the mask that TF-MOT's pruning `wrapper` would give a weight now.

    `conditional_mask_update` assigns the same, but waits for the schedule's next turn.
    """
    return wrapper.pruning_obj._maybe_update_block_mask(weight)


class Layers:
    """Questions about layers, with the answers that hold for Keras 3 and tf_keras."""

    name: str
    keras: ModuleType
    # Attributes of a layer that belong to its place in the model, and stay when it changes.
    _place: tuple[str, ...]
    # Attributes that bind methods of the object that they were made for.
    _bound: tuple[str, ...] = ()

    def is_model(self, obj: object) -> bool:
        """Whether `obj` is a model."""
        return isinstance(obj, self.keras.Model)

    def children(self, layer: Layer) -> list[Layer]:
        """The layers that `layer` directly holds, in creation order (no metrics)."""
        return list(layer._flatten_layers(include_self=False, recursive=False))

    def own_variables(self, layer: Layer) -> list[Variable]:
        """The weights that `layer` holds itself, without those of the layers inside it."""
        inside = {id(v) for child in self.children(layer) for v in child.weights}
        return [v for v in layer.weights if id(v) not in inside]

    def weights(self, model: Model) -> list[Variable]:
        """The weights of a model; tf_keras lists vocabularies among them, which are none."""
        return [weight for weight in model.weights if hasattr(weight, "shape")]

    def has_its_weights(self, layer: Layer) -> bool:
        """Whether the weights of a layer are made, or it has no `build` that could make some."""
        layers = self.keras.layers  # in tf_keras, random layers build their generator only
        stateless = (layers.Layer.build, layers.Dropout.build)
        return bool(layer.built or type(layer).build in stateless)

    def value(self, variable: Variable) -> np.ndarray:
        """The values of a variable as a NumPy array."""
        tensor = tf.convert_to_tensor(variable)
        if tensor.dtype == tf.bfloat16:
            tensor = tf.cast(tensor, tf.float32)
        return tensor.numpy()  # one copy, where `ops.convert_to_numpy` holds two for a while

    def copy_trainable(self, old: Variable, new: Variable) -> None:
        """Freezes `new` if `old` is frozen by itself, which only Keras 3 allows."""

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        """The scope that gives a layer's new variables their names."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def creation_scope(self, model: Model) -> Iterator[None]:
        """Where new variables of `model` have to be made (its distribution strategy)."""
        strategy = getattr(model, "distribute_strategy", None)
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            yield

    def transplant(self, old: Layer, new: Layer, kept: Mapping[str, str] | None = None) -> Undo:
        """Turns the layer object `old` into what `new` is; `new` must not be used afterwards.

        Class and state are replaced; the object itself, its name and its place in every graph
        stay, so whoever holds a reference to the layer goes on holding it. The variables that are
        kept stay the same objects too, and with them whatever an optimizer keeps for them.

        Args:
            old: A built layer.
            new: A built layer with the same inputs and outputs.
            kept: Variables that the two have in common: `{attribute of old: attribute of new}`, in
                the order of the last variables of `new`. Defaults to none.

        Returns:
            A function that puts everything back.
        """
        for theirs, ours in (kept or {}).items():
            if getattr(old, theirs, None) is not None and getattr(new, ours, None) is not None:
                self._share(getattr(old, theirs), new, ours)
        before, before_class = dict(old.__dict__), type(old)
        state = {key: value for key, value in new.__dict__.items() if key not in self._bound}
        state.update({key: before[key] for key in self._place if key in before})
        state.update(self._losses_of(old, new))

        become(old, type(new), state)
        return lambda: become(old, before_class, before)

    def renew_bidirectional(self, layer: Layer) -> Undo:
        """Lets a `Bidirectional` save and copy its two layers as they are now.

        Returns:
            A function that puts everything back.
        """
        return lambda: None

    def adopt(self, layer: Layer, cls: type, attributes: dict[str, Any]) -> Undo:
        """Makes `layer` one of a subclass of its class, with further attributes.

        Returns:
            A function that puts everything back.
        """
        before, before_class = dict(layer.__dict__), type(layer)
        become(layer, cls, {**before, **attributes})
        return lambda: become(layer, before_class, before)

    def _losses_of(self, old: Layer, new: Layer) -> dict[str, Any]:
        """Attributes of what `old` becomes that hold losses of the layer's weights."""
        return {}

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        raise NotImplementedError

    def use_plain_convolutions(self, layers: Sequence[Layer]) -> None:
        """Lets stock grouped convolutions run without XLA, whose gradient is very slow on CPUs.

        The layers compute the same; what is saved does not change. Nothing in Keras 3, which has
        no such switch.
        """


class Keras3Layers(Layers):
    """The answers of Keras 3."""

    _place = (
        "_inbound_nodes",
        "name",
        "_path",
        "_build_shapes_dict",
    )
    _bound = ("build", "quantize")

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        scopes = contextlib.ExitStack()
        for name in getattr(layer, "scope", "").split("/")[:-1]:  # the last is the layer's own
            scopes.enter_context(keras.name_scope(name))
        return scopes

    def copy_trainable(self, old: Variable, new: Variable) -> None:
        if new.trainable != old.trainable:
            new.trainable = old.trainable

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        trainable = variable.trainable
        tracker = new._tracker
        locked = tracker.locked
        tracker.unlock()
        tracker.untrack(getattr(new, name))
        variable.trainable = True  # so that it is listed where `layer.trainable = …` looks for it
        setattr(new, name, variable)
        variable.trainable = trainable
        if locked:
            tracker.lock()


@functools.cache
def _plain_convolutions_train() -> bool:
    """Whether grouped convolutions have a gradient: on CPUs only with oneDNN, which may be off."""
    kernel = tf.ones((1, 1, 1, 2))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        try:
            outputs = tf.nn.conv2d(tf.ones((1, 2, 2, 2)), kernel, 1, "VALID")
            return tape.gradient(outputs, kernel) is not None
        except tf.errors.OpError:
            return False


class TfKerasLayers(Layers):
    """The answers of tf_keras."""

    _place = (
        "_inbound_nodes_value",
        "_outbound_nodes_value",
        "_name",
        "_build_input_shape",
    )

    def value(self, variable: Variable) -> np.ndarray:
        return np.asarray(variable)

    def use_plain_convolutions(self, layers: Sequence[Layer]) -> None:
        if not _plain_convolutions_train():
            return
        for layer in layers:
            if getattr(layer, "groups", 1) > 1 and hasattr(layer, "_jit_compiled_convolution_op"):
                layer._jit_compiled_convolution_op = layer.convolution_op

    def name_scope(self, layer: Layer) -> contextlib.AbstractContextManager[Any]:
        return tf.name_scope(getattr(layer, "scope", layer.name))

    def renew_bidirectional(self, layer: Layer) -> Undo:
        # It makes both of its layers from the config of the one that it was given, and saves that.
        forward, backward = layer.forward_layer, layer.backward_layer
        given = type(forward).from_config({**forward.get_config(), "name": layer.layer.name})
        config = self.keras.saving.serialize_keras_object(backward)
        config["config"]["name"] = backward.name.removeprefix("backward_")
        return self.adopt(layer, type(layer), {"layer": given, "_backward_layer_config": config})

    def own_variables(self, layer: Layer) -> list[Variable]:
        # Vocabularies are listed there too.
        return [v for v in super().own_variables(layer) if hasattr(v, "shape")]

    def _share(self, variable: Variable, new: Layer, name: str) -> None:
        delattr(new, name)
        setattr(new, name, variable)

    def _losses_of(self, old: Layer, new: Layer) -> dict[str, Any]:
        # Layers hold functions: those of weights come with the weights, others stay.
        held = {id(variable) for variable in self.own_variables(new)}
        losses = [
            loss
            for layer in (old, new)
            for loss in layer._callable_losses
            if (weight := _regularized(loss)) is None or id(weight) in held
        ]
        return {"_callable_losses": losses}


def become(obj: Any, cls: type, attributes: dict[str, Any]) -> None:
    """Gives an object another class and other attributes."""
    object.__setattr__(obj, "__class__", cls)
    obj.__dict__.clear()
    obj.__dict__.update(attributes)


def static_shape(value: Any) -> tuple[int | None, ...] | None:
    """The shape of a tensor or variable, or None of what has none."""
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _regularized(loss: Callable[..., Any]) -> Variable | None:
    """The weight whose regularizer a loss of a layer is, or None."""
    (inner,) = loss.args if isinstance(loss, functools.partial) else (None,)
    if not isinstance(inner, functools.partial) or inner.func.__name__ != "_loss_for_variable":
        return None
    return inner.args[0]
