"""Rebuilds a Keras 3 model in tf_keras, which TF-MOT requires."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_alds import _backend
from keras_alds._backend.graphs import mask_of
from keras_alds._backend.layers import dtype_policy
from keras_alds.kinds.base import HAS_LORA, is_own, stock_kind
from keras_alds.kinds.holders import own_class
from keras_alds.models.inventory import walk
from keras_alds.models.rebuild import GraphRebuilder, Piece, check_symbolic, first_tensor
from keras_alds.tfmot.operations import translated
from keras_alds.tfmot.settings import (
    SAME_ACTIVATIONS,
    UnsupportedError,
    class_name,
    compile_arguments,
    counterpart,
    equal,
    parameters,
)


def to_tf_keras(model: Any) -> Any:
    """Returns a tf_keras model with the layers, weights and outputs of a Keras 3 model.

    TF-MOT and other tools accept only tf_keras models. `model` is not changed. Layers keep their
    names, weights, dtype policies, regularizers, constraints and trainable flags; shared layers
    stay shared and nested models nested. A Sequential model stays Sequential if every layer
    becomes one layer or a chain of layers. A compiled model stays compiled, with a new optimizer of
    the same class and settings, if tf_keras has everything it was compiled with. Otherwise a
    warning names what is missing and the new model is not compiled. A `train_step` of the model's
    class is not copied, because it was written for Keras 3.

    Other constructs are translated. Operators and `keras.ops` functions between layers (`x / 255`,
    `a + b`, `keras.ops.mean(x, axis=1)`, …) become stock layers (`Rescaling`, `Add`, …) or
    TensorFlow operation layers. Keras 3's `hard_sigmoid` and `hard_silu`, which tf_keras computes
    differently or lacks, become `Rescaling`, `ReLU` and `Multiply`. The private layers of
    `keras.applications` become stock layers. Factorized layers become those of
    `keras_alds.tf_keras`; to get stock layers, `expand` the model first.

    The penalties of activity regularizers differ: tf_keras divides them by the batch size. It also
    counts the weight regularizers of frozen layers, which Keras 3 leaves out.

    Args:
        model: A built Functional or Sequential Keras 3 model.

    Returns:
        A new `tf_keras.Model` or `tf_keras.Sequential`. Its outputs equal those of `model` up to
        float rounding.

    Raises:
        ImportError: If tf_keras is not installed.
        ValueError: If `model` is not a built Functional or Sequential Keras 3 model, or holds
            layers that cannot be converted; the text names all of them, and why.

    Example:
    ```python
    stock = keras_alds.expand(keras_alds.compress(model, cr=0.5))
    for_tfmot = keras_alds.to_tf_keras(stock)
    ```
    """
    target = _backend.tf_keras_backend()
    source = check_symbolic(model, "to_tf_keras")
    if source is target:
        raise ValueError(
            "Expected a Keras 3 model, to rebuild it in tf_keras. "
            f"Received: '{model.name}', which is a tf_keras model already."
        )
    rebuilder = _Translator(source, target)
    rebuilder.check(model)
    new = rebuilder.rebuild(model)
    if source.is_compiled(model):
        try:
            new.compile(**compile_arguments(source, target, model))
        except Exception as error:
            warnings.warn(
                f"The tf_keras model '{model.name}' is not compiled, because what the Keras 3 one "
                f"was compiled with could not be converted ({error}): call `compile()` on it.",
                stacklevel=2,
            )
    return new


# -- Layers --------------------------------------------------------------------------------------

#: Arguments of the same meaning with another name.
_RENAMED = {("LeakyReLU", "negative_slope"): "alpha"}
#: Arguments that choose an implementation or a random stream and change no output.
_IGNORED = frozenset(["autocast", "flash_attention", "quantization_config", "seed", "use_cudnn"])
_APPLICATIONS = ("StochasticDepth", "LayerScale", "CustomScaleLayer")


class _Translator(GraphRebuilder):
    """tf_keras layers in place of Keras 3 ones."""

    def __init__(self, source: _backend.Backend, target: _backend.Backend) -> None:
        super().__init__(source, target)
        self._made: dict[Any, list[Piece]] = {}
        stock = source.keras.layers
        # Layers whose `activation` is not that of their output.
        self._recurrent = (stock.RNN, stock.SimpleRNNCell, stock.GRUCell, stock.LSTMCell)

    def check(self, model: Any) -> None:
        """Translates every layer; raises one ValueError for all layers without a translation."""
        self.names |= {layer.name for _, layer in walk(model)}
        problems: dict[Any, str] = {}
        graphs = [model, *(m for _, m in walk(model) if self.source.is_symbolic(m))]
        for call in (call for graph in graphs for call in self.calls(graph)):
            layer = call.layer
            if self.source.is_symbolic(layer):
                continue
            try:
                if isinstance(layer, self.source.keras.layers.InputLayer):
                    self.input_layer(layer)
                else:
                    self.pieces(call)
            except UnsupportedError as error:
                problems[layer] = f"'{layer.name}' ({type(layer).__name__}): {error}"
            except Exception as error:
                problems[layer] = (
                    f"'{layer.name}' ({type(layer).__name__}): tf_keras does not take its "
                    f"settings ({type(error).__name__}: {error})"
                )
        if problems:
            raise ValueError(
                f"Expected a model whose layers tf_keras has too. Received: '{model.name}' with "
                f"{len(problems)} that cannot be converted: {'; '.join(problems.values())}. "
                "Replace them by stock layers, or build the model in tf_keras and copy the "
                "weights."
            )

    # -- The graph ---------------------------------------------------------------------------

    def calls(self, model: Any) -> list[_backend.GraphCall]:
        # Keras 3 computes masks by operations in the graph; tf_keras passes them on by itself.
        calls = [_without_implicit(self.source, call) for call in self.source.graph(model)]
        needed = {id(tensor) for tensor in tf.nest.flatten(self.source.graph_ends(model)[1])}
        live = []
        for call in reversed(calls):
            is_input = isinstance(call.layer, self.source.keras.layers.InputLayer)
            if is_input or any(id(tensor) in needed for tensor in call.outputs):
                live.append(call)
                needed |= {id(leaf) for leaf in tf.nest.flatten((call.args, call.kwargs))}
        return live[::-1]

    def input_layer(self, layer: Any) -> Any:
        return self.target.keras.layers.InputLayer(
            batch_input_shape=layer.batch_shape,
            dtype=layer.dtype,
            sparse=layer.sparse,
            name=layer.name,
        )

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        layer = call.layer
        if self.source.is_symbolic(layer):
            return [self.model(layer)]
        if not isinstance(layer, self.source.keras.layers.Layer):
            if layer not in self._made:
                values = [*call.args, *call.kwargs.values()]
                symbolic = [_is_symbolic(self.source, value) for value in values]
                self._made[layer] = [translated(self.target, layer, values, symbolic)]
            return self._made[layer]
        shape = getattr(first_tensor(call), "shape", ())
        return self._layer_pieces(layer, len(shape))

    def _layer_pieces(self, layer: Any, axes: int) -> list[Piece]:
        if layer not in self._made:
            self._made[layer] = self._translated(layer, axes)
        return self._made[layer]

    def _translated(self, layer: Any, axes: int) -> list[Piece]:
        stock, kind = self.source.keras.layers, type(layer).__name__
        module = own_class(layer).__module__
        if not is_own(layer) and module.partition(".")[0] != self.source.keras.__name__:
            raise UnsupportedError(f"a class of {module}, not of Keras")
        if kind in _APPLICATIONS:
            return self._of_applications(layer, kind, axes)
        if isinstance(layer, stock.Lambda):
            raise UnsupportedError("its Python function was written for Keras 3")
        cls = self._class_like(layer)
        if cls is None:
            raise UnsupportedError("tf_keras has no such layer")
        if getattr(layer, "quantization_mode", None):
            raise UnsupportedError(
                f"it is quantized ({layer.quantization_mode}); convert before that"
            )
        if getattr(layer, "lora_enabled", False):
            raise UnsupportedError(HAS_LORA)
        if isinstance(layer, stock.TimeDistributed):
            return self._time_distributed(layer, axes)
        config, tail = self._config(layer, cls)
        config.update(self._inner_layers(layer))
        if isinstance(layer, stock.Activation) and tail is not None:
            return tail(layer.name)
        if tail is not None:
            config["name"] = self.unique(f"{layer.name}_linear")
        new = cls(**config)
        self.record(layer, new, layer.get_weights())
        return [new, *(tail(layer.name) if tail is not None else [])]

    def _time_distributed(self, wrapper: Any, axes: int) -> list[Piece]:
        inner = wrapper.layer
        pieces = (
            [self.model(inner)]
            if self.source.is_symbolic(inner)
            else self._layer_pieces(inner, axes - 1)
        )
        if not all(isinstance(piece, self.target.keras.layers.Layer) for piece in pieces):
            raise UnsupportedError(f"'{inner.name}' inside it becomes several layers with branches")
        config = {"dtype": dtype_policy(wrapper).name, "trainable": wrapper.trainable}
        return [
            self.target.keras.layers.TimeDistributed(
                piece,
                name=wrapper.name
                if piece is pieces[-1]
                else self.unique(f"{wrapper.name}_{piece.name}"),
                **config,
            )
            for piece in pieces
        ]

    def _inner_layers(self, layer: Any) -> dict[str, Any]:
        found = {}
        names = {"forward_layer": "layer", "layer": "layer", "backward_layer": "backward_layer"}
        for attribute, argument in names.items():
            inner = getattr(layer, attribute, None)
            if inner is None or argument in found:
                continue
            cls = self._class_like(inner)
            if cls is None:
                raise UnsupportedError(f"tf_keras has no {type(inner).__name__}, which it wraps")
            config, tail = self._config(inner, cls)
            if tail is not None:
                raise UnsupportedError(f"tf_keras lacks the activation of '{inner.name}' inside it")
            found[argument] = cls(**config)
        return found

    def _class_like(self, layer: Any) -> Any:
        """The tf_keras class that corresponds to a layer's class, or None."""
        if is_own(layer):
            return stock_kind(layer).layer_class(self.target)
        return getattr(self.target.keras.layers, type(layer).__name__, None)

    def _config(
        self, layer: Any, cls: Any
    ) -> tuple[dict[str, Any], Callable[[str], list[Piece]] | None]:
        """The arguments of `cls`, and a function that makes the activation if it becomes layers."""
        kind, config = type(layer).__name__, {}
        known, defaults = parameters(cls), parameters(type(layer))
        tail = None
        if issubclass(cls, self.target.keras.layers.RNN):
            known["zero_output_for_mask"] = False  # accepted only in **kwargs
        given = layer.get_config()
        given.pop("layer", None)
        given.pop("backward_layer", None)
        for key, value in given.items():
            new_key = _RENAMED.get((kind, key), key)
            if key == "dtype":
                config[key] = dtype_policy(layer).name
            elif key == "activation" and not isinstance(layer, self._recurrent):
                config[key], tail = self._activation(layer)
            elif key.endswith("activation"):
                config[key], special = self._activation(layer, key)
                if special is not None:
                    raise UnsupportedError(f"{key}={value!r} is computed differently in tf_keras")
            elif key.endswith("_initializer"):
                # Weights are copied. An initializer matters only if the layer is created again.
                with contextlib.suppress(UnsupportedError):
                    config[key] = self._counterpart(key, value)
            elif key.endswith(("_regularizer", "_constraint")):
                if value is not None or new_key in known:
                    config[key] = self._counterpart(key, value)
            elif new_key in known or key in ("name", "trainable"):
                config[new_key] = self._value(key, value)
            elif (
                value is not None
                and not (value is False and key not in defaults)  # a switch of newer versions
                and key not in _IGNORED
                and not equal(value, defaults.get(key))
                and (key, value) != ("data_format", "channels_last")
            ):
                raise UnsupportedError(f"{key}={value!r} has no counterpart in tf_keras")
        return config, tail

    def _counterpart(self, key: str, value: Any) -> Any:
        """The tf_keras initializer, regularizer or constraint for a serialized one."""
        module = f"{key.rpartition('_')[2]}s"
        try:
            obj = getattr(self.source.keras, module).get(value)
            return counterpart(self.target, module, obj)
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"its {key} {class_name(value)} is not in tf_keras") from error

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, dict) and "class_name" in value:
            if key == "cell":
                return self._cell(value)
            raise UnsupportedError(f"{key}={class_name(value)} has no known counterpart")
        if key == "cells":
            return [self._cell(cell) for cell in value]
        return value

    def _cell(self, config: dict[str, Any]) -> Any:
        layer = self.source.keras.layers.deserialize(config)
        cls = self._class_like(layer)
        if cls is None:
            raise UnsupportedError(f"its cell {type(layer).__name__} is not in tf_keras")
        return cls(**self._config(layer, cls)[0])

    # -- Activations -------------------------------------------------------------------------

    def _activation(
        self, layer: Any, key: str = "activation"
    ) -> tuple[str | None, Callable[[str], list[Piece]] | None]:
        """The name of the tf_keras activation, or "linear" and a function that makes its layers."""
        function = getattr(layer, key)
        if function is None:
            return None, None
        if isinstance(function, self.source.keras.layers.Layer):
            return "linear", lambda name: self._layer_pieces(function, 0)
        name = self.source.keras.activations.serialize(function)
        if isinstance(name, str) and name in SAME_ACTIVATIONS:
            return name, None
        if name in ("hard_sigmoid", "hard_silu", "hard_swish"):
            return "linear", functools.partial(
                self._hard, name != "hard_sigmoid", dtype_policy(layer)
            )
        shown = name if isinstance(name, str) else class_name(name)
        raise UnsupportedError(f"its {key} {shown} is not in tf_keras")

    def _hard(self, silu: bool, dtype: Any, name: str) -> list[Piece]:
        """relu6(x + 3) / 6 as stock layers, times x for `hard_silu`."""
        layers = self.target.keras.layers

        def part(suffix: str) -> dict[str, Any]:
            return {"name": self.unique(f"{name}_{suffix}"), "dtype": dtype.name}

        gate = [
            layers.Rescaling(1.0, 3.0, **part("shift")),
            layers.ReLU(6.0, **part("relu6")),
        ]
        if not silu:
            return [*gate, layers.Rescaling(1 / 6, name=name, dtype=dtype.name)]
        gate.append(layers.Rescaling(1 / 6, **part("gate")))
        multiply = layers.Multiply(name=name, dtype=dtype.name)

        def hard_silu(x: Any) -> Any:
            y = x
            for layer in gate:
                y = layer(y)
            return multiply([x, y])

        return [hard_silu]

    # -- Private layers of keras.applications ------------------------------------------------

    def _of_applications(self, layer: Any, kind: str, axes: int) -> list[Piece]:
        layers = self.target.keras.layers
        common = {
            "name": layer.name,
            "dtype": dtype_policy(layer).name,
            "trainable": layer.trainable,
        }
        if kind == "StochasticDepth":
            shape = (None, *(1,) * (axes - 1))
            return [layers.Dropout(layer.drop_path_rate, noise_shape=shape, **common)]
        if kind == "LayerScale":
            if axes != 4:
                raise UnsupportedError("its input is not a batch of images")
            new = layers.DepthwiseConv2D(1, use_bias=False, data_format="channels_last", **common)
            self.record(layer, new, [self.source.value(layer.gamma).reshape(1, 1, -1, 1)])
            return [new]
        scale = layers.Rescaling(
            layer.scale, name=self.unique(f"{layer.name}_scale"), dtype=dtype_policy(layer).name
        )
        add = layers.Add(**common)
        return [lambda inputs: add([inputs[0], scale(inputs[1])])]


def _is_symbolic(source: _backend.Backend, value: Any) -> bool:
    return isinstance(value, source.keras.KerasTensor)


def _without_implicit(source: _backend.Backend, call: _backend.GraphCall) -> _backend.GraphCall:
    """A call without the arguments that Keras 3 adds: `training`, and masks of its tensors."""
    leaves = tf.nest.flatten((call.args, list(call.kwargs.values())))
    masks = [mask for leaf in leaves if (mask := mask_of(leaf)) is not None]
    kwargs = {
        key: value
        for key, value in call.kwargs.items()
        if key != "training"
        and value is not None
        and not (
            "mask" in key
            and any(
                _is_same(source, leaf, mask) for leaf in tf.nest.flatten(value) for mask in masks
            )
        )
    }
    return _backend.GraphCall(call.layer, call.args, kwargs, call.outputs)


def _is_same(source: _backend.Backend, a: Any, b: Any) -> bool:
    """Whether two values in a graph have equal computations: model copies compute masks twice."""
    if a is b:
        return True
    if not (_is_symbolic(source, a) and _is_symbolic(source, b)):
        return type(a) is type(b) and not tf.is_tensor(a) and bool(np.array_equal(a, b))
    calls, indices = zip(*map(source.producer, (a, b)), strict=True)
    first, second = (call.layer for call in calls)
    is_layer = isinstance(first, source.keras.layers.Layer)
    if is_layer or type(first) is not type(second) or indices[0] != indices[1]:
        return False  # no two calls of layers are the same
    configs = [{**operation.get_config(), "name": None} for operation in (first, second)]
    given = [tf.nest.flatten((call.args, list(call.kwargs.values()))) for call in calls]
    return (
        configs[0] == configs[1]
        and len(given[0]) == len(given[1])
        and all(map(functools.partial(_is_same, source), *given))
    )
