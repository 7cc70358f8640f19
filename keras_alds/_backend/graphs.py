"""Graphs of symbolic models, and what a model is called on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_alds._backend.layers import Layer, Layers, Model


@dataclasses.dataclass(frozen=True)
class GraphCall:
    """One call in the graph of a symbolic model: `layer(*args, **kwargs)` gave `outputs`.

    Attributes:
        layer: The layer, or in Keras 3 the operation.
        args: The arguments, with the symbolic tensors of the graph.
        kwargs: The keyword arguments.
        outputs: The symbolic tensors that came out, flattened.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]


class Graphs(Layers):
    """What is asked of a model's graph."""

    def is_symbolic(self, model: Model) -> bool:
        """Whether `model` is Functional or Sequential, that is, holds its graph of layers."""
        return isinstance(model, (self.keras.Sequential, self._functional))

    @functools.cached_property
    def _functional(self) -> type:
        # Neither Keras names the class publicly; a model of one tensor is an instance of it.
        tensor = self.keras.Input((1,))
        return type(self.keras.Model(tensor, self.keras.layers.Activation("linear")(tensor)))

    def check_call(self, model: Model) -> None:
        """Raises a ValueError for a model that has a `train_step` and no `call`."""
        if type(model).call is self.keras.Model.call:
            raise ValueError(
                f"Expected the model '{model.name}' to have a `call`, to be run on examples or "
                f"have its multiply–accumulates counted. Received: {type(model).__name__} without "
                'one. Write one, or use objective="params" without calibration data.'
            )

    def input_specs(self, model: Model) -> Any:
        """The structure of `tf.TensorSpec` that `model` is called on (batch of one).

        Raises:
            ValueError: If the shapes are not known.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def watching_calls(
        self, layers: Sequence[Layer], watch: Callable[[Layer, Any, Any], Any]
    ) -> Iterator[None]:
        """Watches every call of `layers` while inside.

        Args:
            layers: The layers, at any depth of a model.
            watch: `watch(layer, inputs, outputs)` is called after every call with its first
                argument and its result, and returns what is handed on in place of the result.
        """

        def watched(layer: Layer, call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def inner(*args: Any, **kwargs: Any) -> Any:
                outputs = call(*args, **kwargs)
                inputs = args[0] if args else next(iter(kwargs.values()))
                return watch(layer, inputs, outputs)

            return inner

        before = [(layer, layer.__dict__.get("call")) for layer in layers]
        try:
            for layer in layers:
                layer.__dict__["call"] = watched(layer, layer.call)
            yield
        finally:
            for layer, call in before:
                layer.__dict__.pop("call", None)
                if call is not None:
                    layer.__dict__["call"] = call

    def trace_shapes(self, model: Model, layers: Sequence[Layer]) -> dict[int, list[tuple]]:
        """Input and output shapes of every call of `layers` in one forward pass of `model`.

        The pass is traced, not run: nothing is computed and no state changes.

        Args:
            model: The model.
            layers: The layers to watch, at any depth.

        Returns:
            `{id(layer): [(input_shape, output_shape), ...]}`, shapes with a batch of one.
        """
        self.check_call(model)
        calls: dict[int, list[tuple]] = {id(layer): [] for layer in layers}
        specs = self.input_specs(model)

        def watch(layer: Layer, inputs: Any, outputs: Any) -> Any:
            calls[id(layer)].append((_static_shape(inputs), _static_shape(outputs)))
            return outputs

        try:
            with self.watching_calls(layers, watch):
                tf.function(
                    lambda inputs: model(inputs, training=False), autograph=False
                ).get_concrete_function(specs)
        finally:
            if hasattr(model, "_clear_losses"):
                model._clear_losses()
        return calls

    def graph(self, model: Model) -> list[GraphCall]:
        """The calls that a built symbolic model makes, inputs first, in an order that runs."""
        graph = self._functional_of(model)
        return [
            self._graph_call(node)
            for depth in sorted(graph._nodes_by_depth, reverse=True)
            for node in graph._nodes_by_depth[depth]
        ]

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        """The structures of input and output tensors of a built symbolic model."""
        raise NotImplementedError

    def runs_graph(self, layer: Layer) -> bool:
        """Whether calling `layer` does what its graph says: a symbolic model without own code."""
        return (
            isinstance(layer, self.keras.layers.Layer)
            and self.is_symbolic(layer)
            and bool(layer.built and getattr(layer, "inputs", None))
            and getattr(type(layer), "call", None)
            in [getattr(kind, "call", None) for kind in (self.keras.Sequential, self._functional)]
        )

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        """What a symbolic model is called on as a flat list in the order of its graph's inputs."""
        raise NotImplementedError

    def infer(self, layer: Layer, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls a layer or operation of a graph, as inference does."""
        if getattr(layer, self._takes_training, False) and kwargs.get("training") is None:
            kwargs = {**kwargs, "training": False}
        return layer(*args, **kwargs)

    # The attribute of a layer that says whether its `call` has an argument `training`.
    _takes_training: str

    def _functional_of(self, model: Model) -> Model:
        return model

    def _graph_call(self, node: Any) -> GraphCall:
        raise NotImplementedError


class Keras3Graphs(Graphs):
    def input_specs(self, model: Model) -> Any:
        if isinstance(model, keras.Sequential):
            return specs_of(model.inputs[0])
        if self.is_symbolic(model):
            return specs_of(model.input)
        config = model.get_build_config() if hasattr(model, "get_build_config") else None
        shapes = (config or {}).get("input_shape") or (config or {}).get("shapes_dict")
        if shapes is None:
            raise ValueError(unknown_inputs(model))
        return specs_from_shapes(shapes, model)

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        graph = self._functional_of(model)
        return graph._inputs_struct, graph._outputs_struct

    _takes_training = "_call_has_training_arg"

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        return list(self._functional_of(model)._standardize_inputs(inputs))

    def _functional_of(self, model: Model) -> Model:
        return model._functional if isinstance(model, keras.Sequential) else model

    def _graph_call(self, node: Any) -> GraphCall:
        arguments = node.arguments
        return GraphCall(
            node.operation, tuple(arguments.args), dict(arguments.kwargs), list(node.outputs)
        )


class TfKerasGraphs(Graphs):
    def input_specs(self, model: Model) -> Any:
        if self.is_symbolic(model) and model.inputs:
            return specs_of(model.input)
        spec = model.save_spec() if hasattr(model, "save_spec") else None
        if spec is not None:
            (inputs,), _ = spec
            return specs_of(inputs)
        shapes = getattr(model, "_build_input_shape", None)
        if shapes is None:
            raise ValueError(unknown_inputs(model))
        return specs_from_shapes(shapes, model)

    _takes_training = "_expects_training_arg"

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        return model._nested_inputs, model._nested_outputs

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        flat = model._flatten_to_reference_inputs(inputs)
        return [
            model._conform_to_reference_input(tensor, ref_input=reference)
            for tensor, reference in zip(flat, model.inputs, strict=True)
        ]

    def _graph_call(self, node: Any) -> GraphCall:
        outputs = tf.nest.flatten(node.outputs)
        return GraphCall(node.layer, tuple(node.call_args), dict(node.call_kwargs), outputs)


def _static_shape(value: Any) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def specs_of(inputs: Any) -> Any:
    def spec(tensor: Any) -> tf.TensorSpec:
        return tf.TensorSpec((1, *tuple(tensor.shape)[1:]), tensor.dtype)

    return tf.nest.map_structure(spec, inputs)


def specs_from_shapes(shapes: Any, model: Model) -> Any:
    dtype = getattr(model, "input_dtype", None) or tf.float32

    def build(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {key: build(value) for key, value in shape.items()}
        if isinstance(shape, (list, tuple)) and any(
            isinstance(s, (list, tuple, dict)) for s in shape
        ):
            return [build(s) for s in shape]
        return tf.TensorSpec((1, *tuple(shape)[1:]), dtype)

    return build(shapes)


def unknown_inputs(model: Model) -> str:
    return (
        f"Expected the model '{model.name}' to know the shape of its inputs. Received: a "
        f"{type(model).__name__} that does not. Call it once on a batch, or `build()` it."
    )
