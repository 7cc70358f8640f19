"""Writes factorized layers out as stock layers, by building the graph of a model anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_alds import _backend
from keras_alds._backend import tensors as nest
from keras_alds._backend import wrappers
from keras_alds._backend.graphs import mask_of
from keras_alds._backend.layers import KerasModel, dtype_policy
from keras_alds.kinds.base import is_factorized, stock_kind
from keras_alds.models.inventory import contains_factorized, walk
from keras_alds.models.rebuild import GraphRebuilder, Piece, check_symbolic, first_tensor


def expand(model: KerasModel, *, fold_batch_norm: bool = False) -> KerasModel:
    """Returns a new model in which every factorized layer is written out as stock layers.

    The new model needs nothing of this package: it loads where `keras_alds` is not installed, and
    tools that know stock layers only (TF-MOT's quantization, converters) take it. `model` is
    untouched; outputs are equal to float rounding. Frozen layers stay frozen, a compiled model
    comes back compiled with a new optimizer of the same settings. A model without factorized
    layers comes back as an equal copy.

    A layer `name` with k slices of rank j becomes:

    - a convolution: `name_encoder`, a stock convolution with `groups=k` and k·j filters, without
      bias (k = 1: an ordinary one; k = channels in 2D: `DepthwiseConv2D` with
      `depth_multiplier=j`, unless the strides differ or the encoder has a constraint), then
      `name`, with the bias and the activation: a pointwise one, or in fold schemes 1 to 3 one
      with those axes of the window that the encoder leaves to it;
    - a transposed convolution: `name_encoder`, a pointwise one with `groups=k`, then `name`,
      a transposed one with the window, the bias and the activation;
    - a separable convolution: `name_depthwise`, `name_encoder` and `name`;
    - an embedding: `name_encoder`, an `Embedding` of length j, then `name`, a `Dense` without bias;
    - an LSTM, GRU or SimpleRNN layer: for an input kernel of one slice `name_encoder`, a `Dense`
      without bias, before `name`, the stock layer on j inputs (whose `dropout`, if it is trained
      on, then falls on those). No stock layer has a place for the other factors: recurrent kernels,
      kernels of several slices and those inside `Bidirectional` and `RNN` are multiplied out,
      and a warning says so;
    - an einsum layer: `name_encoder` and `name`, both `EinsumDense`. Einsum layers have no groups:
      for k > 1 the zeros of the encoder are written out, and a warning says so;
    - a dense layer: `name_encoder` and `name`, both `Dense`, for k = 1. Else `name_rows` (Reshape),
      `name_encoder` (a 1×1 `Conv2D` with `groups=k`), `name_ranks` (Reshape) and `name`
      (`Dense`); inputs of four axes need no Reshape. Where a Reshape cannot go (a Keras mask passes
      through, or several sizes besides the batch are unknown, on other than four axes),
      `name_encoder` is one `Dense` with its zeros written out, and a warning says so.

    So `get_layer(name)` still gives the layer whose output is that of the original. Inside
    `TimeDistributed` every stock layer gets a `TimeDistributed` of its own, named likewise. Shared
    layers stay shared; nested models are rebuilt at any depth.

    It is meant for deployment. Keras runs stock grouped convolutions through XLA, and their
    gradient is 10 to 60 times slower on a CPU than that of the factorized layer: train first,
    expand afterwards.

    Args:
        model: A built Functional or Sequential model of Keras 3 or tf_keras.
        fold_batch_norm: Boolean. Whether to multiply every BatchNormalization into the kernel and
            bias of the convolution or dense layer before it, for inference. It is folded if it
            directly follows a stock or factorized one without activation, whose output nothing
            else uses, both are called once, it works on the channels, and it is not what the
            model returns; a warning names those that stay, and why. Training such a model on is
            training without normalization. Defaults to `False`.

    Returns:
        A new model of the same Keras and, where its class is made from inputs and outputs, of the
        same class.

    Raises:
        ValueError: If `model` is not a built model, is a subclassed one, or holds a layer of
            another kind (a subclassed model, a custom layer) with factorized layers inside.

    Example:
    ```python
    small = keras_alds.compress(model, cr=0.5)
    stock = keras_alds.expand(small)
    stock.save("stock.keras")
    ```

    References:
        Liebenwein et al., "Compressing Neural Networks: Towards Determining the Optimal
        Layer-wise Decomposition", NeurIPS 2021, arXiv:2107.11442, section 2: a slice-wise truncated
        kernel is a grouped convolution followed by a pointwise one.
    """
    backend = check_symbolic(model, "expand")
    wrappers.check_stripped(model, "expand")
    rebuilder = _Expander(backend, model, fold_batch_norm)
    new = rebuilder.rebuild(model)
    backend.copy_compile_state(model, new, rebuilder.pairs())
    return new


class _Expander(GraphRebuilder):
    """Stock layers in place of factorized ones, and BatchNormalization folded if asked for."""

    def __init__(self, backend: _backend.Backend, model: Any, fold_batch_norm: bool) -> None:
        super().__init__(backend, backend)
        self._made: dict[tuple[Any, Any], Any] = {}
        self._folded: dict[Any, Any] = {}
        self._dropped: set[Any] = set()
        if fold_batch_norm:
            self._plan_folding(model)

    # -- What takes a layer's place ----------------------------------------------------------

    def pieces(self, call: _backend.GraphCall) -> list[Piece]:
        if call.layer in self._dropped:
            return []
        tensor = first_tensor(call)
        masked = mask_of(tensor) is not None
        return self._pieces(call.layer, getattr(tensor, "shape", ()), masked)

    def last_call(
        self, call: _backend.GraphCall, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return stock_kind(call.layer).last_call(value, args, kwargs)

    def _pieces(self, layer: Any, shape: Any, masked: bool) -> list[Piece]:
        if not isinstance(layer, self.layers.Layer):
            # An operation of Keras 3 that is no layer: `x + 1`, `keras.ops.mean(x)`.
            return [self.once(layer, "new", lambda: type(layer).from_config(layer.get_config()))]
        if self.source.is_symbolic(layer):
            return [self.model(layer)]
        kind = stock_kind(layer)
        if kind.is_written_out(layer):
            shape = tuple(None if size is None else int(size) for size in shape)
            return kind.pieces(self, layer, shape, masked)
        if isinstance(layer, self.layers.TimeDistributed) and (
            contains_factorized(layer.layer) or self.source.is_symbolic(layer.layer)
        ):
            inner = self._pieces(layer.layer, (shape[0], *tuple(shape)[2:]), masked)
            return [self._wrapped(layer, piece, piece is inner[-1]) for piece in inner]
        if contains_factorized(layer):
            raise ValueError(
                "Expected factorized layers in Functional or Sequential models and in "
                f"TimeDistributed only, to write them out. Received: '{layer.name}' of type "
                f"{type(layer).__name__}, which calls them in Python code. Remedy: call its layers "
                "on a `keras.Input` and make it a functional model, or leave it alone with "
                f"`exclude=` when compressing."
            )
        return [self.once(layer, "new", lambda: self._like(layer))]

    def _like(self, layer: Any) -> Any:
        """A new layer like one that is not written out."""
        config = layer.get_config()
        values, origins = layer.get_weights(), list(layer.weights)
        if layer in self._folded:
            config["use_bias"] = True
            kernels = len(values) - bool(layer.use_bias)
            values = self._fold(layer, values[:kernels])
            origins = [*origins[:kernels], self._bias(layer)]
        new = type(layer).from_config(config)
        self.record(layer, new, values, origins)
        return new

    def _wrapped(self, wrapper: Any, piece: Any, last: bool) -> Any:
        def make() -> Any:
            config = {key: value for key, value in wrapper.get_config().items() if key != "layer"}
            if not last:
                inner = wrapper.layer.name
                suffix = piece.name[len(inner) :] if piece.name.startswith(inner) else "_encoder"
                config["name"] = self.unique(wrapper.name + suffix)
            return type(wrapper)(piece, **config)

        return self.once(wrapper, piece, make)

    # -- What kinds are offered: `kinds.base.Writer` -----------------------------------------

    @property
    def layers(self) -> Any:
        return self.source.keras.layers

    def once(self, layer: Any, key: Any, make: Callable[[], Any]) -> Any:
        if (layer, key) not in self._made:
            self._made[layer, key] = make()
        return self._made[layer, key]

    def value(self, variable: Any) -> np.ndarray:
        return self.source.value(variable)

    def encoder_options(self, layer: Any) -> dict[str, Any]:
        return {
            "name": self.unique(f"{layer.name}_encoder"),
            "use_bias": False,
            "kernel_initializer": self.copied(layer.encoder_initializer),
            "kernel_regularizer": layer.encoder_regularizer,
            "kernel_constraint": layer.encoder_constraint,
            "trainable": layer.trainable,
            "dtype": dtype_policy(layer),
        }

    def decoder_options(self, layer: Any) -> dict[str, Any]:
        return {
            "name": layer.name,
            "use_bias": layer.use_bias or layer in self._folded,
            "activation": layer.activation,
            "kernel_initializer": self.copied(layer.decoder_initializer),
            "bias_initializer": self.copied(layer.bias_initializer),
            "kernel_regularizer": layer.decoder_regularizer,
            "bias_regularizer": layer.bias_regularizer,
            "kernel_constraint": layer.decoder_constraint,
            "bias_constraint": layer.bias_constraint,
            "activity_regularizer": layer.activity_regularizer,
            "trainable": layer.trainable,
            "dtype": dtype_policy(layer),
        }

    def copied(self, initializer: Any) -> Any:
        # tf_keras warns of an initializer object that is used twice.
        functions = self.source.keras.initializers
        return functions.get(functions.serialize(initializer))

    def pair(
        self, layer: Any, encoder: Any, decoder: Any, kernel: np.ndarray | None = None
    ) -> list[Piece]:
        values = [self.value(layer.decoder) if kernel is None else kernel]
        if layer in self._folded:
            values = self._fold(layer, values)
        elif layer.use_bias:
            values.append(self.value(layer.bias))
        origins = [layer.decoder, self._bias(layer)]
        self.record(layer, decoder, values, origins[: len(values)])
        return [encoder, decoder]

    def _bias(self, layer: Any) -> Any:
        """The weight in whose place the bias of a layer is once it is written out, or None."""
        norm = self._folded.get(layer)
        return getattr(layer, "bias", None) if layer.use_bias or norm is None else norm.beta

    # -- BatchNormalization ------------------------------------------------------------------

    def _plan_folding(self, model: Any) -> None:
        """Finds the pairs to fold; warns of the BatchNormalization layers that stay."""
        graphs = [model, *(m for _, m in walk(model) if self.source.is_symbolic(m))]
        calls = [(graph, call) for graph in graphs for call in self.source.graph(graph)]
        count: dict[Any, int] = {}
        for _, call in calls:
            count[call.layer] = count.get(call.layer, 0) + 1
        stay = {}
        seen = set()
        for graph in graphs:
            inner = [call for owner, call in calls if owner is graph]
            for call in inner:
                if not isinstance(call.layer, self.source.keras.layers.BatchNormalization):
                    continue
                seen.add(call.layer)
                before, reason = self._foldable(graph, call, inner, count)
                if reason is None and graph is model:
                    outputs = nest.flatten(self.source.graph_ends(model)[1])
                    if any(output is call.outputs[0] for output in outputs):
                        reason = "the model returns its output"
                if reason is None:
                    self._folded[before] = call.layer
                    self._dropped.add(call.layer)
                else:
                    stay[call.layer.name] = reason
        for path, layer in walk(model):
            if isinstance(layer, self.source.keras.layers.BatchNormalization) and layer not in seen:
                stay[path] = "it is inside a wrapper or custom layer"
        if stay:
            listed = "; ".join(f"'{name}': {reason}" for name, reason in stay.items())
            self.warn(
                f"{len(stay)} of {len(stay) + len(self._dropped)} BatchNormalization layers are "
                f"not folded: {listed}."
            )

    def _foldable(
        self, graph: Any, call: Any, calls: list[Any], count: dict[Any, int]
    ) -> tuple[Any, str | None]:
        """The layer that a BatchNormalization can be folded into, or why it cannot."""
        tensor = first_tensor(call)
        (before,) = (c for c in calls if any(output is tensor for output in c.outputs))
        layer = before.layer
        if not isinstance(layer, self.layers.Layer) or not _takes_scales(layer):
            return None, f"'{layer.name}' before it is no stock convolution or dense layer"
        if self.source.keras.activations.serialize(layer.activation) != "linear":
            return None, f"'{layer.name}' before it has an activation"
        if layer.activity_regularizer is not None:
            return None, f"'{layer.name}' before it has an activity regularizer"
        if count[layer] > 1 or count[call.layer] > 1:
            return None, f"it or '{layer.name}' before it is called several times"
        uses = sum(
            leaf is tensor
            for c in calls
            for leaf in nest.flatten((c.args, list(c.kwargs.values())))
        )
        ends = nest.flatten(self.source.graph_ends(graph)[1])
        if uses + sum(end is tensor for end in ends) > 1:
            return None, f"the output of '{layer.name}' before it is used elsewhere too"
        axes = len(tensor.shape)
        axis = call.layer.axis
        (axis,) = axis if isinstance(axis, (list, tuple)) else (axis,)
        first = getattr(layer, "data_format", None) == "channels_first"
        if axis % axes != (1 if first else axes - 1):
            return None, f"it normalizes axis {axis}, which does not hold the channels"
        if call.kwargs.get("training"):
            return None, "it is called with `training=True`"
        if dtype_policy(layer).compute_dtype != dtype_policy(call.layer).compute_dtype:
            return None, f"'{layer.name}' before it computes in another dtype"
        return layer, None

    def _fold(self, layer: Any, kernels: list[np.ndarray]) -> list[np.ndarray]:
        """The weights of `layer`, given those but the bias, with its normalization folded in."""
        norm = self._folded[layer]

        def value(variable: Any, default: float) -> np.ndarray:
            given = default if variable is None else self.source.value(variable)
            return np.asarray(given, np.float64)

        scale = value(norm.gamma, 1.0) / np.sqrt(value(norm.moving_variance, 1.0) + norm.epsilon)
        old_bias = value(layer.bias if layer.use_bias else None, 0.0)
        bias = value(norm.beta, 0.0) + (old_bias - value(norm.moving_mean, 0.0)) * scale
        kernel = kernels[-1].astype(np.float64)
        along = [1] * kernel.ndim
        for axis in stock_kind(layer).output_axes or ():
            along[axis] = kernel.shape[axis]
        kernel *= scale.reshape(along)
        dtype = kernels[-1].dtype
        return [*kernels[:-1], kernel.astype(dtype), bias.astype(dtype)]


def _takes_scales(layer: Any) -> bool:
    """Whether a layer's outputs can be scaled in its kernel: a stock layer, or a factorized one."""
    kind = stock_kind(layer)
    return kind.output_axes is not None and (is_factorized(layer) or kind.is_stock(layer))
