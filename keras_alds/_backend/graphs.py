"""Graphs of symbolic models, and the inputs of models."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_alds._backend.calls import replaced_calls, watched
from keras_alds._backend.functions import run_as_code
from keras_alds._backend.layers import Layer, Layers, Model, Undo, become, static_shape
from keras_alds._backend.quiet import ignored_warnings


@dataclasses.dataclass(frozen=True)
class GraphCall:
    """One call in the graph of a symbolic model: `layer(*args, **kwargs)` returned `outputs`.

    Attributes:
        layer: The layer, or in Keras 3 the operation.
        args: The arguments, with the symbolic tensors of the graph.
        kwargs: The keyword arguments.
        outputs: The symbolic output tensors, flattened.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]


class Graphs(Layers):
    """Graphs of models: the code that Keras 3 and tf_keras share."""

    def is_symbolic(self, model: Model) -> bool:
        """Whether `model` is Functional or Sequential, and so has a graph of layers."""
        return isinstance(model, (self.keras.Sequential, self._functional_class))

    @functools.cached_property
    def _functional_class(self) -> type:
        # The class is not public; a model of one tensor is an instance of it.
        tensor = self.keras.Input((1,))
        return type(self.keras.Model(tensor, self.keras.layers.Activation("linear")(tensor)))

    def has_graph(self, model: Model) -> bool:
        """Whether `model` is symbolic and built: a Sequential may not know its inputs yet."""
        return self.is_symbolic(model) and bool(model.built and getattr(model, "inputs", None))

    def check_call(self, model: Model) -> None:
        """Raises a ValueError for a model with a `train_step` but no `call`."""
        if type(model).call is self.keras.Model.call:
            parts = self.parts(model)
            inside = f"Compress a model inside it ({', '.join(parts)}), write" if parts else "Write"
            raise ValueError(
                f"Expected the model '{model.name}' to have a `call`, which calibration data and "
                f'objectives other than "params" require. Received: {type(model).__name__} without '
                f'one. {inside} one, or use objective="params" without calibration data.'
            )

    def input_specs(self, model: Model) -> Any:
        """The structure of `tf.TensorSpec` of a model's inputs (batch of one).

        Raises:
            ValueError: If the shapes are not known.
        """
        if self.has_graph(model):
            return specs_of(self.graph_ends(model)[0])
        config = model.get_build_config() or {}
        shapes = config.get("input_shape") or config.get("shapes_dict")
        if shapes is None:
            raise ValueError(
                f"Expected the model '{model.name}' to have known input shapes. Received: a "
                f"{type(model).__name__} without. Call it once on a batch."
            )
        return specs_from_shapes(shapes, model)

    def trace_shapes(
        self, model: Model, layers: Sequence[Layer]
    ) -> tuple[dict[Layer, list[tuple]], Any]:
        """Input and output shapes of every call of `layers` in one forward pass of `model`.

        The pass is only traced: nothing is computed, and no state changes.

        Returns:
            `{layer: [(input_shape, output_shape), ...]}`, shapes with a batch of one, and the
            graph of the pass.
        """
        self.check_call(model)
        calls: dict[Layer, list[tuple]] = {layer: [] for layer in layers}
        specs = self.input_specs(model)

        def watch(layer: Layer, inputs: Any, outputs: Any) -> Any:
            if isinstance(inputs, tf.SparseTensor):  # the Dense of tf_keras forgets the batch
                outputs.set_shape([inputs.shape[0], *outputs.shape[1:]])
            calls[layer].append((static_shape(inputs), static_shape(outputs)))
            return outputs

        try:
            with run_as_code(self.layers_of(model)), replaced_calls(watched(layers, watch)):
                traced = tf.function(
                    lambda inputs: model(inputs, training=False), autograph=False
                ).get_concrete_function(specs)
        finally:
            self.clear_losses(model)
        return calls, traced.graph

    def clear_losses(self, model: Model) -> None:
        """Forgets the losses that the last call of a model has added, such as a traced graph's."""
        model._clear_losses()

    def graph(self, model: Model) -> list[GraphCall]:
        """The calls of a built symbolic model in topological order, inputs first."""
        graph = self._functional_of(model)
        return [
            self._graph_call(node)
            for depth in sorted(graph._nodes_by_depth, reverse=True)
            for node in graph._nodes_by_depth[depth]
        ]

    def graph_ends(self, model: Model) -> tuple[Any, Any]:
        """The input and output tensors of a built symbolic model, as nested structures."""
        graph = self._functional_of(model)
        return graph.input, graph.output

    def input_names(self, model: Model) -> list[str]:
        """The names of a symbolic model's input layers; empty for other models."""
        if not self.has_graph(model):
            return []
        names = {
            id(call.outputs[0]): call.layer.name
            for call in self.graph(model)
            if isinstance(call.layer, self.keras.layers.InputLayer)
        }
        return [names[id(tensor)] for tensor in model.inputs]

    def runs_graph(self, layer: Layer) -> bool:
        """Whether calling `layer` runs its graph: a symbolic model without a custom `call`."""
        return (
            isinstance(layer, self.keras.layers.Layer)
            and self.has_graph(layer)
            and getattr(type(layer), "call", None)
            in [
                getattr(kind, "call", None)
                for kind in (self.keras.Sequential, self._functional_class)
            ]
        )

    def graph_inputs(self, model: Model, inputs: Any) -> list[Any]:
        """The inputs of a symbolic model as a flat list, in the order of its graph's inputs."""
        starts, _ = self.graph_ends(model)
        with ignored_warnings():  # Keras 3 warned when `model` was made
            # An identity model sorts its inputs like `model`.
            return tf.nest.flatten(self.keras.Model(starts, model.inputs, name=model.name)(inputs))

    def inference_arguments(self, call: GraphCall) -> dict[str, Any]:
        """The keyword arguments that a call of a graph keeps when its model predicts."""
        return call.kwargs

    def infer(self, layer: Layer, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls a layer, a graph operation or a function in inference mode.

        Layers without an argument `training` pass the mode on to those that they call.
        """
        if isinstance(layer, self.keras.layers.Layer) and kwargs.get("training") is None:
            kwargs = {**kwargs, "training": False}
        return layer(*args, **kwargs)

    def producer(self, tensor: Any) -> tuple[GraphCall, int]:
        """The call that returned a symbolic tensor, and the tensor's index in its outputs."""
        layer, node, index = tensor._keras_history
        return self._graph_call(self._nodes(layer)[node]), index

    def _nodes(self, layer: Layer) -> list[Any]:
        """The calls of a layer in graphs, as Keras keeps them."""
        raise NotImplementedError

    def _functional_of(self, model: Model) -> Model:
        return model

    def _graph_call(self, node: Any) -> GraphCall:
        raise NotImplementedError


class Keras3Graphs(Graphs):
    """The implementation for Keras 3."""

    def _nodes(self, layer: Layer) -> list[Any]:
        return layer._inbound_nodes

    def _functional_of(self, model: Model) -> Model:
        return model._functional if isinstance(model, keras.Sequential) else model

    def inference_arguments(self, call: GraphCall) -> dict[str, Any]:
        # The mode of the model wins over that of a layer's call, which is `training=True` by
        # default for random augmentation. Operations that are no layers keep theirs.
        if not isinstance(call.layer, keras.layers.Layer):
            return call.kwargs
        return {name: value for name, value in call.kwargs.items() if name != "training"}

    def _graph_call(self, node: Any) -> GraphCall:
        arguments = node.arguments
        return GraphCall(
            node.operation, tuple(arguments.args), dict(arguments.kwargs), list(node.outputs)
        )


class TfKerasGraphs(Graphs):
    """The implementation for tf_keras."""

    def input_specs(self, model: Model) -> Any:
        # A subclassed model has a spec after its first call.
        known = self.is_model(model) and not self.is_symbolic(model)
        spec = model.save_spec() if known else None
        if spec is None:
            return super().input_specs(model)
        (inputs,), _ = spec
        return specs_of(inputs)

    def _nodes(self, layer: Layer) -> list[Any]:
        return layer.inbound_nodes

    def _graph_call(self, node: Any) -> GraphCall:
        outputs = tf.nest.flatten(node.outputs)
        args, kwargs = _with_named_mode(node.layer, node.call_args, node.call_kwargs)
        return GraphCall(node.layer, args, kwargs, outputs)


def _with_named_mode(
    layer: Layer, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with `training`, and what follows it, as keyword arguments."""
    given = inspect.signature(layer.call).bind_partial(*args).arguments if len(args) > 1 else {}
    if "training" not in given or len(given) < len(args):  # fewer names: `*args` takes some
        return tuple(args), dict(kwargs)
    names = list(given)
    start = names.index("training")
    return tuple(args[:start]), {**{name: given[name] for name in names[start:]}, **kwargs}


def forget_graph(function: Any) -> Undo:
    """Drops the graphs of a `tf.function`, so that its next call traces again.

    Returns:
        A function that restores the graphs.
    """
    before = dict(vars(function))
    become(function, type(function), vars(function._clone(None)))
    return lambda: become(function, type(function), before)


def mask_of(tensor: Any) -> Any:
    """The Keras mask of a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    """Sets the Keras mask of a tensor."""
    tensor._keras_mask = mask


def is_sparse(tensor: Any) -> bool:
    """Whether a symbolic tensor or a spec is sparse."""
    spec = getattr(tensor, "type_spec", tensor)  # tf_keras's; the tensors of Keras 3 have flags
    return isinstance(spec, tf.SparseTensorSpec) or bool(getattr(tensor, "sparse", False))


def is_ragged(tensor: Any) -> bool:
    """Whether a symbolic tensor or a spec is ragged."""
    spec = getattr(tensor, "type_spec", tensor)
    return isinstance(spec, tf.RaggedTensorSpec) or bool(getattr(tensor, "ragged", False))


def specs_of(inputs: Any) -> Any:
    """`tf.TensorSpec`s, or their like for sparse and ragged tensors, with a batch of one."""

    def spec(tensor: Any) -> tf.TypeSpec:
        shape = (1, *tuple(tensor.shape)[1:])
        if is_sparse(tensor):
            return tf.SparseTensorSpec(shape, tensor.dtype)
        if is_ragged(tensor):
            rank = getattr(getattr(tensor, "type_spec", tensor), "ragged_rank", None)
            return tf.RaggedTensorSpec(shape, tensor.dtype, rank or 1)
        return tf.TensorSpec(shape, tensor.dtype)

    return tf.nest.map_structure(spec, inputs)


def specs_from_shapes(shapes: Any, model: Model) -> Any:
    """`tf.TensorSpec`s for the shapes that `model` was built with, with a batch of one."""
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
